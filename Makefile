# `make train` and `make test` are all that a fresh machine with Python 3.11 or newer and make needs.
PYTHON ?= python3
BIN = .venv/bin
INSTALL = $(BIN)/pip install --quiet --constraint constraints.txt --editable

.PHONY: train test parity bench lint
train: .venv/train
	$(BIN)/python examples/train_lm.py

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile

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

.venv/train: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[torch,mlx,train]'
	touch $@

.venv/test: .venv/train
	$(INSTALL) '.[torch,mlx,train,integrations,test]'
	touch $@
