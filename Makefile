# `make help` lists the targets. Everything runs in .venv, which is made on first use and brought up to date
# whenever pyproject.toml or the lists of versions change. No target needs a terminal.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt
READY := .venv/.installed
MATHS := tests/algorithm
INSTRUCTIONS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=COMPATIBLE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo tables test test-everywhere lint types docs links doctest audit bench races clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name what; do \
		printf '%-23s %s\n' "$$name" "$$what"; done

demo: $(READY)  ## train a small language model with SOAP and its rivals; three minutes; the report goes to demo/
	$(BIN)/soap race --steps 250 --out demo --overwrite

# What several tests read is made once: tests of one xdist_group go to one process.
test: $(READY)  ## run the whole test suite, a process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadgroup

# One machine's rounding is not another's: a test of the maths must not notice.
test-everywhere: $(READY)  ## run the maths suites with other instruction sets and numbers of threads
	@failed=; for threads in 1 2; do for instructions in $(INSTRUCTIONS); do \
		setting="$$instructions OMP_NUM_THREADS=$$threads"; echo "$$setting"; \
		test $$threads = 1 && processes=auto || processes=0; \
		env $$setting $(BIN)/python -m pytest -q -n $$processes $(MATHS) || failed="$$failed  $$setting\n"; \
	done; done; test -z "$$failed" || { printf "failed with\n$$failed" >&2; exit 1; }

lint: $(READY)  ## check style and docstrings (ruff)
	$(BIN)/ruff check .

types: $(READY)  ## check types (mypy, strict on the package)
	$(BIN)/mypy

docs: $(READY)  ## build the documentation into docs/_build; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build
	@echo "documentation: docs/_build/index.html"

tables: $(READY)  ## write the tables of the pages, from the code and from benchmarks/results
	$(BIN)/python tools/tables.py

links: docs  ## check the links within the documentation and the Markdown files (no network)
	$(BIN)/python tools/links.py docs/_build

doctest: $(READY)  ## run the examples in the package's docstrings
	$(BIN)/python -m pytest -q --doctest-modules emerging_optimizers

audit: $(READY)  ## check dependencies: pins, imports, licences (no network; pip-audit -r constraints.txt needs one)
	$(BIN)/python tools/audit.py

bench: $(READY)  ## time steps beside the peers, refreshes, growth, several processes (15 minutes; leave the machine alone)
	$(BIN)/python -m benchmarks.speed.step_time --rounds 3
	$(BIN)/python -m benchmarks.speed.step_time_plot
	$(BIN)/python -m benchmarks.speed.step_profile
	$(BIN)/python -m benchmarks.speed.refresh_cost
	$(BIN)/python -m benchmarks.speed.growth
	$(BIN)/python -m benchmarks.speed.overhead
	$(BIN)/python -m benchmarks.speed.calls
	$(BIN)/python -m benchmarks.scale.scaling
	$(BIN)/python -m benchmarks.figures.concept
	$(BIN)/python -m benchmarks.figures.concept_plot

races: $(READY)  ## race every task over three seeds, for the README's figures (25 minutes; leave the machine alone)
	$(BIN)/python -m benchmarks.figures.race

clean:  ## delete what the targets make, except .venv
	rm -rf build dist demo races docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The build backend is installed first and the package built against it without isolation: an isolated build would
# fetch a backend that constraints.txt does not pin.
$(READY): pyproject.toml constraints.txt tests/trainers/separate.txt
	@test -x $(BIN)/python || { command -v $(PYTHON) >/dev/null && \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; } || \
		{ echo "emerging-optimizers needs Python 3.11 or newer; name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing into .venv (minutes, the first time)"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation -e '.[dev]'
	@rm -rf .trainers
	@$(PIP) --no-deps --target .trainers -r tests/trainers/separate.txt
	@touch $@
