# All that is needed beforehand: Python 3.11 to 3.13 and make.
# Every target creates .venv in this checkout when it is missing, and reuses it otherwise.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp

# TensorFlow has no wheels for other versions of Python.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo $$python && break; done)

# One engine in an environment that has no other framework: its types are checked, each of its verbs
# runs, and all of its tests are imported. Those tests and the examples run in `make test`.
ENGINE ?= torch
ALONE := .venv-$(ENGINE)
ALONE_EXTRAS_tensorflow := tensorflow,demo,test,lint
ALONE_EXTRAS_torch := torch,test,lint
ALONE_EXTRAS_jax := jax,examples,test,lint

.PHONY: help setup demo test test-all mutants fuzz test-gpu test-alone test-floors lint bench examples docs dist report-shots doctor clean

help:
	@echo "make setup      create .venv and install the package with its tools"
	@echo "make demo       train on real digits: small, whole, accumulated; writes report.html"
	@echo "make test       the quick tests of every part, and what each cost; make test-torch those of one"
	@echo "make test-all   all tests, and some with the lowest releases; make test-all-torch those of one part"
	@echo "make mutants    small wrong changes of the package, each of which the quick tests must catch"
	@echo "make fuzz       bad input at random for 60 s each; SECONDS=, ENGINE=, SEED="
	@echo "make test-alone ENGINE=jax    one engine without the other frameworks: types, every verb"
	@echo "make test-floors   the lowest releases that pyproject.toml allows; installs them"
	@echo "make lint       ruff, mypy, typed programs by mypy and pyright, import contracts"
	@echo "make bench      measure speed and memory"
	@echo "make examples   run every file in examples/"
	@echo "make docs       the documentation as a site in build/docs/index.html"
	@echo "make dist       build a wheel and an sdist in dist/, and try the wheel in an empty environment"
	@echo "make report-shots  pictures of reports in build/shots, three widths and dark; needs chromium"
	@echo "make doctor     what is installed, devices, memory limits"
	@echo "make clean      remove .venv, caches and build outputs"

# Python compiles what is imported; all of it at once would take longer than the installation.
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
ifeq ($(PYTHON),)
	@echo "virtualbatch needs Python 3.11, 3.12 or 3.13. Got none on the PATH." \
		"Run: make setup PYTHON=/path/to/python3.11" >&2; exit 1
endif
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt \
		--editable ".[tensorflow,torch,jax,trainers,demo,report,examples,notebook,test,lint,types]"
	touch $(STAMP)

demo: setup
	$(BIN)/virtualbatch demo --html report.html

# The parts, and how each runs, are in tests/run.py. `test` leaves out what is marked `thorough`.
test: setup
	$(BIN)/python tests/run.py

test-all: setup
	$(BIN)/python tests/run.py --thorough
	$(MAKE) --no-print-directory test-floors
	$(MAKE) --no-print-directory dist

# Bad input at random, each engine for so many seconds: what is obscure or wrong fails, with a seed
# that reproduces it. ENGINE names one of them; SEED repeats a run.
SECONDS ?= 60
FUZZED := neutral torch jax tensorflow keras-tensorflow keras-jax keras-torch
FUZZED := $(if $(filter command environment,$(firstword $(origin ENGINE))),$(ENGINE),$(FUZZED))

fuzz: setup
	status=0; for engine in $(FUZZED); do $(BIN)/python -m tests.fuzz --engine $$engine \
		--seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) || status=1; done; exit $$status

mutants: setup
	$(BIN)/python -m tests.mutants.run

test-gpu: setup
	$(BIN)/python -m pytest tests/gpu

test-%: setup
	$(BIN)/python tests/run.py $*

test-all-%: setup
	$(BIN)/python tests/run.py --thorough $*

test-alone-%:
	$(MAKE) --no-print-directory test-alone ENGINE=$*

test-alone:
	test -x $(ALONE)/bin/python || $(PYTHON) -m venv $(ALONE)
	$(ALONE)/bin/python -m pip install --disable-pip-version-check \
		--constraint constraints.txt --editable ".[$(ALONE_EXTRAS_$(ENGINE))]"
	$(ALONE)/bin/mypy
	$(ALONE)/bin/python -m pytest --collect-only -qq tests/$(ENGINE)
	$(ALONE)/bin/python -m tests.alone $(ENGINE)

# The lowest releases that pyproject.toml allows, in an environment of their own: the laws, the public
# names, and Keras' private ones.
FLOORS := .venv-floors

test-floors:
	test -x $(FLOORS)/bin/python || $(PYTHON) -m venv $(FLOORS)
	mkdir -p build
	$(FLOORS)/bin/python tests/floors.py > build/floors.txt
	$(FLOORS)/bin/python -m pip install --disable-pip-version-check --constraint build/floors.txt \
		--editable ".[tensorflow,torch,jax,trainers,report,test]"
	$(FLOORS)/bin/python -m pytest -m "not thorough" tests/conformance tests/jax/test_convolution.py
	$(FLOORS)/bin/python -m pytest tests/test_public_api.py tests/test_imports.py
	$(FLOORS)/bin/python -m pytest -m "not thorough" tests/transformers/test_seam.py \
		tests/transformers/test_exact.py tests/lightning/test_seam.py tests/lightning/test_exact.py
	set -e; for backend in tensorflow torch jax; do KERAS_BACKEND=$$backend $(FLOORS)/bin/python \
		-m pytest tests/keras/test_keras_internals.py tests/keras/test_metrics.py; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/typed/mypy.ini tests/typed
	$(BIN)/pyright --project tests/typed --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/torch_loop.py
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/replicas.py
	$(BIN)/python benchmarks/messages.py
	$(BIN)/python benchmarks/jax_loop.py
	$(BIN)/python benchmarks/keras_backends.py --backend torch
	$(BIN)/python benchmarks/keras_backends.py --backend jax
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/rowwise.py
	$(BIN)/python benchmarks/rowwise_jax.py
	$(BIN)/python benchmarks/rowwise_tensorflow.py
	set -e; for backend in tensorflow jax torch; do \
		$(BIN)/python benchmarks/rowwise_keras.py --backend $$backend; done
	$(BIN)/python benchmarks/exact_batchnorm.py --layers 20

examples: setup
	set -e; for example in examples/*.py; do echo "== $$example"; $(BIN)/python $$example; done

# The site needs neither a framework nor the package; a warning is an error.
DOCS := .venv-docs

docs:
	test -x $(DOCS)/bin/sphinx-build || { $(PYTHON) -m venv $(DOCS) && \
		$(DOCS)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt ".[docs]"; }
	$(DOCS)/bin/sphinx-build --fail-on-warning --fresh-env --quiet docs build/docs
	@echo "build/docs/index.html"

dist: setup
	rm -rf dist
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build
	$(BIN)/python -m build --outdir dist
	$(BIN)/python tests/dist.py dist

report-shots: setup
	$(BIN)/python tests/report_shots.py build/shots

doctor: setup
	$(BIN)/virtualbatch doctor

clean:
	rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache \
		.hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
