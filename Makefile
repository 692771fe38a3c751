# Each word sets up what it needs in .venv; a second run is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py
STAMP := $(VENV)/.installed

.PHONY: demo test check quick lint bench serve gpu clean types
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U pip "setuptools>=77.0.3"

# Without a GPU and without a torch, the CPU build is enough; with either, what is there decides.
$(STAMP): pyproject.toml $(SOURCES) | $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || command -v nvidia-smi >/dev/null 2>&1 || $(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e ".[test,lint,plot]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m nudging demo

# On every core: each has a run of tests that lie together, so that few of their fixtures are made twice, and who
# is done takes over from the others.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q
JOBS := -n auto --maxprocesses 8 --dist worksteal
test: $(STAMP)
	$(PYTEST) $(JOBS)

# While working: all but the files of which each takes long.
LONG := adaptive aot bench cli cosched cycles draft_verify exactness examples foresight gpu_bench graphs inflate launches lm_head \
  packaging pocket pocket_engine sampling simulation soak traces triton triton_attention triton_picks
check: $(STAMP)
	@$(MAKE) --no-print-directory -j 2 lint quick

quick: $(STAMP)
	$(PYTEST) $(JOBS) $(foreach test,$(LONG),--ignore-glob='*/test_$(test).py')

lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	MYPYPATH=build/types $(BIN)/mypy -p nudging

# Type checkers cannot see through the editable install's name mapping: show them a tree that has the final names.
types:
	@rm -rf build/types/nudging && mkdir -p build/types/nudging
	@cd build/types/nudging && for f in ../../../engine/*; do ln -s "$$f" .; done && ln -s ../../../kernels kernels

bench: $(STAMP)
	$(BIN)/python -m nudging bench pair

serve: $(STAMP)
	$(BIN)/python -m nudging serve

# On a machine that has everything already (and perhaps no network), its own Python is used as it is.
# Ends within nine minutes: each step has its limit, the benchmark what is left. One that fails stops no other.
GPU_SECONDS := 525
GPU_TESTS := tests/kernels/test_gpu.py tests/kernels/test_triton.py tests/kernels/test_triton_attention.py tests/kernels/test_triton_picks.py tests/kernels/test_lm_head.py tests/kernels/test_draft_verify.py tests/kernels/test_cycle_ops.py tests/kernels/test_widen.py
gpu:
	@end=$$(($$(date +%s) + $(GPU_SECONDS))); status=0; \
	if $(PYTHON) -c "import torch, triton, pybind11, cmake, pytest, tokenizers, jinja2, click, rich" 2>/dev/null; then \
	  $(PYTHON) -m pip install -q --no-build-isolation --no-deps -e . || exit 1; py=$(PYTHON); \
	else $(MAKE) $(STAMP) || exit 1; py=$(BIN)/python; fi; \
	out=$${OUT:-benchmarks/results}; mkdir -p $$out; \
	$$py -c "import xdist" 2>/dev/null && jobs="-n 8" || jobs=; \
	timeout -s INT -k 10 240 $$py -m pytest -q -m slow tests/kernels/test_aot.py & grid=$$!; \
	timeout -s INT -k 10 180 $$py -m pytest -q -m gpu $$jobs --junitxml=$$out/gpu_tests.xml $(GPU_TESTS) || status=1; \
	$$py -m benchmarks.gpu.sanitize $$out || status=1; \
	wait $$grid || status=1; \
	timeout -s INT -k 10 $$((end - $$(date +%s) + 5)) $$py -m benchmarks.gpu --until $$end --out $$out || status=1; \
	exit $$status

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)
	find . -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
