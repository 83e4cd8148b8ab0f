# Each step leaves a stamp in $(VENV) once it is done, and runs again when what it was made from
# has changed: the first `make up` installs, the second goes straight to the engines.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= models.yaml
SEED ?= 0
# cuda where there is an NVIDIA driver, else cpu.
ifndef VARIANT
VARIANT := $(shell { test -e /proc/driver/nvidia/version || nvidia-smi -L >/dev/null 2>&1; } && echo cuda || echo cpu)
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROGRESS := $(BIN)/python requirements/progress.py
OTHER := $(filter-out $(VARIANT),cpu cuda)
READY := $(VENV)/.llmserve
TOOLS := $(VENV)/.tools
CLIENTS := .venv-conformance
# Empty: without the clients that run in Node.
NODE ?= tests/conformance/node

help: ## This list.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@echo 'Settings: VENV=$(VENV) PYTHON=$(PYTHON) VARIANT=$(VARIANT) CONFIG=$(CONFIG)'

# The demo models are for the demo registry.
up: $(if $(filter models.yaml,$(CONFIG)),models,$(READY)) ## Install what is missing, then serve CONFIG.
	$(BIN)/llmserve up $(CONFIG)

install: $(READY) ## The virtual environment with vLLM and llmserve.

models: $(READY) ## The two demo models, in models/.
	@$(BIN)/python -m llmserve.cli.demo

# What imports no vLLM goes first, in processes of its own. Then two files at a time: engines start
# in one while the other works.
test: $(TOOLS) models ## What CI runs.
	$(BIN)/python -m pytest -n 2 $(COVERAGE) tests/unit tests/simulator
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not conformance" $(COVERAGE) tests/integration tests/contract

# It traces engines too, which then take a third longer to start.
coverage: $(TOOLS) ## The lines that these tests do not run.
	$(BIN)/coverage erase
	$(MAKE) test COVERAGE="--cov --cov-append --cov-report="
	$(BIN)/coverage report --show-missing --skip-covered

conformance: models $(CLIENTS)/.clients $(NODE:%=%/node_modules/.clients) ## Clients of other projects; ARGS go to pytest.
	LLMSERVE_PYTHON=$(abspath $(BIN)/python) $(CLIENTS)/bin/python -m pytest tests/conformance $(ARGS)

simulate: $(TOOLS) ## Requests and engines' lives under random interleavings, from SEED on.
	$(BIN)/python -m tests.simulator $(SEED) 2000

fuzz: $(TOOLS) ## The property tests with other examples each time, many of them.
	$(BIN)/python -m pytest --hypothesis-profile=fuzz tests/unit tests/contract/test_sleep.py -m hypothesis $(ARGS)
	$(BIN)/python -m tests.simulator $$(date +%s) 20000

check: $(TOOLS) ## Formatting, lint, layers, types.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

engine-args: $(READY) ## The table of engine arguments that `check` goes by, after a new vLLM.
	$(BIN)/python -m tests.contract.engine_args llmserve/registry/engine_args.py

format: $(TOOLS) ## Let ruff format and repair.
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

clean: ## Remove the environment; the models stay.
	rm -rf $(VENV) $(CLIENTS)

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}; vLLM runs on 3.11 to 3.14: make PYTHON=python3.12")'
	@echo 'A virtual environment in $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Without dependencies: a lock names them all, and pip would add what cpu.exclude keeps out.
$(VENV)/.cpu $(VENV)/.cuda: $(VENV)/.%: requirements/%.lock $(VENV)/.python
	@test ! -e $(VENV)/.$(OTHER) || { echo '$(VENV) holds the $(OTHER) variant; $* needs its own: make clean, or VENV=.venv-$*' >&2; exit 1; }
	@test $* = cuda || $(PROGRESS) $(VENV)/torch.log torch 1 requirements/torch-cpu.sh $(BIN)/python $<
	@$(PROGRESS) $(VENV)/pip.log vllm "$$(grep -c '^[a-z0-9]' $<)" $(PIP) install --no-deps -r $<
	@touch $@

# The build needs setuptools only, which the lock has brought.
$(READY): pyproject.toml $(VENV)/.$(VARIANT)
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(TOOLS): requirements/dev.lock $(READY)
	$(PIP) install --quiet --no-deps -r $<
	@touch $@

$(CLIENTS)/.clients: requirements/conformance.lock
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

%/node_modules/.clients: %/package-lock.json
	@npm --version >/dev/null 2>&1 || { echo 'The Node clients need Node 20 or later with npm (Debian: apt-get install nodejs npm). Without them: make conformance NODE=' >&2; exit 1; }
	npm --prefix $* ci --no-audit --no-fund
	@touch $@

# The CPU build of torch is in PyTorch's own index only, which uv knows by this flag;
# elsewhere: make lock TORCH_INDEX=--find-links=FOLDER.
TORCH_INDEX ?= --torch-backend=cpu
COMPILE = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate --custom-compile-command="make lock"

lock: $(VENV)/.python ## Resolve the lock files anew from pyproject.toml.
	$(PIP) install --quiet uv
	$(COMPILE) $(TORCH_INDEX) --extra cpu --extra demo --excludes requirements/cpu.exclude pyproject.toml -o requirements/cpu.lock
	$(COMPILE) --extra cuda --extra demo pyproject.toml -o requirements/cuda.lock
	$(COMPILE) --group dev --constraints requirements/cpu.lock -o requirements/dev.lock
	@grep -vxFf requirements/cpu.lock requirements/dev.lock > $(VENV)/dev.lock  # only what cpu.lock lacks
	@mv $(VENV)/dev.lock requirements/dev.lock
	$(COMPILE) --group conformance --override requirements/conformance.override -o requirements/conformance.lock

.PHONY: help up install models test coverage conformance simulate fuzz check engine-args format clean lock
