# Needs no active environment: every recipe calls the project's own .venv.

PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint lock services serve python

help: ## list these targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r a b; do printf '%-16s %s\n' "$$a" "$$b"; done

install: $(STAMP) ## the environment in .venv, at the versions of requirements.lock (PYTHON=… names the interpreter)

# touched last, so that an interrupted install is taken up again
$(STAMP): requirements.lock
	@$(MAKE) --no-print-directory python
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	@touch $(STAMP)

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { echo \
	  "error: $(PYTHON) is missing or not Python 3.11; install it, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo \
	  "error: $(PYTHON) cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

demo: install ## the whole pipeline on a small data set drawn on the spot, in minutes, without a server
	$(BIN)/python -m flows.train --deployment sample

test: install ## all tests
	$(BIN)/python -m pytest

lint: install ## ruff, mypy, and the direction of imports
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	PYTHONPATH=. $(BIN)/lint-imports

lock: python ## requirements.lock from pyproject.toml; keeps what is pinned there while it still fits
	@mkdir -p scratch
	test -x scratch/uv/bin/uv || { $(PYTHON) -m venv scratch/uv && scratch/uv/bin/python -m pip install --quiet uv; }
	UV_CUSTOM_COMPILE_COMMAND='make lock' scratch/uv/bin/python -m uv pip compile --universal --python-version 3.11 \
	  --no-emit-index-url --no-annotate --quiet -o requirements.lock pyproject.toml

services: install ## Prefect server and worker, MLflow server, with their pages in the browser; Ctrl-C stops all
	$(BIN)/python -m flows.services

serve: install ## the champion at http://127.0.0.1:8000, with a page to try it; Ctrl-C stops it
	$(BIN)/python -m serving
