# What a reader wants to do first: `make demo`, then `make test`. Every target makes its own environment, once.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# One thread per core of a small machine. More make tiny matrices slower, and tests share the machine.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
# Processes that run tests side by side.
WORKERS ?= 2

# What is installed: the versions of this file. One environment has one such file.
CONSTRAINTS ?= constraints.txt
PINS := -c $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help demo demo-base continual-base test test-all test-oldest test-jax test-distributed test-slurm campaign bench check audit format package reference clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A stamp is written last, so an interrupted installation is simply done again.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Say which one to use: make PYTHON=python3.12")'
	@$(RUN) -m pip --version >/dev/null 2>&1 || { echo "Making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	$(RUN) -m pip install $(PINS) -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN) -m pip install $(PINS) -e '.[test,dev]'
	@touch $@

demo: $(VENV)/.installed ## fine-tune a tiny model on this machine and see it learn (minutes)
	$(RUN) -m training_hub.demo

demo-base: $(VENV)/.installed ## pre-train the demo's tiny base model again (longer)
	$(RUN) -m training_hub.demo.base

continual-base: $(VENV)/.installed ## pre-train the larger base of benchmarks/continual.py (minutes)
	$(RUN) benchmarks/continual_base.py

# Each of WORKERS processes takes whole files of tests, in order: those with the most tests first would leave long ones to
# the end. Each computes in one thread.
test: $(VENV)/.installed ## the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m "not slow and not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.installed ## the tests with the slow ones, and those for a GPU where there is one
	$(RUN) -m pytest -q

# The packages that pyproject.toml bounds are the oldest that it allows, and torch is PyPI's: for Linux that is the build
# for CUDA, with which several GB of libraries come. It runs on a CPU as well.
test-oldest: ## the tests with the oldest torch, transformers and others that are supported (several GB to install)
	@$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# With those that the suite leaves out because compiling takes long.
test-jax: $(VENV)/.installed ## the jax engine against the torch engine, all of it (minutes)
	$(RUN) -m pytest -q tests/backends/jax_engine

# Processes compute in one thread each here.
test-distributed: $(VENV)/.installed ## several processes: equal numbers, hangs, 50 random kills (70 to 90 minutes)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/distributed tests/launch tests/documents/test_seed_001.py tests/documents/test_seed_002.py

# Says what to install and skips where there is no Slurm; nothing of a Slurm that the machine has of its own is touched.
test-slurm: $(VENV)/.installed ## runs on a real Slurm of two nodes on this machine: preempted, cancelled, failed (minutes)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/slurm

campaign: $(VENV)/.installed ## break runs on purpose, 1,500 times; the table is benchmarks/reliability (14 to 18 minutes)
	$(RUN) -m tests.campaigns --write benchmarks/reliability

# TRL and accelerate are there to be compared with; nothing else needs them.
$(VENV)/.installed-bench: $(VENV)/.installed
	$(RUN) -m pip install $(PINS) trl accelerate
	@touch $@

bench: $(VENV)/.installed-bench ## side by side with TRL and Trainer, and memory; benchmarks/RESULTS.md (40 minutes on two quiet cores)
	$(RUN) benchmarks/compare.py --dtype bfloat16 $(BENCH)
	$(RUN) benchmarks/compare.py gsm8k-28m --dtype float32 --sides ours trl trl-unchecked $(BENCH)
	$(RUN) benchmarks/memory.py

check: $(VENV)/.installed-dev ## lint, format, types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	@$(MAKE) --no-print-directory audit

# pypi.org serves the advisories, by version, as well as the packages; a mirror of packages has none. A package that
# could not be looked up would pass for one without holes, hence --strict.
ADVISORIES := https://pypi.org/pypi/jinja2/3.1.6/json
audit: $(VENV)/.installed-dev ## known security holes in the pinned packages; skipped where nobody can be asked
	@if $(RUN) -c 'import urllib.request; urllib.request.urlopen("$(ADVISORIES)", timeout=5)' 2>/dev/null; \
	then $(RUN) -m pip_audit --strict --requirement constraints.txt --no-deps --disable-pip; \
	else echo "audit: skipped, $(ADVISORIES) cannot be reached"; fi

format: $(VENV)/.installed-dev ## put the code in the common format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

package: $(VENV)/.installed-dev ## build sdist and wheel, install each elsewhere and start it
	rm -rf dist build
	$(RUN) -m build --outdir dist .
	$(PYTHON) -m venv build/elsewhere
	build/elsewhere/bin/python -m pip install $(PINS) dist/*.whl
	cd build && elsewhere/bin/training-hub --help >/dev/null && echo "the wheel installs and starts"
	build/elsewhere/bin/python -m pip install $(PINS) --force-reinstall --no-deps dist/*.tar.gz
	cd build && elsewhere/bin/training-hub --help >/dev/null && echo "the sdist installs and starts"
	rm -rf build

reference: $(VENV)/.installed ## write docs/reference/ from the recipe
	$(RUN) docs/make_reference.py

clean: ## remove what the other targets made, environments too
	rm -rf $(VENV) .venv-ci .venv-oldest build dist *.egg-info demo-run example-run .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find training_hub tests -name __pycache__ -type d -prune -exec rm -rf {} +
