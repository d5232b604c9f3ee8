# `make demo` is the tour, `make test` the fast suite, `make check` what has to be clean before a commit.

PYTHON ?= python3
VENV := .venv
INTEROP := .venv-interop
RUN := $(VENV)/bin/python -P -m
WORKERS ?= 2

# Tests run in parallel processes: one thread each, or the processes fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest
PARALLEL := -n $(WORKERS) --dist loadfile

.PHONY: help setup demo test test-matrix test-full arm64 test-arm64 pin-arm64 check format docs wheel interop clean
.DELETE_ON_ERROR:

help:
	@echo "make setup       build $(VENV) from constraints.txt"
	@echo "make demo        convert, check, profile and draw with the embedded checkpoint on every runtime"
	@echo "make test        the fast tests"
	@echo "make test-full   the full-size tests too: minutes and gigabytes each"
	@echo "make arm64       set up an emulated AArch64 machine, for validate --machine arm64"
	@echo "make test-arm64  every scheme, target and processor there, pictures included: an hour"
	@echo "make pin-arm64   pin anew what that machine is made of"
	@echo "make check       format, lint, types, import rules, docs"
	@echo "make format      apply the formatter and the lint fixes"
	@echo "make docs        rewrite the generated parts of the docs"
	@echo "make wheel       build the wheel into dist/"
	@echo "make interop     load an ORT bundle with optimum, in an environment of its own"
	@echo "make clean       remove everything that was built, the environments included"

setup: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffusette needs Python 3.11 or newer")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile -c constraints.txt setuptools wheel
	$(VENV)/bin/pip install --quiet --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	$(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true  # in parallel; some packages ship templates
	touch $@

demo: setup
	$(VENV)/bin/diffusette demo

test: setup
	$(PYTEST) $(PARALLEL)

# Every kind and layout of checkpoint on every target.
test-matrix: setup
	$(PYTEST) $(PARALLEL) -m "matrix and not full" tests/matrix

test-full: test test-matrix
	$(RUN) pytest -m full

arm64: setup
	$(VENV)/bin/diffusette machine setup arm64

test-arm64: arm64
	$(RUN) pytest -m arm64_long tests/arm64

pin-arm64: setup
	$(RUN) diffusette.runtimes.machines.pin constraints.txt

check: setup .links/diffusette
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PYTEST) -q tests/test_imports.py tests/test_packaging.py tests/test_docs.py
	$(VENV)/bin/python -P docs/generate.py --check

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: setup
	$(VENV)/bin/python -P docs/generate.py

# Type checkers see the root as the package `diffusette` through this link.
.links/diffusette:
	mkdir -p .links
	ln -sfn .. $@

# build/ is removed first: setuptools would pack files that were deleted since into the wheel.
wheel: setup
	rm -rf build dist
	$(RUN) build --wheel --no-isolation --outdir dist .
	rm -rf build

interop: setup $(INTEROP)/.stamp
	DIFFUSETTE_INTEROP_PYTHON=$(CURDIR)/$(INTEROP)/bin/python $(RUN) pytest tests/interop -m interop

# optimum-onnx pins transformers < 4.58, whose own dependencies contradict those of current diffusers:
# no resolver finds a set, this one works (docs/decisions/0003). So every package is named, none is resolved.
$(INTEROP)/.stamp: tests/interop/requirements.txt
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet --no-compile --no-deps -r tests/interop/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(INTEROP) .venv-wheel .venv-light .links build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
