# make audit: everything from nothing to the report.  make test: everything from nothing to green tests.
# An active environment (VIRTUAL_ENV or CONDA_PREFIX) is used as it is; else one is made in .venv.
SHELL := /bin/bash
PYTHON ?= python3
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
VENV := $(or $(ACTIVE),.venv)
BIN := $(VENV)/bin
# One stamp per environment, kept here: another checkout that installs into the same one has its own.
STAMP := build/installed-in-$(shell printf '%s' "$(VENV)" | cksum | cut -d' ' -f1)
SOURCES := pyproject.toml CMakeLists.txt $(wildcard kernels/csrc/*)
OUT ?= remanence-audit
# Test processes; each takes one thread, as models this small gain nothing from more.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# As CMake looks for one: CXX, or else by its names.
COMPILER := { command -v "$${CXX:-c++}" || { [ -z "$$CXX" ] && command -v g++; }; } >/dev/null

.PHONY: audit test check clean

audit: $(STAMP)
	@time "$(BIN)/remanence" audit --out "$(OUT)" $(ARGS)

test: $(STAMP)
	@time "$(BIN)/python" -m pytest -n "$(JOBS)" --dist worksteal $(ARGS)

# What CI runs besides the tests: style, and the types of the package as it is installed.
check: $(STAMP)
	"$(BIN)/python" -m pip install -q "ruff>=0.12" "mypy>=1.15"
	"$(BIN)/python" -m ruff check . && "$(BIN)/python" -m ruff format --check .
	rm -rf build/typed && "$(BIN)/python" -m pip install -q --no-deps --target build/typed .
	python="$$(cd "$(BIN)" && pwd)/python"; config="$$PWD/pyproject.toml"; \
		cd build/typed && "$$python" -m mypy --config-file "$$config" -p remanence

# Without a compiler the stamp stays away: the next make looks again.
# torch first and alone: any other order may bring the newest build with gigabytes of CUDA libraries.
$(STAMP): $(SOURCES) | environment
	@$(COMPILER) || echo "no C++ compiler: going on without native kernels, plain torch computes, slowly; once there is one (Debian: apt install g++) run make again" >&2
	@! $(COMPILER) || "$(BIN)/python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
		|| { echo "no Python.h: install Python's headers (Debian: apt install python3-dev) and run make again" >&2; exit 1; }
	"$(BIN)/python" -c 'import torch' 2>/dev/null || "$(BIN)/python" -m pip install -q torch==2.13.0
	"$(BIN)/python" -m pip install -q -e '.[test]'
	@! $(COMPILER) || { mkdir -p build && touch $@; }

# Debian's python3 without python3-venv cannot put pip into a new environment; the pip outside can.
.PHONY: environment
environment:
	@[ -x "$(BIN)/python" ] || [ -z "$(ACTIVE)" ] || { echo "the active environment $(ACTIVE) has no bin/python" >&2; exit 1; }
	@[ -x "$(BIN)/python" ] || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	@[ -x "$(BIN)/python" ] || $(PYTHON) -m venv .venv 2>/dev/null \
		|| { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python .venv/bin/python install -q pip; }

clean:
	rm -rf .venv build
