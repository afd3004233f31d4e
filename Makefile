# Two commands on a fresh machine; each makes .venv and installs what it needs, once.
#   make reproduce    train, compare and judge: the main experiment on this machine
#   make test         everything that CI runs

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# The versions that CI tests; users may have any torch from 2.9 on.
INSTALL = $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: help reproduce test docs clean

help:
	@sed -n 's/^#   //p' Makefile

reproduce: $(VENV)/installed
	$(BIN)/regularized reproduce early_learning --scale laptop --report reports/early_learning

test: export OMP_NUM_THREADS = 1
test: export NO_MKDOCS_2_WARNING = 1
test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal
	$(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/installed-dev
	$(BIN)/mkdocs serve

# Made again when the dependencies change.
$(VENV)/installed: pyproject.toml constraints.txt
	$(INSTALL) .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(INSTALL) ".[dev]"
	@touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build dist site
