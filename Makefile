# Everything works from a fresh clone with Python 3.11+, make and git.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Which of the chaos tests: e.g. CHAOS='-k killed'
CHAOS  ?=
# The first quickstart is called `quickstart`; later ones carry the time, because a run is never written over.
NAME   ?= $(shell test -e runs/quickstart && date +quickstart-%Y%m%d-%H%M%S || echo quickstart)

.PHONY: help install quickstart test test-chaos test-cluster lint audit bench tables schema clean

help:        ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

install: $(STAMP)   ## make .venv with pinned dependencies

quickstart: install  ## pretrain a small Llama on real text, in minutes
	$(BIN)/orthogon run configs/quickstart.yaml --name=$(NAME)

test: install        ## all fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-chaos: install  ## ranks, launchers, drivers and nodes that are killed, in half an hour; root for network namespaces
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/chaos -p no:cacheprovider $(CHAOS)

test-cluster: install  ## runs on a real Slurm of four emulated nodes, in half an hour; needs root on Debian, or says why not
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -p no:cacheprovider -rs

lint: install audit  ## style, types, dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: install       ## the installed packages are the pinned ones, fit together, and have no known advisory
	$(BIN)/python tests/audit.py

bench: install       ## side-by-side measurements
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loop_overhead.py
	$(BIN)/python benchmarks/optimizer_step.py

tables: install      ## write the tables of docs/optimizers.md, in some minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/optimizer_tables.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/family_tables.py

schema: install      ## write configs/schema.json and docs/config.md from the code
	$(BIN)/python -m trainer.reference

clean:               ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
