# From a fresh clone, with only Python 3.11 or newer, make and a package index:
#   make demo    install the package and run the embedded demonstration
#   make test    install the development tools too and run every check
#   make fuzz    thousands of damaged inputs for every reader (docs/fuzzing.md)
#   make faults  kill, stop, starve and damage a small sweep in every way known (up to 40 minutes)
# With a GPU: make demo CONSTRAINTS=     (takes the build of torch for the machine)

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/cpu.txt

BIN := $(VENV)/bin
# pip would compile on one core, and the packages' own tests too. Files that are no Python, as
# templates, stay as they are.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
COMPILE = @$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
CODE := raytune_vlm tests $(wildcard benchmarks deploy docs)

.PHONY: demo test fuzz faults lint format install install-dev lock sbom clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/raytune-vlm demo

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

EXAMPLES ?= 2000
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -W ignore tests/fuzz/run_fuzz.py --examples $(EXAMPLES) --keep fuzz-inputs

faults: $(VENV)/.installed-dev
	$(BIN)/python -m tests.faults --write docs/reliability.md

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "raytune-vlm needs Python 3.11 or newer, and '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP_INSTALL) --editable .
	$(COMPILE)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	DS_BUILD_OPS=0 $(PIP_INSTALL) --editable ".[dev,deepspeed]"
	$(COMPILE)
	@touch $(VENV)/.installed $@

# constraints/locked.txt: every dependency, the indirect ones too, with its hashes.
lock: $(VENV)/.installed
	$(PIP_INSTALL) uv
	$(BIN)/uv pip compile --quiet pyproject.toml $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) \
	  --python-version 3.11 --generate-hashes --output-file constraints/locked.txt

# sbom.json: what is installed, as a CycloneDX bill of materials.
sbom: $(VENV)/.installed
	$(PIP_INSTALL) cyclonedx-bom
	$(BIN)/cyclonedx-py environment --output-file sbom.json $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
