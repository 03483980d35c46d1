# Two commands: `make demo` and `make test`. Both make .venv first; nothing but python3, make and a package index is needed.
# PYTHON=… picks the interpreter (3.11 or 3.12).

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done || true)
ifeq ($(strip $(PYTHON)),)
PYTHON := python3
endif
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
KERNELS := $(VENV)/.triton
# For the kernels' tests, under its interpreter. No extra: a torch for CUDA pins its own, each version another one.
TRITON := triton==3.6.0

.PHONY: help demo test test-slow test-browser test-gpu lint format clean
help:
	@echo "make demo       a real pair of models answers a prompt (CPU is enough)"
	@echo "make test       the tests that need no GPU and no long time"
	@echo "make test-slow  the ones that take minutes;  make test-gpu  the ones that need CUDA"
	@echo "make test-browser  the web page in Chromium (apt-get install chromium)"
	@echo "make lint       ruff and mypy;  make format  let ruff rewrite;  make clean  remove $(VENV)"

$(STAMP): setup.py constraints.txt .ci/make_venv.py
	$(PYTHON) .ci/make_venv.py $(VENV) dev,serve,bench
	@touch $@

$(KERNELS): $(STAMP)
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q --no-deps $(TRITON) || \
		echo "no Triton for this machine: the kernels' tests are left out"
	@touch $@

demo: $(STAMP)
	$(BIN)/pearl-ray demo

# Two at once, in the files' order: files with Ray in one of them, the others where there is room.
test: $(STAMP) $(KERNELS)
	$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

test-slow: $(STAMP) $(KERNELS)
	$(BIN)/python -m pytest -m "slow and not gpu" --hypothesis-profile=explore

test-browser: $(STAMP)
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || \
		{ echo "no Chromium: apt-get install chromium"; exit 1; }
	$(BIN)/python -m pytest -m slow tests/unit/test_serving_page.py

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy pearl_ray/core

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
