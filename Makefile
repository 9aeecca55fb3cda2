# make pretrain · make test: each works alone in a fresh clone.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# Processes that run tests, one thread each: one more than cores, because some tests wait.
WORKERS ?= 3
# Tests in Triton's interpreter do not wait.
INTERPRETING ?= 2
# The Triton of the oldest supported torch, 2.10.
OLDEST_TRITON := 3.6.0
RUN := .venv/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)

.PHONY: install pretrain test test-slow test-gpu-static test-sanitize gpu lint docs bench clean

install: .venv/.installed

# torch first, so that the extension builds against the torch that is used.
.venv/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(PIP) "torch>=2.10" "torchvision>=0.25" "setuptools>=64" wheel
	$(PIP) --no-build-isolation --editable ".[dev,bench]"
	touch $@

pretrain: install
	$(RUN) -m simclr_fast pretrain --data demo $(ARGS)

test: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(INTERPRETING) --dist worksteal tests/kernels/interpreted

# The remaining architectures and the large cases: minutes more.
test-slow: install
	$(RUN) -m pytest -m slow --timeout=1200 $(ARGS)

# Every GPU kernel configuration for every architecture, and its machine code, on the installed
# Triton and on the oldest supported one: about an hour. The oldest one's nvdisasm does not know the
# newest GPUs, of which its ptxas does.
NVIDIA_TOOLS = $(firstword $(wildcard .venv/lib/python*/site-packages/triton/backends/nvidia/bin))
test-gpu-static: install .venv/triton-$(OLDEST_TRITON)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) -m gpu_static --timeout=1200 $(ARGS)
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/triton-$(OLDEST_TRITON) \
	  TRITON_NVDISASM_PATH=$(NVIDIA_TOOLS)/nvdisasm TRITON_CUOBJDUMP_PATH=$(NVIDIA_TOOLS)/cuobjdump \
	  SIMCLR_FAST_TEST_TRITON=$(OLDEST_TRITON) $(RUN) -m pytest -n $(WORKERS) \
	  -m "gpu_static or not gpu_static" --timeout=1200 tests/kernels/test_specialisation.py $(ARGS)

.venv/triton-$(OLDEST_TRITON): .venv/.installed
	$(RUN) -m pip install --disable-pip-version-check --no-deps --upgrade --target $@ \
	  triton==$(OLDEST_TRITON)
	touch $@

# The CUDA kernels on the host, and the C++ CPU code, under ASan, UBSan and TSan, with planted faults:
# tens of minutes.
test-sanitize: install
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal -m sanitize --timeout=1200 $(ARGS)

# Every check on this machine's GPU, and a report of it: under ten minutes, without network. Takes
# .venv if there is one, else $(PYTHON) with its packages, and builds the extension if it is missing.
GPU_PYTHON := $(or $(wildcard $(RUN)),$(PYTHON))
gpu:
	$(if $(wildcard simclr_fast/_C*.so),,$(GPU_PYTHON) setup.py -q build_ext --inplace)
	$(GPU_PYTHON) -m simclr_fast selfcheck --device cuda --full $(ARGS)

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	.venv/bin/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/*.cu \
	  csrc/host_emulation/*.h tests/csrc/*.cpp
	$(RUN) -m mypy
	$(RUN) -m pytest -q -m slow tests/project/test_docs.py -k "typed or site"

docs: install
	$(RUN) -m mkdocs build --strict

bench: install
	$(RUN) -m simclr_fast bench all $(ARGS)

clean:
	rm -rf .venv build dist site *.egg-info simclr_fast/*.so
