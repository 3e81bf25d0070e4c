# make demo  indexes the example corpus and traces a few prompts
# make test  lints, checks types and runs all tests but the slow ones
# Either makes the environment in .venv first, if it is missing or out of date.

PYTHON ?= python3
# An extra package index for torch, such as one with builds for the CPU alone; empty means pip's own configuration.
TORCH_INDEX ?=

BIN := .venv/bin
ENV := .venv/.installed
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow format clean

help:
	@echo "make demo | test | test-slow | format | clean      (PYTHON=python3.11 or newer, TORCH_INDEX=URL)"

env: $(ENV)

$(ENV): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON to one.")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[encoder,index,gateway,ray,train,dev]'
	touch $@

demo: env
	$(BIN)/python examples/demo.py

# pytest comes last, so that its summary ends the output.
test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

test-slow: env
	$(BIN)/pytest -m slow

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
