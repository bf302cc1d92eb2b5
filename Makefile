# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
VENV ?= .venv
# Versions to test with, e.g. `make test CONSTRAINTS=tests/constraints-lowest.txt VENV=.venv-lowest`
CONSTRAINTS ?=
# What benchmarks and the page of `freq explore` run on needs newer dependencies than the lowest of ours.
comma := ,
TEST_EXTRAS := demo,freq$(if $(CONSTRAINTS),,$(comma)bench$(comma)explore)

BIN := $(VENV)/bin
# What is built on timm is tested against the installed wheel.
ECOSYSTEM := $(VENV)-ecosystem
PARALLEL := -n 2 --dist worksteal
PYTEST := $(BIN)/python -m pytest $(PARALLEL)
# Threads that spin while they wait make everything crawl when two processes share two cores.
export OMP_WAIT_POLICY := PASSIVE
# Tests call the `gmnet-timm` of this environment.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-slow test-scripts test-ecosystem bench-gpu docs lint format build environments ecosystem clean

demo: $(VENV)/demo.installed
	$(BIN)/gmnet-timm demo $(ARGS)

test: $(VENV)/test.installed
	$(PYTEST) -m 'not slow and not ecosystem' $(ARGS)

test-slow: $(VENV)/test.installed
	$(PYTEST) -m 'slow and not ecosystem' $(ARGS)

# With TIMM_SCRIPTS=FOLDER, a checkout of timm's repository: its wheel has no scripts.
test-scripts: $(VENV)/scripts.installed
	test -f "$(TIMM_SCRIPTS)/train.py"
	$(PYTEST) tests/training/test_scripts.py $(ARGS)

test-ecosystem: export PATH := $(abspath $(ECOSYSTEM)/bin):$(PATH)
test-ecosystem: $(ECOSYSTEM)/ecosystem.installed
	$(ECOSYSTEM)/bin/python -m pytest $(PARALLEL) -m ecosystem -o norecursedirs= $(ARGS)

# On a machine with a CUDA device, with the packages that are installed there. GmNet comes first; what the given minutes,
# 7.5 in all, do not suffice for is reported as not run.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_RUN := $(GPU_PYTHON) -m benchmarks run
GMNETS := gmnet_s1 gmnet_s2 gmnet_s3 gmnet_s4
GPU_RESULTS ?= benchmarks/results/gpu

bench-gpu: export PYTHONPATH := src:$(PYTHONPATH)
bench-gpu:
	timeout 60 $(GPU_PYTHON) -m pytest -q -k cuda tests/test_gmnet_memory.py tests/test_benchmarks_gpu.py
	$(GPU_RUN) latency --device cuda --runtimes eager cuda-graph onnxruntime --dtypes float16 --rounds 10 \
		--minutes 2 --output $(GPU_RESULTS)-latency.json
	$(GPU_RUN) throughput --device cuda --runtimes cuda-graph --dtypes tf32 bfloat16 --batch-sizes 1 32 256 \
		--rounds 5 --minutes 2 --output $(GPU_RESULTS)-throughput.json
	$(GPU_RUN) throughput --device cuda --models gmnet_s3 --runtimes compile-max --dtypes bfloat16 \
		--batch-sizes 256 --rounds 5 --minutes 1.5 --output $(GPU_RESULTS)-throughput-max.json
	$(GPU_RUN) training --device cuda --models $(GMNETS) --dtypes tf32 bfloat16 --batch-sizes 128 \
		--rounds 3 --minutes 1 --output $(GPU_RESULTS)-training.json

# The site, in site/. It fails for a broken link or a page that nothing leads to.
docs: $(VENV)/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

lint: $(VENV)/test.installed $(VENV)/lint.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows

format: $(VENV)/lint.installed
	$(BIN)/ruff check --fix .

build: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

# All at once, since what pip installs side by side into one environment is not safe.
environments: $(VENV)/test.installed $(VENV)/lint.installed $(VENV)/docs.installed

ecosystem: $(ECOSYSTEM)/ecosystem.installed

# Python's own pip may be older than dependency groups.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'

# What is imported is compiled then: all of it would take minutes.
PIP_INSTALL := -m pip install --quiet --no-compile
$(VENV)/%.installed: WHAT = --editable '.[$*]'
$(VENV)/test.installed: WHAT = --editable '.[$(TEST_EXTRAS)]' --group test
$(VENV)/scripts.installed: WHAT = --editable '.[$(TEST_EXTRAS)]' --group scripts
$(VENV)/lint.installed: WHAT = --group lint
# Docstrings are read from the sources, so that the site needs neither torch nor timm.
$(VENV)/docs.installed: WHAT = --group docs
# An editable installation holds a copy of the module that torch's entry point names.
$(VENV)/%.installed: pyproject.toml src/gmnet_timm_autoload.py $(VENV)/bin/python
	$(BIN)/python $(PIP_INSTALL) $(WHAT) $(addprefix --constraint ,$(CONSTRAINTS))
	touch $@

# torch and the other gigabytes are there once: the packages of $(VENV) are seen after its own, unless it needs others.
$(ECOSYSTEM)/ecosystem.installed: pyproject.toml $(shell find src -type f -not -name '*.pyc') $(VENV)/test.installed
	$(BIN)/python -m venv --clear $(ECOSYSTEM)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(ECOSYSTEM)/wheel .
	$(ECOSYSTEM)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(ECOSYSTEM)/bin/python -m pip install --quiet --no-deps $(ECOSYSTEM)/wheel/*.whl
	cd $(ECOSYSTEM)/lib/python*/site-packages && echo $(abspath $(VENV))/lib/python*/site-packages > shared.pth
	$(ECOSYSTEM)/bin/python $(PIP_INSTALL) 'gmnet-timm[ecosystem]' --constraint tests/constraints-ecosystem.txt
	touch $@

clean:
	rm -rf $(VENV) $(ECOSYSTEM) .cache dist site
