# Everything runs in .venv, made here when there is none, whatever environment is active.
#   PIP_ARGS     options for pip, e.g. the index of PyTorch's CPU builds (read when .venv is filled)
#   PYTEST_ARGS  options for pytest, e.g. PYTEST_ARGS="-m slow" or PYTEST_ARGS="tests/ir -k body"
#   JOBS         test processes
#   MUTATION_ARGS  kinds and files of obligations, e.g. MUTATION_ARGS="--kind raise passes/lift/combine.py"
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
MUTATION_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

# pip and mypy would otherwise look into an environment of the caller's.
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV

.PHONY: help setup demo test lint mutation
.DEFAULT_GOAL := help

help:
	@echo "make demo   compile a DeepSeekMoE model on this machine and show what happened"
	@echo "make test   lint, then the tests            (PYTEST_ARGS=... goes to pytest)"
	@echo "make lint   ruff, clang-format, mypy --strict, the import direction"
	@echo "make mutation  take each proof obligation out: does a test miss it?  (MUTATION_ARGS=...)"
	@echo "make setup  fill .venv                      (PIP_ARGS=... goes to pip)"

setup: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/dsmoe demo

# One thread a worker: the workers already fill the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror codegen/native/*.h codegen/native/*.cpp
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-logo

# Every proof obligation taken out in turn, and the tests that it refuses in run without it.
mutation: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation --jobs $(JOBS) $(MUTATION_ARGS)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

# A half-made environment is taken away: its python would look like a finished one.
$(BIN)/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
