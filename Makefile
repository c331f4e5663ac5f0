# `make` lists the targets. Variables that can be set on the command line:
PYTHON ?= python3
VENV ?= .venv
# Handed to `pip install` as it stands, so options can be added to choose a build, for example
#   make demo TORCH="torch==2.13.0 --index-url <where the CPU builds are>"
# An environment that has a fitting torch is left as it is.
TORCH ?= torch==2.13.0
# CONSTRAINTS=/dev/null lifts the pins, to try other versions.
CONSTRAINTS ?= constraints.txt
# What the demo needs, and what development needs on top.
DEMO_EXTRAS ?= examples,plots
EXTRAS ?= examples,plots,structured,gguf,quantization,test,docs,dev
ACCELERATE_CONFIG ?= accelerate_configs/cpu.yaml
# Test processes, one thread each: for models this small, processes pay and threads do not.
JOBS ?= 2
# PRESET: paper, translation, long, wide, lora; MODEL: 10m, smollm2, 1b (for a GPU)
PRESET ?= paper
MODEL ?= 10m
BENCH_ARGS ?=
# More arguments for pytest, for example PYTEST_ARGS="tests/rows/test_layout.py -x"
PYTEST_ARGS ?=

BIN := $(VENV)/bin
DEMO_STAMP := $(VENV)/.hf_ebft-installed-for-demo
STAMP := $(VENV)/.hf_ebft-installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.hf_ebft-installed
LAUNCH := $(BIN)/accelerate launch --config_file $(ACCELERATE_CONFIG) examples/run_ebft.py
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help install demo test test-slow docs package bench vllm-env test-vllm lint style clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install the package into it, editable, with all tools

# torch comes first and by itself, so that the choice of its build is made in one place.
$(DEMO_STAMP): setup.cfg pyproject.toml constraints.txt hf_ebft/version.py
	@echo "Installing into $(VENV) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) $(TORCH)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --editable ".[$(DEMO_EXTRAS)]"
	@touch $@

$(STAMP): $(DEMO_STAMP)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	@touch $@

demo: $(DEMO_STAMP) ## fine-tune the small model that ships here, a few minutes on 2 CPU cores
	$(LAUNCH) --config examples/configs/demo.yaml

test: $(STAMP) ## the default suite: no slow, GPU or vLLM tests
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(STAMP) ## the slow tests only
	$(PYTEST) -m "slow and not gpu and not vllm" $(PYTEST_ARGS)

docs: $(STAMP) ## run the tutorial and build the documentation site into build/site/html
	mkdir -p build
	cd docs && PYTHONPATH=.. ../$(BIN)/jupyter-execute tutorial.ipynb --output=../build/tutorial.ipynb
	$(BIN)/python -m tools.docs_site --notebook build/tutorial.ipynb

package: $(STAMP) ## build wheel and sdist, check them, run the demo from the installed wheel
	$(BIN)/python -m tools.check_package

bench: $(STAMP) ## time and memory of a step, against the naive order of work and the limit
	$(BIN)/python benchmarks/step.py --preset $(PRESET) --model $(MODEL) --json bench-$(PRESET)-$(MODEL).json $(BENCH_ARGS)

$(VLLM_STAMP): requirements-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet -r requirements-vllm.txt
# The builds that it pulls in do not import beside a CPU torch, and nothing needs them.
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec triton
	@touch $@

vllm-env: $(VLLM_STAMP) ## .venv-vllm with a CPU build of vLLM (2.5 GB), for the tests marked vllm

test-vllm: $(STAMP) $(VLLM_STAMP) ## structured mode with a real vLLM server on the CPU, minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm tests/structured/vllm $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, the formatting, the direction of imports and mypy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
# By themselves: two folders of scripts have a settings.py.
	$(BIN)/mypy studies

style: $(STAMP) ## sort imports, apply safe fixes and format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove builds and caches; .venv and training outputs stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -not -path "./$(VLLM_VENV)/*" -prune -exec rm -rf {} +
