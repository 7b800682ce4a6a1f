# make demo | make test | make test-all: each does all its own set-up in .venv.
# make test-transformers VERSION=5.17.0: the tests that meet transformers, with that one, in a venv of its own.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2
# Where torch is looked for besides PyPI, e.g. https://download.pytorch.org/whl/cpu on a machine without a GPU.
TORCH_INDEX ?=
EXTRA_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# What another transformers may break: models, their files, and recipes that train them.
TRANSFORMERS_TESTS ?= tests/unit/model tests/unit/attention tests/unit/peft tests/unit/checkpoint tests/unit/datasets \
	tests/ranks/test_fsdp2.py tests/ranks/test_sharded_loading.py tests/recipes
OTHER := .venv-$(VERSION)

.PHONY: demo test test-all test-gpu test-transformers lint docs setup clean
.DEFAULT_GOAL := demo

setup: $(STAMP)

# torch first, by itself: only it may come from TORCH_INDEX. From PyPI the same pin is the CUDA build on Linux, gigabytes of
# libraries that a machine without a GPU does not need.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(EXTRA_INDEX) torch==2.13.0
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu and not full"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu and not sample"

# Pins hold but for transformers and what it asks other versions of.
$(OTHER)/.installed: pyproject.toml constraints.txt
	@test -n "$(VERSION)" || { echo "write the version: make test-transformers VERSION=5.17.0"; exit 2; }
	$(PYTHON) -m venv $(OTHER)
	grep -vE '^(transformers|huggingface_hub|tokenizers|hf-xet|httpcore2|httpx2)==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install -q --disable-pip-version-check -c $(OTHER)/constraints.txt $(EXTRA_INDEX) torch==2.13.0
	$(OTHER)/bin/python -m pip install -q --disable-pip-version-check -c $(OTHER)/constraints.txt \
		transformers==$(VERSION) -e '.[dev]'
	touch $@

test-transformers: $(OTHER)/.installed
	$(OTHER)/bin/python -c "import transformers, torch; print('transformers', transformers.__version__, 'torch', torch.__version__)"
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu and not full" $(TRANSFORMERS_TESTS)

test-gpu:
	python3 -m pytest tests/gpu -m gpu

docs: $(STAMP)
	$(BIN)/python -m nemo_automodel.config.reference > docs/config-reference.md

clean:
	rm -rf $(VENV) .venv-* .pytest_cache .mypy_cache .ruff_cache dist build
