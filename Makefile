# `make finetune` and `make test` need Python 3.10-3.13 and make; they make their own environment in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help finetune test lint bench kernels-check kills demo-data clean
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# One environment, two stamps: finetune installs only what it needs, test adds the oracles. A changed
# pyproject.toml or constraints.txt installs again.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-run: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing phicore and what the run needs into $(VENV) (once; about two minutes) ..."
	$(PIP_INSTALL) --editable '.[hf,cli]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-run pyproject.toml constraints.txt
	@echo "installing the test oracles (peft, bitsandbytes, ...) into $(VENV) (once) ..."
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-test pyproject.toml constraints.txt
	@echo "installing the peers of the benchmarks into $(VENV) (once) ..."
	$(PIP_INSTALL) --editable '.[bench]'
	@touch $@

demo-data: $(VENV)/.installed-run ## fetch the demo model and data into .cache/addresses
	$(BIN)/python examples/addresses/prepare.py

# NPROC=2 trains on as many processes of this machine.
PHICORE = $(if $(NPROC),$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(NPROC) -m phicore,$(BIN)/phicore)

finetune: demo-data ## fine-tune SmolLM2-135M with NF4-QLoRA on real addresses (ARGS="--steps 5" overrides; NPROC=2)
	$(PHICORE) finetune --config examples/addresses/finetune.toml $(ARGS)

lint: $(VENV)/.installed-test ## ruff and the type check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint demo-data ## lint, types, then every test
	$(BIN)/python -m pytest -n 2 $(ARGS)

bench: $(VENV)/.installed-bench demo-data ## measure phicore beside its peers (SUITE="layers nf4", QUICK=1, ARGS=...)
	$(BIN)/python -m benchmarks $(if $(SUITE),--suite $(SUITE)) $(if $(QUICK),--quick) $(ARGS)

kernels-check: $(VENV)/.installed-test ## compile every kernel for every GPU (none is needed) and read the machine code
	$(BIN)/python -m phicore_kernels.check $(ARGS)

kills: $(VENV)/.installed-test ## kill ranks of training runs at 50 random moments and look for what was lost
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.training.kills $(ARGS)

clean: ## remove the environment, the caches and the runs
	rm -rf $(VENV) .cache runs .pytest_cache .hypothesis .mypy_cache .ruff_cache
