# `make train` and `make test` are all that a fresh machine with Python 3.11 or newer and make needs.
# What follows "##" is a target's line in `make help`.
PYTHON ?= python3
BIN = .venv/bin
CONSTRAINTS ?= constraints.txt
INSTALL = $(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable
TOO_OLD = zeta needs Python 3.11 or newer, but $(PYTHON) is %d.%d.%d: make $(or $(MAKECMDGOALS),train) PYTHON=python3.12

.PHONY: help train test quick zoo parity bench lint
help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

train: .venv/train ## set up, then train a small language model: two minutes on two CPU cores
	$(BIN)/python examples/train_lm.py

test: .venv/test ## set up, then run all tests, and list the slowest ten: six minutes on two CPU cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

# Under 20 seconds; the two slowest of these are left to `make test`.
QUICK = core family forms routing sharing param_groups mlx_optimizer checkpoint rooms
quick: .venv/test ## the algorithm, its forms, routing, plans, files: 20 seconds
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -k "not interpreter and not peft" $(QUICK:%=tests/test_%.py)

# Where the parameters of every model type of Transformers go: a minute.
zoo: .venv/test ## routing of every model type of Transformers and mlx-lm: a minute
	ZOO=1 $(BIN)/python -m pytest -q tests/test_zoo_mlx.py tests/test_zoo_transformers.py

parity: .venv/test ## every library, device and dtype here against float64: 20 seconds
	$(BIN)/zeta parity

bench: .venv/test ## the tables of bench/README.md
	$(BIN)/python bench/newton_schulz.py
	$(BIN)/python bench/newton_schulz.py --errors
	$(BIN)/python bench/step.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/newton_schulz.py --backend mlx
	$(BIN)/python bench/step.py --backend mlx
	$(BIN)/python bench/scaling.py
	$(BIN)/python bench/communication.py
	$(BIN)/python bench/communication.py --check

lint: .venv/test ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/made:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(TOO_OLD)" % sys.version_info[:3])'
	$(PYTHON) -m venv .venv
	touch $@

.venv/train: pyproject.toml $(CONSTRAINTS) .venv/made
	$(INSTALL) '.[torch,mlx,train]'
	touch $@

.venv/test: .venv/train
	$(INSTALL) '.[torch,mlx,train,integrations,test]'
	touch $@
