# make demo | make test are all a fresh clone needs: Python >= 3.10, make and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# the lowest versions that pyproject.toml states, on the oldest Python it allows
PYTHON_LOWEST ?= python3.10

.PHONY: demo test conformance test-lowest lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

# timm's own model tests over every name of this package; ARGS='--max-params 45e6' leaves out the large ones
conformance: $(VENV)/.test
	$(BIN)/python tests/conformance.py $(ARGS)

test-lowest:
	$(MAKE) VENV=.venv-lowest PYTHON=$(PYTHON_LOWEST) CONSTRAINT='-c tests/lowest.txt' .venv-lowest/.test
	.venv-lowest/bin/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(f"Python 3.10 or newer is needed, $(PYTHON) is {sys.version.split()[0]}; set PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[demo]' $(CONSTRAINT)
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[test]' $(CONSTRAINT)
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest .cache output
