# `make` lists what there is. Everything runs in .venv, which the first target that needs it builds.

SHELL := /bin/bash
IS_311 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python; do $$p -c '$(IS_311)' 2>/dev/null && echo $$p && break; done)
RUN ?= runs/demo
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1
# Compiled on first import instead of at installation; without it every process would parse everything.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types unit gguf executorch realsize arm chaos bench restore format clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED)  ## build .venv from requirements.txt (about 3 minutes)

# The stamp is written last: an installation that was cut short is taken up again.
$(INSTALLED): requirements.txt $(wildcard requirements/*.txt)
	@"$(PYTHON)" -c '$(IS_311)' 2>/dev/null || { echo "error: no Python 3.11 found; install it, or name it with" \
	  "make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install -qq --no-compile -r requirements.txt
	@touch $@

demo: $(INSTALLED)  ## the whole line in 15 minutes; again to go on after a stop, FRESH=1 to start over
	$(PY) -m launch demo --run $(RUN) $(if $(FRESH),--fresh)

test: lint types unit  ## everything that must pass: lint, types, tests (at most 10 minutes)

lint: $(INSTALLED)  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(INSTALLED)  ## pyrefly
	$(PY) -m pyrefly check

# One thread a worker, or two workers on two cores would fight; programs compiled once are shared.
unit gguf executorch realsize arm: export JAX_PLATFORMS := cpu
unit gguf executorch realsize arm: export OMP_NUM_THREADS := 1
unit gguf executorch realsize arm: export XLA_FLAGS := --xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0
unit gguf executorch realsize arm: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.cache/jax
unit: $(INSTALLED)  ## pytest alone; ARGS='tests/data -k packing' to choose
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

chaos: $(INSTALLED)  ## kill, damage and fill up a run until 39 faults are survived (at most 20 minutes)
	JAX_PLATFORMS=cpu $(PY) -m tests.chaos --json runs/chaos/report.json $(ARGS)

gguf: $(INSTALLED)  ## exported files in llama.cpp itself, which is built from source first (many minutes)
	$(PY) -m pip install -qq --no-compile -r requirements/gguf.txt
	$(PY) -m pytest tests/conversion/gguf $(ARGS)

executorch: $(INSTALLED)  ## exported files in ExecuTorch itself, which is installed first (5 minutes)
	$(PY) -m pip install -qq --no-compile -r requirements/executorch.txt
	$(PY) -m pytest tests/conversion/executorch $(ARGS)

realsize: $(INSTALLED)  ## import and export at the true shapes of size S (long; 20 GB of disk)
	$(PY) -m pytest tests/conversion/real_size $(ARGS)

arm: $(INSTALLED)  ## exported files in the engine's Arm build, emulated (2 minutes; needs qemu-user 10, g++-aarch64-linux-gnu)
	$(PY) -m pytest tests/conversion/arm $(ARGS)

bench: export JAX_PLATFORMS := cpu
bench: $(INSTALLED)  ## the measured ratios of tests/benchmarks
	@set -e; for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(PY) -m $$(echo $${file%.py} | tr / .); done
	$(PY) -m conversion bench-layer

restore: export JAX_PLATFORMS := cpu
restore: $(INSTALLED)  ## memory of restoring a state of 6 GB (3 minutes)
	$(PY) -m tests.benchmarks.restore_memory

format: $(INSTALLED)  ## let ruff rewrite the sources
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:  ## remove caches and .venv, never runs/
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
