# Two commands set everything up: `make demo` and `make test`. Where $(PYTHON) has torch
# already, it is used and the extension built in place; else a .venv is made.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0

SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/cpu/*.cpp csrc/cpu/*.h)

CXX_FILES := $(wildcard csrc/*.cpp csrc/cpu/*.cpp csrc/cpu/*.h tests/driver/*.cpp)

ifeq ($(shell $(PYTHON) -c 'import torch; print("yes")' 2>/dev/null),yes)
RUN := $(PYTHON)
READY := build/ready
else
RUN := .venv/bin/python
READY := .venv/ready
endif

CLANG_FORMAT := $(RUN) -c 'from clang_format import clang_format; clang_format()'

.PHONY: demo test lint bench format clean

demo: $(READY)
	$(RUN) -m imcl_fast.demo

test: $(READY)
	@if $(RUN) -c 'import clang_format, mypy, ruff' 2>/dev/null; then \
	    $(MAKE) --no-print-directory lint; \
	else \
	    echo "lint is skipped: $(RUN) has no clang-format, mypy or ruff"; \
	fi
	$(RUN) -m pytest

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CXX_FILES)

bench: $(READY)
	$(RUN) bench/targets.py

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(CLANG_FORMAT) -i $(CXX_FILES)

.venv/ready: $(SOURCES)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH) $(TORCHVISION)
	.venv/bin/python -m pip install --quiet setuptools wheel ninja pybind11
	.venv/bin/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

build/ready: $(SOURCES)
	$(PYTHON) setup.py --quiet build_ext --inplace
	mkdir -p build && touch $@

clean:
	rm -rf .venv build dist *.egg-info imcl_fast/*.so
