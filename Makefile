# `make train` and `make test` are all that a fresh machine with Python 3.11 or newer and make needs.
PYTHON ?= python3
BIN = .venv/bin
CONSTRAINTS ?= constraints.txt
INSTALL = $(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable
TOO_OLD = zeta needs Python 3.11 or newer, but $(PYTHON) is %d.%d.%d: make $(or $(MAKECMDGOALS),train) PYTHON=python3.12

.PHONY: train test quick zoo parity bench lint
train: .venv/train
	$(BIN)/python examples/train_lm.py

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Under 20 seconds: the algorithm, its forms, routing, plans, files.
QUICK = core family forms routing sharing param_groups mlx_optimizer checkpoint rooms
quick: .venv/test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(QUICK:%=tests/test_%.py)

# Where the parameters of every model type of Transformers go: a minute.
zoo: .venv/test
	ZOO=1 $(BIN)/python -m pytest -q tests/test_zoo_mlx.py tests/test_zoo_transformers.py

parity: .venv/test
	$(BIN)/zeta parity

bench: .venv/test
	$(BIN)/python bench/newton_schulz.py
	$(BIN)/python bench/newton_schulz.py --errors
	$(BIN)/python bench/step.py
	$(BIN)/python bench/newton_schulz.py --backend mlx
	$(BIN)/python bench/step.py --backend mlx
	$(BIN)/python bench/scaling.py
	$(BIN)/python bench/communication.py
	$(BIN)/python bench/communication.py --check

lint: .venv/test
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
