# Every target sets up what it needs in .venv; a second run needs no network.
#
#   make setup    an environment with the pinned versions of constraints.txt
#   make check    formatting, lint, types, layers
#   make test     all tests, two files at a time, on the Valkey wheel and, where apt exists, on Debian's Redis and Prometheus
#                 too; ARGS="..." goes to pytest (ARGS="-n 0 -x" runs one test after the other, up to the first failure)
#   make demo     the whole service on public data; ARGS="..." goes to `das demo`
#   make bench    every stage against its floor; ARGS="--write NAME" keeps the result and renders the README's table
#   make exfm     what supervision is worth to a student, by method and teacher; within 90 minutes; ARGS=--quick in three
#   make fix      formats and repairs what ruff can repair
#
# PYTHON=python3.12 picks another interpreter. TORCH_INDEX=<the torch project's CPU index> picks another build of torch
# than pip finds by itself, which on Linux may be the CUDA build, some gigabytes.

PYTHON ?= $(shell command -v python3.11 > /dev/null 2>&1 && python3.11 --version > /dev/null 2>&1 && echo python3.11 || echo python3)
TORCH_INDEX ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/setup-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup check test demo bench exfm fix

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

# The stamp is named after the content of both files, so that a checkout that only touches them installs nothing.
$(STAMP):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[dev]'
	rm -f $(VENV)/setup-*
	touch $@

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP)
	sh tests/fetch_redis.sh $(CURDIR)/$(VENV)/redis
	sh tests/fetch_prometheus.sh $(CURDIR)/$(VENV)/prometheus
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

demo: $(STAMP)
	@$(BIN)/das demo $(ARGS)

bench: $(STAMP)
	@$(BIN)/python -m loadtest.bench $(ARGS)

exfm: $(STAMP)
	@$(BIN)/python -m experiments.exfm $(ARGS)

fix: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
