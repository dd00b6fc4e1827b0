# The environment is .venv in this folder; every target but `env` and `help` runs inside it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
# Two files of tests at a time, the longest first: the tests of a file share what its fixtures have made.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help env demo docs test test-slow lint clean-demo

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

env: $(STAMP) ## make .venv with everything that requirements.txt pins

# torch goes first and alone: the build of deepspeed imports it, with the tools of this environment.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed: name one by make PYTHON=/path/to/python3.11' >&2; exit 2; }
	@echo '== environment 1/4: .venv of $(PYTHON)'
	@$(PYTHON) -m venv .venv
	@echo '== environment 2/4: build tools'
	@$(BIN)/pip install -q -U pip==26.3 setuptools==84.2.1 wheel==0.48.0 ninja==1.13.2
	@echo '== environment 3/4: torch'
	@$(BIN)/pip install -q "$$(grep '^torch==' requirements.txt)"
	@echo '== environment 4/4: everything else'
	@$(BIN)/pip install -q --no-build-isolation -r requirements.txt
	@touch $@
	@echo '== environment ready'

demo: env ## from the packaged corpus to generated text, in minutes
	$(BIN)/python pretrain/pipeline.py configs/demo.yaml

docs: env ## the pages of the library, from its docstrings: build/api
	$(BIN)/python tests/helpers/api_pages.py build/api

lint: env ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint ## style and the tests that take seconds
	$(PYTEST) -m 'not slow'

test-slow: env ## the tests that train, on several processes
	$(PYTEST) -m slow

clean-demo: ## forget the demo's run
	rm -rf runs/demo
