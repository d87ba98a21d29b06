# `make train` and `make test` are all a fresh machine with Python 3.11 or newer and make needs.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: train test parity bench lint
train: .venv/installed
	$(BIN)/python examples/train_lm.py

test: .venv/installed
	$(BIN)/python -m pytest -n 2

parity: .venv/installed
	$(BIN)/zeta parity

bench: .venv/installed
	$(BIN)/python bench/newton_schulz.py
	$(BIN)/python bench/step.py

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[torch,mlx,train,integrations,test]'
	touch $@
