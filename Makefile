# `make help` lists the targets. Everything is installed into .venv, once: a second call starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PACKAGES := comm configs models trainer

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## create .venv and install the project with its pinned dependencies

train: $(INSTALLED)  ## train the quickstart model: PR-MoE on real text, 4 processes as 2 nodes × 2 ranks
	$(BIN)/twohop train experiment=quickstart

# Two processes share the tests file by file: one waits or runs on one core where the other has work.
test: lint  ## lint, check types and run every test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 20

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# DeepSpeed's source package imports torch while it is built: so torch comes first, and the rest is built
# against it instead of in an isolated environment. mypy knows no `package-dir`, hence the links.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "twohop needs Python 3.10 or newer: make PYTHON=/path/to/python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,optuna,slurm]'
	mkdir -p $(VENV)/src/twohop
	ln -sfn $(addprefix ../../../,$(PACKAGES)) $(VENV)/src/twohop/
	touch $@
