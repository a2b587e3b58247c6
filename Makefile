# Each target does its own set-up: python 3.11 or newer, pip and make are all it needs.
PYTHON ?= python3
BIN = .venv/bin

OLDEST = .venv-oldest/bin
PROSE = README.md AGENTS.md CONTRIBUTING.md CHANGELOG.md SECURITY.md docs examples benchmarks pyro_vae tests

.PHONY: train test test-all test-oldest lint docs tutorials package try-package clean

train: .venv/installed
	$(BIN)/pyro-vae train digits --out runs/digits --overwrite \
		--likelihood discretized-logistic --latent-dim 16 --hidden 256 128 \
		--epochs 120 --batch-size 64 --learning-rate 3e-3 --learning-rate-schedule cosine \
		--warm-up linear --warm-up-epochs 60

# Without the tests that are marked as thorough. See docs/design/testing.md.
test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not thorough"

test-all: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# The engine, the contract of a pair and run folders, with the oldest versions allowed.
test-oldest: .venv-oldest/installed
	$(OLDEST)/python -m pytest --numprocesses auto tests/test_compat.py tests/runs \
		tests/training/test_engine.py tests/training/test_engine_in_fit.py \
		tests/training/test_tracing.py tests/pairs/test_contract.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell $(PROSE)

# The site, in build/site. Warnings are errors, and each link within the site must have a target.
docs: .venv/installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --nitpicky --quiet docs build/site

# The notebooks of the tutorials, from the scripts beside them. This needs ten minutes.
tutorials: .venv/installed-docs
	$(BIN)/python docs/run_tutorials.py

# The wheel and the sdist, in dist.
package: .venv/installed-test
	rm -rf dist
	$(BIN)/python -m build --quiet

# Both install into an empty environment, and the estimators are right there. This needs minutes.
try-package: package
	rm -rf .venv-package
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	.venv-package/bin/pyro-vae selftest
	.venv-package/bin/python -m pip uninstall --quiet --yes pyro-vae
	.venv-package/bin/python -m pip install --quiet --disable-pip-version-check dist/*.tar.gz
	.venv-package/bin/pyro-vae selftest

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ .venv/installed

.venv/installed-docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

.venv-oldest/installed: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check \
		--constraint tests/oldest.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-package build dist runs
