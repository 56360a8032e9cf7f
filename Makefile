# `make demo` and `make test` need Python >= 3.10 and nothing else; both build .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAVIS := .cache/lavis
# the CUDA extension, where there is an nvcc to build it
EXTENSION := $(if $(shell command -v nvcc),$(VENV)/extension)

.DEFAULT_GOAL := help
.PHONY: help demo test extension wheel lint bench opbench kernels doctor clean

help: ## this list
	@grep -hE '^[a-z.$$()A-Z/]+:.*##' $(MAKEFILE_LIST) | sed -e 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/installed ## train stage 1 on real pictures, evaluate it and write a report
	$(BIN)/qformer-fast demo

# two workers of a thread each: Triton's interpreter has but one, and more threads than cores wait for each other
test: $(VENV)/installed $(EXTENSION) $(LAVIS)/lavis ## run the tests, with the CUDA extension where nvcc is
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

extension: $(VENV)/extension ## build the CUDA extension into qformer_fast/; needs nvcc, no GPU

wheel: $(VENV)/installed $(EXTENSION) ## make dist/: the sdist, from it the pure-Python wheel, and where nvcc is the wheel with the extension
	rm -rf dist build/lib* build/bdist*
	$(BIN)/python -m pip install --quiet build
	QFORMER_FAST_EXT=0 $(BIN)/python -m build
	$(if $(EXTENSION),QFORMER_FAST_EXT=1 $(BIN)/python -m build --wheel --no-isolation)

lint: $(VENV)/installed ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed $(LAVIS)/lavis ## time stage 1 against the original's own code on this machine
	$(BIN)/python bench/bench_stage1.py

opbench: $(VENV)/installed ## time every op on this GPU against eager, torch.compile, SDPA and Liger
	$(BIN)/python bench/bench_ops.py --out bench/results/ops.json
	$(BIN)/python bench/report.py bench/results/ops.json

kernels: $(VENV)/installed ## compile every kernel for sm_80, sm_90, sm_100 and sm_120: registers, shared memory, spills
	$(BIN)/python bench/compile_kernels.py

doctor: $(VENV)/installed ## versions, devices, and which backend each op uses
	$(BIN)/qformer-fast doctor

clean: ## remove everything that the other targets made
	rm -rf $(VENV) .cache build dist *.egg-info qformer_fast/_C*.so

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[captioning,demo,test]"
	touch $@

$(VENV)/extension: setup.py $(wildcard csrc/*) | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps "setuptools>=77" nvidia-cutlass
	QFORMER_FAST_EXT=1 $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# the original's code, which tests and benchmarks compare with; it can't be installed beside today's packages
$(LAVIS)/lavis: | $(VENV)/installed
	rm -rf $(LAVIS) && mkdir -p $(LAVIS)
	$(BIN)/python -m pip download --quiet --no-deps --dest .cache salesforce-lavis==1.0.2
	$(BIN)/python -m zipfile --extract .cache/salesforce_lavis-1.0.2-py3-none-any.whl $(LAVIS)
