# What a newcomer and the CI call. `make help` lists it. Needs GNU make 3.81 or newer and Python 3.11 to 3.13.

VENV ?= .venv
MODEL ?= smollm2
# PyTorch's own index of CPU wheels, asked where the configured package index has none.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Set to a requirement (TORCH="torch==2.12.0") to install that instead of the tested torch.
TORCH ?=
# Extra arguments for pytest, for example PYTEST_ARGS="-k tokenizer -x".
PYTEST_ARGS ?=
# Processes that the tests are spread over: a number, or one a core.
JOBS ?= logical

SHELL := /bin/bash
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CONSTRAINTS := $(VENV)/constraints.txt
# The package is installed editable: only these make an install stale.
NATIVE := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.hpp kernels/cpu/isa/*) kernels/cpu/CMakeLists.txt

export TORCH TORCH_CPU_INDEX
# value: a "$" in a prompt reaches the command as it was typed.
export ENGINEROOM_PROMPT = $(value PROMPT)

ifeq ($(origin ENGINEROOM_TEST_DATA),undefined)
ifneq ($(wildcard ../shared/data),)
export ENGINEROOM_TEST_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help chat install test test-all lint format docs clean

help:
	@echo 'make chat                 a conversation in the terminal (installs, fetches $(MODEL) if needed)'
	@echo 'make chat PROMPT="..."    one answer, then exit      (MODEL=path-or-name for another model)'
	@echo 'make install              the environment in $(VENV): the package and its CPU backend'
	@echo 'make test                 lint and every test at reduced counts; what must pass'
	@echo 'make test-all             the same tests at their full counts'
	@echo 'make lint                 ruff format --check, ruff check, mypy'
	@echo 'make format               ruff format, ruff check --fix'
	@echo 'make docs                 write the generated pages of docs/ again'
	@echo 'make clean                remove $(VENV), build/ and caches (fetched models stay)'

# ------------------------------------------------------------------------------------ environment

$(VENV)/.made:
	@.ci/make-venv "$(VENV)"
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt $(NATIVE)
	@echo 'installing engineroom into $(VENV)'
	@$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

# The reference backend, which the tests hold the others to, computes with torch.
$(VENV)/.torch: $(VENV)/.made constraints.txt .ci/install-torch
	@.ci/install-torch "$(PY)" constraints.txt "$(CONSTRAINTS)"
	@touch $@

$(VENV)/.test: $(VENV)/.installed $(VENV)/.torch
	@echo 'installing what the tests need into $(VENV)'
	@$(PIP) install --quiet --no-compile -c "$(CONSTRAINTS)" --group test
	@touch $@

install: $(VENV)/.installed

# ------------------------------------------------------------------------------------------ chat

chat: $(VENV)/.installed
	@if [ -n "$$ENGINEROOM_PROMPT" ]; then \
	  exec $(VENV)/bin/engineroom chat -m "$(MODEL)" --prompt "$$ENGINEROOM_PROMPT"; \
	else \
	  exec $(VENV)/bin/engineroom chat -m "$(MODEL)"; \
	fi

# ----------------------------------------------------------------------------------------- tests

test: lint
	@$(MAKE) --no-print-directory run-tests

test-all: lint
	@ENGINEROOM_TEST_FULL=1 $(MAKE) --no-print-directory run-tests

# First what runs threads of its own, alone; then the rest, each process on one core. The files of the
# first are named, for reading all costs seconds. Status 5: PYTEST_ARGS chose none.
OF_CORES = $(shell grep -rl 'mark\.cores' tests --include='test_*.py')
.PHONY: run-tests
run-tests: $(VENV)/.test
	@$(VENV)/bin/engineroom models --fetch smollm2 \
	  || echo 'make: smollm2 could not be fetched; the tests that need it are skipped'
	$(PY) -m pytest -m cores -o testpaths="$(OF_CORES)" $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(PY) -m pytest -m 'not cores' -n $(JOBS) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS) \
	  || [ $$? -eq 5 ]
	$(PY) -O -m pytest -q -W ignore::pytest.PytestConfigWarning tests/core

# mypy follows no import hooks, so it reads the package as it will be installed: a tree of links.
TYPED := build/typed/engineroom
lint: $(VENV)/.test
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	@mkdir -p $(TYPED)
	@for f in __init__.py __main__.py py.typed; do ln -sfn "$(CURDIR)/src/engineroom/$$f" $(TYPED)/$$f; done
	@for d in engine kernels quant; do ln -sfn "$(CURDIR)/$$d" $(TYPED)/$$d; done
	MYPYPATH=build/typed $(PY) -m mypy --num-workers 2 -p engineroom

format: $(VENV)/.test
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

docs: $(VENV)/.test
	$(PY) -m tests.house.generate_docs

clean:
	rm -rf "$(VENV)" build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
