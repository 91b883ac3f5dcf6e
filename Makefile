# Two commands on a fresh machine that has Python and a package index: make demo, make test.
# Each makes .venv and installs what it needs, once; make help lists the rest.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Set up anew when a dependency or the list of the package's files changes: the editable install links files.
PACKAGE := $(shell find __init__.py celeryconfig.py testing.py py.typed cachelib coordination tasks -name '*.py' -o -name '*.lua' -o -name 'py.typed' 2>/dev/null | sort)
STAMP   := $(VENV)/ready-$(shell { echo $(PACKAGE); cat pyproject.toml; } | cksum | cut -d' ' -f1)

# The libraries that we are measured beside are only installed for that.
BENCH   := $(VENV)/bench-$(shell cksum < pyproject.toml | cut -d' ' -f1)

ONLY     ?=
PLOT     ?=
MARKDOWN ?=

LOG    ?=
KILL   ?= 0
KEEP   ?=
export LOG KILL KEEP

.PHONY: help demo test storm check bench clean
.DEFAULT_GOAL := help

help: ## list what can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(STAMP) ## run the main job; LOG=path replays a log, KILL=3 kills the worker thrice, KEEP=1 stays up
	@$(BIN)/python -m examples.site.demo

# Leases are judged by a clock. What fails while the processes of three tests share two cores is run once more,
# alone; both results are shown, and what fails alone too has failed.
test: $(STAMP) ## run the tests
	@$(BIN)/python -m pytest -n 3 || { \
		[ $$? -eq 1 ] || exit 1; \
		echo "petiole: what has failed among others is run once more, alone:" >&2; \
		$(BIN)/python -m pytest --last-failed --last-failed-no-failures none -v; \
	}

storm: $(STAMP) ## the long proofs: histories under faults, more of chance; a few minutes
	@$(BIN)/python -m pytest -q -m storm
	@$(BIN)/python -m pytest -q --hypothesis-profile=storm tests/unit
	@PETIOLE_STORM_SECONDS=10 $(BIN)/python -m pytest -q tests/contract/test_no_stale_set.py -k at_random
	@PETIOLE_STORM_SEEDS=5 PETIOLE_STORM_FAULTS=12 $(BIN)/python -m pytest -q tests/contract/test_lock_history.py -k 'one_at_a_time or whatever or flushed'

check: $(STAMP) ## lint, types, import rules, architecture
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest -q tests/architecture

bench: $(BENCH) ## measure beside others; ONLY=cache|memory|stampede|writes|locks|limits|tasks, PLOT=path.svg, MARKDOWN=path.md
	@$(BIN)/python -m benchmarks --only '$(ONLY)' --plot '$(PLOT)' --markdown '$(MARKDOWN)'

clean: ## remove what was made
	rm -rf $(VENV) build dist *.egg-info

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "petiole: there is no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "petiole: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "petiole: $(PYTHON) cannot make virtual environments; install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "petiole: setting up $(VENV), once ..." >&2
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@rm -rf build $(VENV)/ready-*
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=strict -e '.[dev]'
	@touch $@

$(BENCH): | $(STAMP)
	@rm -f $(VENV)/bench-*
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=strict -e '.[bench]'
	@touch $@
