# make demo | make test | make test-all: each does all its own set-up in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2

.PHONY: demo test test-all test-gpu lint docs setup clean
.DEFAULT_GOAL := demo

setup: $(STAMP)

# torch first and pinned: a bare `torch` would bring gigabytes of CUDA libraries to a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/automodel demo

lint: $(STAMP)
	$(BIN)/ruff check nemo_automodel tests benchmarks
	$(BIN)/ruff format --check nemo_automodel tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every kind of test, big matrices by a fixed sample.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not full"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not gpu"

test-gpu:
	python3 -m pytest tests/gpu -m gpu

docs: $(STAMP)
	$(BIN)/python -m nemo_automodel.config.reference > docs/config-reference.md

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist build
