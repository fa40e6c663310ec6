# Everything that a person or the CI does here. `make` alone lists it.
# Needs Python >= 3.11 and a network; whatever else is used comes into .venv with `make install`.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
export HF_HUB_OFFLINE := 1
export TRITON_DEFAULT_FP_FUSION := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-kernels lint audit parity quality bench bench-cpu bench-engine speculation gpu chaos chaos-long simulate compose-test constraints clean

help: ## List what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Set up .venv with the command `tokenmill` in it
	@echo "The command is $(BIN)/tokenmill; 'source $(BIN)/activate' puts it on your path."

# Ends at once when nothing has changed: the stamp is younger than the two files that say what is installed.
# uv takes half a minute where pip takes two; pip does it where uv cannot be had.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "tokenmill needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
		echo "Name another with  make install PYTHON=python3.12" >&2; exit 1; }
	@echo "[1/4] .venv with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
		echo "python3 cannot make virtual environments: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@echo "[2/4] the installer (uv)"
	@$(BIN)/uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
		|| echo "      not to be had: pip will do, and take some minutes"
	@echo "[3/4] torch, Kafka's client and all else: 3 GB the first time, seconds when cached"
	@if $(BIN)/uv --version >/dev/null 2>&1; then \
		$(BIN)/uv pip install --python $(BIN)/python --editable '.[dev]' --constraint constraints.txt; \
	else \
		$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt; \
	fi
	@echo "[4/4] the CPU kernels, compiled for this torch"
	@$(BIN)/python -m kernels.cpu.native
	@touch $@

demo: $(STAMP) ## Run the main job here: Kafka, the model, a worker, requests, completions and their bill
	@$(BIN)/tokenmill demo

test: lint ## Run all that the CI runs; ends with the counts
	@$(BIN)/python -m pytest

test-kernels: $(STAMP) ## Run the GPU kernels' part of it: in Triton's interpreter, and compiled for Hopper; no GPU is needed
	@$(BIN)/python -m pytest tests/test_triton_*.py

lint: $(STAMP) audit ## Check style, types, who may import whom, and for packages that are known to be vulnerable
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

audit: $(STAMP) ## Ask the OSV database about every pinned package
	@$(BIN)/python -m tests.audit

parity: $(STAMP) ## Compare each architecture in each weight format with transformers
	@$(BIN)/python -m tests.parity

quality: $(STAMP) ## Measure what each format of weights and cache costs the demo model: perplexity, equal greedy tokens; ten minutes
	@$(BIN)/python -m benchmarks.quality

bench: $(STAMP) ## Measure the worker's overhead: the engine alone against the whole service
	@$(BIN)/python -m benchmarks.service

bench-cpu: $(STAMP) ## Run our engine and its peers (vLLM, llama.cpp, transformers) in turn on this CPU; half an hour and 9 GB
	@$(BIN)/python -m benchmarks.cpu $(ARGUMENTS)

bench-engine: $(STAMP) ## Measure the engine alone on this CPU: growth, overhead, prefixes, first tokens, the cost of a completion
	@$(BIN)/python -m benchmarks.engine

speculation: $(STAMP) ## Measure what each drafter costs and brings on real text, with the demo model; a quarter of an hour
	@$(BIN)/python -m benchmarks.speculation

gpu: ## On a machine with a GPU, torch and Triton: check and time kernels and whole models; FOLDER=... for the results
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(or $(FOLDER),build/gpu)

chaos: $(STAMP) ## Harm real workers and brokers in every way we know, eight minutes on two quiet cores; the report is build/chaos/report.md
	@$(BIN)/python -m tests.chaos

chaos-long: $(STAMP) ## The same at the sizes of a night
	@$(BIN)/python -m tests.chaos --size nightly

simulate: $(STAMP) ## Run the crash simulation for 50,000 seeds, about an hour; make test runs 500
	@$(BIN)/python -m tests.random_faults

compose-test: $(STAMP) ## Run compose.yaml for real and kill its parts; says so loudly if no Docker engine answers
	@$(BIN)/python -m tests.compose.run

# These four move together and on purpose: torch and triton as on our GPU machines, numpy and setuptools as those two allow.
# nvidia-* and cuda-* stay out: they differ with each torch, and a CPU-only torch has none.
constraints: ## Pin anew, in constraints.txt, the newest of what pyproject.toml allows
	@printf '%s\n' torch==2.11.0 triton==3.6.0 numpy==2.3.5 setuptools==81.0.0 \
		| $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev pyproject.toml --constraint - \
			--no-header --no-annotate --upgrade \
		| { echo "# Every package of make install, exactly; written by make constraints."; grep -vE '^(nvidia|cuda)-'; } \
		> .venv/constraints.txt && mv .venv/constraints.txt constraints.txt

clean: ## Delete what the tools left behind; .venv stays
	@rm -rf build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
