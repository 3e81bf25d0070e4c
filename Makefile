# make demo  indexes the example corpus and traces a few prompts
# make test  lints, checks types and runs all tests but the slow ones
# make protos  renews the Python stubs in trackstar/v1 from protos/ (a test compares them)
# Either makes the environment in .venv first, if it is missing or out of date.

PYTHON ?= python3
# An extra package index for torch, such as one with builds for the CPU alone; empty means pip's own configuration.
TORCH_INDEX ?=

BIN := .venv/bin
ENV := .venv/.installed
# moto's S3 server, for tests, in an environment of its own: boto3 does not take the python-dateutil that the rest has.
MOTO := .venv/moto/.installed
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow protos protos-baseline format clean

help:
	@echo "make demo | test | test-slow | protos | format | clean      (PYTHON=python3.11 or newer, TORCH_INDEX=URL)"

env: $(ENV) $(MOTO)

$(ENV): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON to one.")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[encoder,index,s3,gateway,ray,train,eval,dev]'
	touch $@

$(MOTO): tests/moto.txt | $(ENV)
	test -x .venv/moto/bin/pip || $(BIN)/python -m venv .venv/moto
	.venv/moto/bin/pip install --quiet --disable-pip-version-check -r tests/moto.txt
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

protos: env
	cd protos && ../$(BIN)/buf format -w && ../$(BIN)/buf lint && ../$(BIN)/buf breaking --against v1.binpb
	PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --grpc_python_out=. --mypy_out=quiet:. \
	    --mypy_grpc_out=quiet:. protos/trackstar/v1/*.proto

# What clients already rely on; renew it with a release, never to silence `buf breaking`.
protos-baseline: env
	cd protos && ../$(BIN)/buf build -o v1.binpb

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
