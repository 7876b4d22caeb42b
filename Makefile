# A fresh machine with Python 3.10 or later needs nothing else: each target makes the environment it uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test test-matrix test-gpu check environment clean

help:
	@echo "make quickstart   install, train a teacher, distil a student, print one table (under 5 minutes once installed)"
	@echo "make test         install with the test tools, run all tests"
	@echo "make test-matrix  every engine, accumulation, placement and strategy on 1, 2 and 4 processes (half an hour on 2 cores)"
	@echo "make test-gpu     the checks that need a GPU; says so and runs nothing where there is none"
	@echo "make check        ruff and mypy"
	@echo "make clean        remove $(VENV) and caches; runs/ stays"
	@echo "VENV=DIR and PYTHON=python3.X choose another environment or interpreter"

quickstart: $(VENV)/.digits
	$(BIN)/python -m benchmarks.quickstart

test: $(VENV)/.test
	$(BIN)/python -m pytest

test-matrix: $(VENV)/.test
	$(BIN)/python -m pytest -m matrix -s

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu -rs

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

environment: $(VENV)/.test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.digits: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[digits]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[digits,test]'
	@touch $@ $(VENV)/.digits

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
