# Every target sets up what it needs: `make test` in a fresh clone is enough.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin

# The first Python that vLLM supports (3.11 to 3.14); `make PYTHON=/path/to/python` overrides it.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if "$$name" -c "$(SUPPORTED)" >/dev/null 2>&1; then echo "$$name"; break; fi; done)

.PHONY: help venv demo test test-slow test-033 test-next quality lint format clean

help:  ## say what there is
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv:  ## make the environment in .venv: vLLM, this package, the tools
	@test -n "$(PYTHON)" || { echo "make venv: no Python 3.11 to 3.14 found;" \
		"install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" .ci/make_venv.py "$(VENV)"

demo: venv  ## serve a small MoE model with a capacity limit, ask it, show the loads
	@$(BIN)/python examples/demo.py

# Test files that run at a time; one where engines would share a GPU.
JOBS ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo 0 || echo 2)

test: venv  ## run the whole test suite
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# QUALITY="--tokens 2048 --models 16-peaked" is a quick one.
quality: venv  ## measure what the limits cost in quality: tables and plots in benchmarks/results
	$(BIN)/python benchmarks/quality/run.py $(QUALITY)

test-slow: venv  ## run the tests that `make test` leaves out (tens of minutes)
	$(BIN)/pytest -m slow

# Another vLLM, for `make test-next VLLM=x.y.z`; its environment is .venv033 for 0.33.0, and so on.
VLLM ?= 0.33.0
NEXT = .venv$(subst .,,$(basename $(VLLM)))
# What touches vLLM most; `make test-next SELECT=` runs all tests of these files.
SELECT ?= readings or live or router or phantom or vllm_kernels or test_step or off_is_stock or without_a_limit or passes_its_limit \
	or (test_server and not expanded) or (test_engine_args and not bench and not batch)

test-033:  ## test the seams on vLLM 0.33, and the kernels with its Triton
	@$(MAKE) --no-print-directory test-next VLLM=0.33.0

test-next:  ## the same on any vLLM: make test-next VLLM=x.y.z
	@"$(PYTHON)" .ci/make_venv.py "$(NEXT)" --device cpu --vllm "$(VLLM)"
	$(NEXT)/bin/pytest tests/kernels/test_routing_aot.py tests/kernels/test_experts_aot.py
	VLLM_TARGET_DEVICE=cpu $(NEXT)/bin/pytest tests/kernels/test_router.py tests/plugin/test_step.py \
		tests/plugin/test_router.py tests/plugin/test_readings.py tests/plugin/test_phantom.py tests/plugin/test_vllm_kernels.py \
		tests/plugin/test_engine_args.py tests/plugin/test_live.py \
		tests/e2e/test_engine.py tests/e2e/test_server.py tests/e2e/test_live_server.py -k "$(SELECT)"

lint: venv  ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: venv  ## format the code and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove build outputs and caches (not .venv)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
