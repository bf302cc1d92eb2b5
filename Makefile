# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
VENV ?= .venv
# Versions to test with, e.g. `make test CONSTRAINTS=tests/constraints-lowest.txt VENV=.venv-lowest`
CONSTRAINTS ?=
# What benchmarks run on needs newer dependencies than the lowest of ours.
comma := ,
TEST_EXTRAS := test$(if $(CONSTRAINTS),,$(comma)bench)

BIN := $(VENV)/bin
# What is built on timm is tested against the installed wheel.
ECOSYSTEM := $(VENV)-ecosystem
PYTEST := $(BIN)/python -m pytest -n 2
# Threads that spin while they wait make everything crawl when two processes share two cores.
export OMP_WAIT_POLICY := PASSIVE
# Tests call the `gmnet-timm` of this environment.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-slow test-ecosystem lint format build clean

demo: $(VENV)/demo.installed
	$(BIN)/gmnet-timm demo $(ARGS)

test: $(VENV)/$(TEST_EXTRAS).installed
	$(PYTEST) -m 'not slow and not ecosystem' $(ARGS)

test-slow: $(VENV)/$(TEST_EXTRAS).installed
	$(PYTEST) -m 'slow and not ecosystem' $(ARGS)

test-ecosystem: export PATH := $(abspath $(ECOSYSTEM)/bin):$(PATH)
test-ecosystem: $(ECOSYSTEM)/ecosystem.installed
	$(ECOSYSTEM)/bin/python -m pytest -n 2 -m ecosystem -o norecursedirs= $(ARGS)

lint: $(VENV)/$(TEST_EXTRAS).installed $(VENV)/lint.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows

format: $(VENV)/lint.installed
	$(BIN)/ruff check --fix .

build: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# An editable installation holds a copy of the module that torch's entry point names.
$(VENV)/%.installed: pyproject.toml src/gmnet_timm_autoload.py $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]' $(addprefix --constraint ,$(CONSTRAINTS))
	touch $@

$(ECOSYSTEM)/ecosystem.installed: pyproject.toml $(shell find src -type f -not -name '*.pyc')
	$(PYTHON) -m venv $(ECOSYSTEM)
	rm -rf $(ECOSYSTEM)/wheel
	$(ECOSYSTEM)/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(ECOSYSTEM)/wheel .
	$(ECOSYSTEM)/bin/python -m pip install --quiet --no-deps --force-reinstall $(ECOSYSTEM)/wheel/*.whl
	$(ECOSYSTEM)/bin/python -m pip install --quiet 'gmnet-timm[test,ecosystem]'
	touch $@

clean:
	rm -rf $(VENV) $(ECOSYSTEM) .cache dist
