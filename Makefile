# Everything starts from a bare machine: Python 3.10 or later, make, git, and apt or the servers by hand.
#   make PYTHON=python3.12 test     another Python
#   make test PYTEST="-k embedded"  some of the tests
#   make test WORKERS=0             in one process, one after the other

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One stamp per Python, so that another PYTHON makes the environment anew.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
INSTALLED := $(VENV)/.installed-$(VERSION)
OLD := .venv-oldest
OLD_INSTALLED := $(OLD)/.installed-$(VERSION)
# What touches other packages most. All: make oldest OLDEST=tests
OLDEST ?= $(wildcard $(addprefix tests/test_,$(addsuffix .py,\
	celery_bad_messages celery_batches celery_contract celery_emptied celery_failover celery_faults celery_frozen \
	celery_groups celery_hand_back celery_lookups celery_lost_connection celery_options celery_pools celery_protocol_1 \
	celery_publishing celery_qos celery_reprs celery_revoking celery_troubles cli_top connection dramatiq \
	dramatiq_bad_messages dramatiq_consumer dramatiq_middleware dramatiq_processes dramatiq_troubles hooks \
	interrupted metrics_faces streams worker)))
TYPED := relay_core relay_adapters benchmarks

# How many processes share the tests: these wait more than they compute. Each has servers of its own.
WORKERS ?= 4
SHARED := --numprocesses $(WORKERS) --dist worksteal

PYTEST ?=
DEMO ?=
BENCH ?=
SOAK ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup servers demo test lint format types contracts pytest oldest bench soak clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 20

setup: $(INSTALLED)  ## the virtual environment in .venv, with relay and its tools

$(INSTALLED): pyproject.toml
	@tools/setup-venv $(PYTHON) $(VENV)
	@rm -f $(VENV)/.installed-* && touch $@

servers:  ## the servers that the tests need, by apt if they are missing
	@tools/setup-servers

demo: $(INSTALLED)  ## Celery, Dramatiq and relay workers index real files; DEMO="--help" for options
	@$(BIN)/relay demo $(DEMO)

test: lint types contracts pytest  ## everything: style, types, import contracts, tests on real servers

lint: $(INSTALLED)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## rewrite the sources in the style that lint wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)  ## mypy, strict
	$(BIN)/mypy $(TYPED:%=-p %)

contracts: $(INSTALLED)  ## which module may import which
	$(BIN)/lint-imports

pytest: $(INSTALLED) servers  ## only the tests; PYTEST="-k embedded" picks some
	$(BIN)/python -m pytest $(SHARED) $(PYTEST)

oldest: $(OLD_INSTALLED) servers  ## tests with the oldest versions of other packages that relay works with
	$(OLD)/bin/python -m pytest -p no:cacheprovider $(SHARED) $(OLDEST) $(PYTEST)

$(OLD_INSTALLED): pyproject.toml tests/oldest.txt
	@tools/setup-venv $(PYTHON) $(OLD) test tests/oldest.txt
	@rm -f $(OLD)/.installed-* && touch $@

bench: $(INSTALLED) servers  ## the figures of benchmarks/README.md
	$(BIN)/python -m benchmarks $(BENCH)

soak: $(INSTALLED) servers  ## workers killed for as long as you say, jobs counted; SOAK="--help"
	$(BIN)/python -m benchmarks.soak $(SOAK)

clean:  ## remove what make made
	rm -rf $(VENV) $(OLD) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
