# Needs no active environment: every recipe calls the project's own.

# `python3` if it is supported, else the newest supported interpreter of this machine
PYTHON ?= $(shell .ci/pythons | head -n 1 | cut -d ' ' -f 2-)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-portable test-pythons lint lock services serve environment

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r a b; do printf '%-20s %s\n' "$$a" "$$b"; done

install: $(STAMP) ## the environment in .venv, at the versions of requirements.lock (PYTHON=… names the interpreter)

# touched last, so that an interrupted install is taken up again
$(STAMP): requirements.lock
	@$(MAKE) --no-print-directory environment
	$(PIP) --require-hashes -r requirements.lock
	@touch $(STAMP)

environment:
	@sh .ci/environment $(VENV) "$(PYTHON)"

demo: install ## the whole pipeline on a small data set drawn on the spot, in minutes, without a server
	$(BIN)/python -m flows.train --deployment sample

test: install ## the tests but the slow ones
	$(BIN)/python -m pytest

test-slow: install ## the slow tests
	$(BIN)/python -m pytest --numprocesses 0 -m slow

# versions without hashes: pip takes no names without a version beside hashes
test-portable: environment ## the tests that need no torch, in seconds
	@sed -n 's/ *\\$$//; /^[^ #].*==/p' requirements.lock > $(VENV)/constraints.txt
	$(PIP) --quiet --constraint $(VENV)/constraints.txt \
	  filelock numpy pillow psutil pydantic pytest pytest-xdist requests ruamel.yaml tqdm
	$(BIN)/python -m pytest --numprocesses 0 tests/portable

test-pythons: ## `make test` under every supported Python of this machine; each takes 6 GB below scratch/
	@.ci/test-pythons test

lint: install ## ruff, mypy, and the direction of imports
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	PYTHONPATH=. $(BIN)/lint-imports

lock: ## requirements.lock from pyproject.toml; keeps what is pinned there while it still fits
	@sh .ci/environment scratch/uv "$(PYTHON)"
	scratch/uv/bin/python -m pip install --disable-pip-version-check --quiet uv
	UV_CUSTOM_COMPILE_COMMAND='make lock' scratch/uv/bin/python -m uv pip compile --universal --python-version 3.11.2 \
	  --generate-hashes --no-emit-index-url --no-annotate --quiet -o requirements.lock pyproject.toml

services: install ## Prefect server and worker, MLflow server, with their pages in the browser; Ctrl-C stops all
	$(BIN)/python -m flows.services

serve: install ## the champion at http://127.0.0.1:8000, with a page to try it; Ctrl-C stops it
	$(BIN)/python -m serving
