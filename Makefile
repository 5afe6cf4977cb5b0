# `make demo` and `make test` do everything on a machine with Python >= 3.10, make and a C++20 compiler.
PYTHON ?= python3
VENV ?= .venv
TORCH := torch==2.13.0
# The oldest Triton supported, that of the GPU machines; what it compiles is checked for register spills.
TRITON := triton==3.6.0
# Tests run in so many processes of one thread each: small kernels gain nothing from more.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
EXTRAS := cli,models,anomaly,data,onnx,test,bench,docs,dev
# Packages whose models the tests run. They ask for a torchvision, of which the index has a build for CUDA only; a vision
# transformer needs none of it, and tests/stand_in_torchvision.py has its names.
PEERS := timm open_clip_torch ftfy wcwidth
BIN := $(VENV)/bin
CONSTRAINTS := $(VENV)/constraints.txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint docs info install clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18
	@echo "variables: PYTHON ($(PYTHON)), VENV ($(VENV)), JOBS ($(JOBS), processes of the tests), ARGS (passed on to the command)"

demo: install  ## one photo through a ViT at three resolutions: table on screen, picture in out/
	$(BIN)/murf-fast demo $(ARGS)

test: install  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

bench: install  ## the benchmarks
	$(BIN)/murf-fast bench $(ARGS)

lint: install  ## ruff's checks and format, and the types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: install  ## the documentation in build/docs, its examples run and its links checked; needs no network
	rm -rf build/docs
	$(BIN)/python -m sphinx -b html -d build/doctrees -E -W --keep-going -q docs build/docs
	$(BIN)/python -m sphinx -b doctest -d build/doctrees -W -q docs build/doctest
	$(BIN)/python docs/check_links.py build/docs

info: install  ## versions, and every backend with the reasons against it
	$(BIN)/murf-fast info

install: $(VENV)/.installed  ## .venv with murf_fast (editable, C++ extension built) and all that the targets need

# torch comes first and by itself: exactly this version, and whichever build of it pip is set up to find.
$(VENV)/.torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "murf_fast needs Python >= 3.10, $(PYTHON) is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	printf '%s\n' '$(TORCH)' '$(TRITON)' > $(CONSTRAINTS)
	$(PIP) '$(TORCH)'
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
	@mkdir -p build && : > build/progress.log
	tail -f build/progress.log & trap "kill $$!" EXIT; \
	MURF_FAST_OBJECTS=$(CURDIR)/build/objects MURF_FAST_PROGRESS=$(CURDIR)/build/progress.log \
	MURF_FAST_REQUIRE_NATIVE=1 $(PIP) -e '.[$(EXTRAS)]'
	$(PIP) --no-deps $(PEERS)
	touch $@

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist out *.egg-info murf_fast/_native*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
