# `make run` sets up and runs the main job; `make test` sets up and runs every check.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: run test test-scale test-sglang test-browser lint typecheck unit clean

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
