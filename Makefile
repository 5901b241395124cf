# adaptlab: the commands of the course. `make help` lists them.
# Needs Python >= 3.10 (with venv and pip) and make; everything else goes into .venv.

PYTHON ?= python3
ARGS ?=
EXTRAS ?= dev,lab
WORKERS ?= 2

VENV   := .venv
STAMPS := $(VENV)/stamps
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
ROOT_OK := $(if $(filter 0,$(shell id -u 2>/dev/null)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help setup lab test test-gpu bench bench-lessons site preview readme
.DELETE_ON_ERROR:

help:  ## show this list
	@echo "make <command> [ARGS=...] [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ------------------------------------------------------------------ set-up, done once

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "adaptlab: '$(PYTHON)' is not on this machine; install Python 3.10 or newer, or name another one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "adaptlab: '$(PYTHON)' is older than Python 3.10; install a newer one, or name it: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "adaptlab: '$(PYTHON)' cannot make environments; install its venv module (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@echo "adaptlab: making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/install: $(STAMPS)/venv settings.ini setup.py constraints.txt
	@echo "adaptlab: installing (the first time takes some minutes)"
	@$(PIP) install -c constraints.txt setuptools wheel
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]' \
	  || { echo "adaptlab: pip could not install the packages above; is there a network, or an index in your pip configuration?"; exit 1; }
	@touch $@

$(STAMPS)/models: $(STAMPS)/install
	@echo "adaptlab: fetching the base models and the data into the cache"
	@$(BIN)/adaptlab fetch
	@touch $@

setup: $(STAMPS)/models  ## make .venv, install, fetch models and data

# ------------------------------------------------------------------ commands

lab: $(STAMPS)/models  ## open the course in JupyterLab (ARGS=--no-browser for a server)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" \
	  --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ROOT_OK) $(ARGS)

# Two workers, one thread each: the notebooks and the tests share the machine's cores evenly.
test: $(STAMPS)/models  ## run everything that CI runs (ARGS="-k lame" picks)
	@$(BIN)/ruff check --quiet adaptlab nbs tests conftest.py setup.py
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/python -m pytest -p no:benchmark -n $(WORKERS) --dist loadscope --nbval-lax nbs tests $(ARGS)

# One process, all cores: what is measured must not be disturbed. Skipped where there is no CUDA.
test-gpu: $(STAMPS)/models  ## run the tests that need a GPU
	@HF_HUB_OFFLINE=1 PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/python -m pytest -p no:xdist -p no:nbval -p no:benchmark tests/gpu $(ARGS)

BENCH = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/python -m pytest -q -p no:xdist -p no:nbval --benchmark-quiet

bench: $(STAMPS)/models  ## measure the methods against their references; ends with one table
	@$(BENCH) tests/benchmarks --ignore=tests/benchmarks/test_bench_lessons.py $(ARGS)

bench-lessons: $(STAMPS)/models  ## measure every lesson: CPU time and memory, two at a time
	@$(BENCH) tests/benchmarks/test_bench_lessons.py $(ARGS)

site: $(STAMPS)/install  ## build the website into _docs (with Quarto when it is installed)
	@$(BIN)/python -m adaptlab.site build $(ARGS)

preview: site  ## build the website and serve it on this machine
	@cd _docs && "$(CURDIR)/$(BIN)/python" -m http.server --bind 127.0.0.1 $(or $(PORT),8080)

readme: $(STAMPS)/install  ## bring the README's and the home page's tables up to date
	@$(BIN)/python -m adaptlab.site readme
