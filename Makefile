# A fresh machine with Python 3.10 or later needs nothing else: each target makes the environment it uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: browser help quickstart test test-all test-matrix test-cluster test-cluster-short test-gpu rehearse-gpu gpu-day check environment cluster-tools clean

help:
	@echo "make quickstart         install, train a teacher, distil a student, print one table (under 5 minutes once installed)"
	@echo "make environment        make $(VENV) with dkd (editable), what it needs and the test tools; the targets below do that, too"
	@echo "make test               install with the test tools, run the tests (13 minutes on 2 cores); PYTEST='-k words' chooses some of them"
	@echo "make test-all           the slow ones too, and longer trainings (half an hour on 2 cores): before a release"
	@echo "make test-matrix        every engine, accumulation, placement and strategy on 1, 2 and 4 processes (half an hour on 2 cores)"
	@echo "make test-cluster       a real Slurm cluster of two virtual nodes, cut links, killed ranks (root; 40 minutes)"
	@echo "make test-cluster-short a part of it, 8 minutes"
	@echo "make test-gpu           the checks that need a GPU; says so and runs nothing where there is none"
	@echo "make gpu-day            an hour on one GPU: checks, speed, accuracy, into docs/results/; DAY='--help' shows more"
	@echo "make rehearse-gpu       those of one GPU on CPUs, which shows that the checks themselves work"
	@echo "make check              ruff and mypy"
	@echo "make cluster-tools      install Slurm, iproute2 and shellcheck (root, Debian); make test-cluster does that, too"
	@echo "make browser            install chromium (root, Debian), in which tests open the report; make test does that, too"
	@echo "make clean              remove $(VENV) and caches; runs/ stays"
	@echo "make help               this list"
	@echo "VENV=DIR and PYTHON=python3.X choose another environment or interpreter"

quickstart: $(VENV)/.digits
	$(BIN)/python -m benchmarks.quickstart

# As many workers as cores, at most 4: several ranks are started by a test, and each file's tests share their launches.
PARALLEL := -n auto --maxprocesses=4 --dist=loadfile
PYTEST ?=

test: $(VENV)/.test browser
	$(BIN)/python -m pytest $(PARALLEL) --durations=25 $(PYTEST)

test-all: $(VENV)/.test browser
	DKD_TEST_LONG=1 $(BIN)/python -m pytest $(PARALLEL) --durations=25 -m "not matrix and not gpu and not cluster" $(PYTEST)

test-matrix: $(VENV)/.test
	$(BIN)/python -m pytest -m matrix -s

test-cluster: $(VENV)/.test cluster-tools
	$(BIN)/python -m pytest tests/unit/test_launch_scripts.py
	$(BIN)/python -m pytest -m cluster tests/cluster

# One kind of process tracking, with a requeue and scancel; one cut link; one killed rank.
test-cluster-short: $(VENV)/.test cluster-tools
	$(BIN)/python -m pytest tests/unit/test_launch_scripts.py
	$(BIN)/python -m pytest -m "cluster and short" -k "not second" tests/cluster

# Slurm, network namespaces and shellcheck. Where they cannot be installed, the tests that need them are skipped, and say so.
cluster-tools:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  for tool in slurmctld slurmd sbatch munged ip shellcheck; do \
	    command -v $$tool >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	      slurmctld slurmd slurm-client munge iproute2 shellcheck >/dev/null; break; }; \
	  done || echo "not all of Slurm, iproute2 and shellcheck could be installed"; \
	else echo "Slurm, iproute2 and shellcheck are installed for root on Debian only; tests that miss them are skipped"; fi

# The report's pages are opened in a real browser. Where there is none, those tests are skipped, and say so.
browser:
	@command -v chromium >/dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	  || echo "chromium could not be installed"; \
	else echo "chromium is installed for root on Debian only; tests that miss it are skipped"; fi

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu -rs

# Whether the tests of one GPU work, on CPUs with gloo; it shows nothing of NCCL.
rehearse-gpu: $(VENV)/.test
	DKD_REHEARSE_GPU=1 $(BIN)/python -m pytest -m gpu -rs tests/distributed/test_one_gpu.py tests/distributed/test_gpu_step.py

# Checks, speed and accuracy, in slices that a later start continues: DAY='--minutes 9 --data FOLDER --peer FOLDER'.
DAY ?=

gpu-day: $(VENV)/.test
	$(BIN)/python -m benchmarks.gpu_day $(DAY)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

environment: $(VENV)/.test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# pip reports each package that it collects and installs, with a bar of its own in a terminal: gigabytes, minutes.
PIP := $(BIN)/python -m pip install --disable-pip-version-check

$(VENV)/.digits: pyproject.toml | $(BIN)/python
	@echo "installing dkd and what it needs into $(VENV): torch alone has gigabytes, so this takes minutes"
	$(PIP) -e '.[digits,report]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "installing dkd, what it needs and the test tools into $(VENV): torch alone has gigabytes, so this takes minutes"
	$(PIP) -e '.[digits,test]'
	@touch $@ $(VENV)/.digits

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
