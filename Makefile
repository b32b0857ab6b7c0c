# The commands of this project; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Variables set by another checkout or environment must not affect this one.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help install demo service test test-slow test-matrix chaos mutants lint format types schema docs sync bench check migrate revision lock clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## Create the environment in .venv

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; say which: make PYTHON=python3.12")'
	@echo "Making the environment in $(VENV): once, and it takes about a minute"
	@echo "  1 of 3: a virtual environment for $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@echo "  2 of 3: the packages of requirements.lock"
	@{ $(BIN)/pip install --disable-pip-version-check --progress-bar off --require-hashes --no-deps -r requirements.lock \
		|| echo FAILED; } | { $(COUNT_PACKAGES); }
	@echo "  3 of 3: mesh_storage itself"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# Reads pip's output and, on a terminal, counts the packages on one line. A pipe has the exit status of its last command,
# so this one must fail if pip failed.
COUNT_PACKAGES = total=$$(grep -c '^[a-z].*==' requirements.lock); number=0; \
	show() { [ ! -t 1 ] || printf '%-72s\r' "$$1"; }; \
	while read -r word package rest; do \
		case "$$word" in \
			Collecting | Processing | Ignoring) \
				number=$$((number + 1)); package=$${package\#\#*/}; package=$${package%%[=:]*}; \
				show "          $$number of $$total: $${package%%-[0-9]*}" ;; \
			Installing) show "          installing all of them" ;; \
			FAILED) exit 1 ;; \
		esac; \
	done; show ""

demo: install ## Run a day of a real network on its own database, and draw it
	@$(BIN)/python examples/mesh_day.py

service: install ## Run an example of a service on a database of its own, with a page that shows its mesh live
	cd examples && ../$(BIN)/python -m service --play

test: install ## Run the tests but the slow ones, or only some: make test T=tests/backup
	$(BIN)/python -m pytest -n 2 --dist worksteal $(if $(T),$(T),-m 'not slow' --cov --cov-report=term-missing:skip-covered)

test-slow: install ## Run the slow tests: PgBouncer, uvloop, migrations beside traffic, crashes, models of hypothesis, packaging, benchmarks
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-matrix: install ## Run all tests on each of PostgreSQL 15, 16 and 18 that is found
	$(BIN)/python tools/test_matrix.py $(MATRIX) -- -n 2 --dist worksteal $(T)

chaos: install ## Disturb servers and sessions under load, ten minutes or as long as said: make chaos SECONDS=3600
	CHAOS_SECONDS=$(or $(SECONDS),600) CHAOS_SEED=$(SEED) $(BIN)/python -m pytest --capture=no --show-capture=no tests/chaos

mutants: install ## Make small faults and report those that no test finds: make mutants ARGS="--sample 50"
	$(BIN)/python tools/mutants.py $(ARGS)

lint: install ## Check format, style and generated code
	$(BIN)/unasyncd --force --quiet  # rewrites stale files, and then fails
	$(BIN)/python tools/reference.py --check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: install ## Check the types
	$(BIN)/mypy
	$(BIN)/pyright

check: lint types schema docs test test-slow ## Run every check a change must pass

schema: install ## Check that models and migrations agree
	@directory=$$(mktemp -d) && trap 'rm -rf "$$directory"' EXIT && export MESH_STORAGE_URL="embedded:$$directory" && \
		$(BIN)/alembic upgrade head && $(BIN)/alembic check

docs: install ## Build a website of the documents and the API reference in build/site
	$(BIN)/properdocs build --strict
	@echo "Open build/site/index.html"

sync: install ## Regenerate the blocking side from mesh_storage/aio, and the generated parts of docs/
	-$(BIN)/unasyncd --force
	$(BIN)/python tools/reference.py

bench: install ## Measure against plain psycopg
	$(BIN)/python -m benchmarks $(ARGS)

migrate: install ## Deploy the schema to MESH_STORAGE_URL
	$(BIN)/alembic upgrade head

revision: install ## Create a migration: make revision m="what it does"
	$(BIN)/alembic revision --rev-id $$($(BIN)/python -c 'from mesh_storage.schema import head; print(f"{int(head()) + 1:04}")') -m "$(m)"

lock: ## Update requirements.lock to the newest versions
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--no-emit-index-url --all-extras --group dev pyproject.toml --output-file requirements.lock --upgrade
	rm -rf $(VENV)-lock

clean: ## Remove everything that the commands created
	rm -rf $(VENV) build .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache dist
