# Each target does its own set-up: python 3.11 or newer, pip and make are all it needs.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: train test lint clean

train: .venv/installed
	$(BIN)/pyro-vae train digits --out runs/digits --overwrite \
		--likelihood discretized-logistic --latent-dim 16 --hidden 256 128 \
		--epochs 120 --batch-size 64 --learning-rate 3e-3 --learning-rate-schedule cosine \
		--warm-up linear --warm-up-epochs 60

test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses auto

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ .venv/installed

clean:
	rm -rf .venv runs
