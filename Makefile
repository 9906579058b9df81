# Two commands set everything up: `make demo` and `make test`. Where $(PYTHON) has torch already
# and what else they need, it is used and the extension built in place; else a .venv is made.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
TRITON ?= $(if $(filter Linux,$(shell uname)),triton==3.7.1)  # it has wheels for no other system

CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*.map csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu \
    csrc/cuda/*.cpp csrc/cuda/*.h)
SOURCES := setup.py pyproject.toml $(CSRC)
CXX_FILES := $(filter-out %.map,$(CSRC)) $(wildcard tests/driver/*.cpp tests/driver/*.h bench/driver/*.c*)

NEEDED := torch torchvision setuptools ninja pybind11 numpy scipy sklearn tqdm tabulate jinja2 \
    pytest hypothesis
HAS = $(shell $(PYTHON) -c 'import importlib.util as u, sys; \
    print("yes" * all(map(u.find_spec, sys.argv[1:])))' $(1) 2>/dev/null)
OWN_TORCH := $(call HAS,torch)

ifeq ($(call HAS,$(NEEDED)),yes)
RUN := $(PYTHON)
READY := build/ready
else
RUN := .venv/bin/python
READY := .venv/ready
endif

CLANG_FORMAT := $(RUN) -c 'from clang_format import clang_format; clang_format()'

# Two tests at a time where pytest-xdist is there, for most of them use one core only; their
# files are kept whole in the first run, and shared out in those of the GPU kernels. A process that
# a hanging test ended is not begun again, or else that test would be.
ON_EVERY_DEVICE := $(addprefix tests/test_,triton.py triton_details.py operation_details.py \
    pairwise.py consistency.py masked_classes.py autograd.py exactness.py targets.py dense.py \
    divergences.py operators.py dependence.py)
AT_ONCE = $(shell $(RUN) -c 'import xdist; print("-n 2 --max-worker-restart 0")' 2>/dev/null)

# What takes longest begins first, for a file is not shared out; by itself pytest-xdist would begin
# with those of many tests, and end with few processes that wait for others.
LONGEST := $(addprefix tests/test_,offline_compile.py compiled_code.py sanitizers.py \
    cuda_sanitizers.py cuda_build.py distribution.py gpu_bench.py accuracy_study.py compile.py \
    divergences.py examples.py traps.py fsdp.py distributed.py training.py quality_runs.py)

.PHONY: demo test test-quick test-slow test-all lint lint-if-installed bench bench-quick \
    bench-check accuracy mutants gpu docs wheels format clean

demo: $(READY)
	$(RUN) -m imcl_fast.demo

# What is slow and rarely changes, or changes only together with what is quick to test, is left to
# `make test-slow`.
# The linters take one core half a minute, the tests the rest of two.
test: $(READY)
	@$(MAKE) --no-print-directory --jobs 2 lint-if-installed test-quick

test-quick: SELECT := -m "not slow"
test-slow: SELECT := -m slow
test-slow: export IMCL_FAST_TEST_ALL := 1
test-quick test-slow: $(READY)
	$(run-tests)

test-all: test test-slow

define run-tests
	OMP_WAIT_POLICY=passive $(RUN) -m pytest $(LONGEST) tests $(SELECT) \
	    $(AT_ONCE) $(if $(AT_ONCE),--dist loadfile --no-loadscope-reorder)
	@echo "the GPU kernels on the CPU: Triton's under its interpreter, then the CUDA kernels as C++"
	TRITON_INTERPRET=1 $(RUN) -m pytest $(ON_EVERY_DEVICE) tests/test_compile.py -k triton \
	    $(SELECT) $(AT_ONCE)
	CUDA_ON_CPU=1 $(RUN) -m pytest $(ON_EVERY_DEVICE) -k cuda $(SELECT) $(AT_ONCE)
endef

lint-if-installed: $(READY)
	@if $(RUN) -c 'import clang_format, mypy, ruff' 2>/dev/null; then \
	    $(MAKE) --no-print-directory lint; \
	else \
	    echo "lint is skipped: $(RUN) has no clang-format, mypy or ruff"; \
	fi

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CXX_FILES)

bench: $(READY)
	$(RUN) -m bench

bench-quick: $(READY)
	$(RUN) -m bench --quick

# Instruction counts of the C++ kernels against bench/baseline.json; needs valgrind.
bench-check: $(READY)
	$(RUN) -m bench --check

# What is left of the accuracy study on a CPU; it goes on where it was interrupted. The results lie
# in bench/accuracy/results and fill docs/accuracy.md, which says how long it took.
accuracy: $(READY)
	$(RUN) -m bench.accuracy

# Breaks a copy of the code line by line: do the tests see it? An hour or two of two cores.
mutants: $(READY)
	$(RUN) -m bench.mutants

# For a machine with a GPU and its own torch: measurements there, then tests, into $OUT. Without
# a compiler, ninja or pybind11 there is no impl="cuda" to measure, but there is impl="triton".
gpu: $(if $(OWN_TORCH),,$(READY))
	-$(if $(OWN_TORCH),$(PYTHON) setup.py --quiet build_ext --inplace)
	$(if $(OWN_TORCH),$(PYTHON),$(RUN)) -m bench.gpu

# The site, into build/site: no network is needed to build it, nor to read it.
docs: $(READY)
	$(RUN) -m sphinx -W -q -b html docs build/site
	@echo "build/site/index.html"

# What others install, into dist/: the source distribution, and wheels for every Python 3 and glibc 2.24,
# one for aarch64 too where Debian's g++-aarch64-linux-gnu is.
WHEEL := $(RUN) -m pip wheel --quiet --no-build-isolation --no-deps -w build/wheels .
CROSS := aarch64-linux-gnu-g++
wheels: $(READY)
	rm -rf build/wheels && mkdir -p build/wheels dist
	IMCL_FAST_PORTABLE=1 $(WHEEL)
	if command -v $(CROSS); then CXX=$(CROSS) IMCL_FAST_BUILD=cpu IMCL_FAST_PORTABLE=1 $(WHEEL); fi
	for wheel in build/wheels/*.whl; do \
	    PATH="$$PATH:$(dir $(shell command -v $(RUN)))" $(RUN) -m auditwheel repair -w dist \
	        --exclude 'libtorch*.so' --exclude 'libc10*.so' $$wheel || exit 1; \
	done
	$(RUN) setup.py --quiet sdist --dist-dir dist
	ls -l dist

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(CLANG_FORMAT) -i $(CXX_FILES)

.venv/ready: $(SOURCES)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH) $(TORCHVISION) $(TRITON)
	.venv/bin/python -m pip install --quiet setuptools wheel ninja pybind11
	.venv/bin/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

build/ready: $(SOURCES)
	$(PYTHON) setup.py --quiet build_ext --inplace
	mkdir -p build && touch $@

clean:
	rm -rf .venv build dist *.egg-info imcl_fast/*.so
