# `make demo` and `make test` set themselves up in .venv. Variables:
#   PYTHON=python3.12                                        which Python makes the virtual environment
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu         where pip looks for torch first (this one: CPU builds)
#   CONSTRAINTS=                                             newest versions instead of the tested ones
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=

BIN := .venv/bin
WORKERS := --numprocesses 2 --dist worksteal
STAMP := .venv/installed

.PHONY: demo docs test test-all lint format clean

demo: $(STAMP)
	$(BIN)/python examples/digits_demo.py --output_dir demo

# the site of docs/, in build/site
docs: $(STAMP)
	$(BIN)/pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

# also full products of parameters, mutations, runs killed at random, and the ways in which processors round
test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m 'slow or not slow'
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/kills.py
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -p misaligned
	for setting in MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41; do \
		echo "$$setting" && env OMP_NUM_THREADS=1 $$setting $(BIN)/python -m pytest $(WORKERS) || exit 1; \
	done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "diffusers_ext needs Python 3.10 or newer: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable ".[demo,test]"
	@touch $@

clean:
	rm -rf .venv demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache
