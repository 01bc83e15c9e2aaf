# Everything starts from a fresh clone with Python >= 3.11 and make: `make demo`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := uv==0.13.8
PYTEST_FLAGS ?=
LOCK_FLAGS ?=

.PHONY: demo test lint lock
.DEFAULT_GOAL := demo

demo: $(VENV)/installed
	$(BIN)/thermofuse run demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 $(PYTEST_FLAGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/lint-imports

# One list for Python 3.11 to 3.13 on Linux. Keeps the versions it finds; `make lock LOCK_FLAGS=--upgrade` moves them.
lock: $(VENV)/installed
	mkdir -p build
	for version in 3.11 3.12 3.13; do \
	  cp requirements.lock build/lock-$$version && \
	  $(BIN)/uv pip compile --quiet --no-header --no-annotate --group dev --python-version $$version \
	    --python-platform x86_64-manylinux_2_28 $(LOCK_FLAGS) --output-file build/lock-$$version pyproject.toml || exit 1; \
	done
	LC_ALL=C sort -u -t= -k1,1 -k3,3 build/lock-3.1* > requirements.lock

# The build backend is in the lock, so the project itself is installed without an isolated, unpinned build.
$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "thermofuse needs Python 3.11 or newer; run: make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@
