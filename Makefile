# `make demo` and `make test` set up all they need in .venv; `make check` is for developers.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test nightly test-faults test-versions lint package check docs format lock clean

demo: $(INSTALLED)
	$(BIN)/cdpo run configs/quickstart.yaml
	@echo "The report: $(CURDIR)/runs/quickstart/report.html"

# Files are spread over the processes, each with at most one local Ray; see tests/conftest.py.
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not nightly" $(PARALLEL) --durations=25

nightly: $(INSTALLED)
	$(BIN)/python -m pytest -m nightly $(PYTEST_ARGS)

test-faults: $(INSTALLED)
	$(BIN)/python -m pytest -m "fault or nightly"

# Other versions than the lock's, in an environment of their own: `make test-versions PYTHON=python3.12`.
CONSTRAINTS ?= constraints/py312.txt
OTHER ?= .venv-versions
test-versions:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(OTHER)/bin/uv pip install --quiet --python $(OTHER)/bin/python --constraints $(CONSTRAINTS) --editable ".[dev,s3,gs,wandb,mlflow]"
	$(OTHER)/bin/python -m pytest -m "not ray and not slow and not nightly"
	$(OTHER)/bin/cdpo run configs/smoke.yaml run.dir=$$(mktemp -d)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The wheel is built from the sdist, so both are complete.
package: $(INSTALLED)
	rm -rf dist
	$(BIN)/uv build --quiet --out-dir dist
	$(BIN)/python -m zipfile -l dist/cdpo_ray-*.whl | grep --quiet cdpo_ray/configs/quickstart.yaml

check: lint package
	$(BIN)/python -m pytest -m "not ray and not slow and not nightly" $(PARALLEL)

# The site, served on this machine; tests/test_docs.py builds it strictly.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Compiled once here: every Ray worker imports torch and diffusers, which takes three times as long from source.
$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $(INSTALLED)

lock: $(INSTALLED)
	$(BIN)/uv pip compile -q --python-version 3.11 --universal --all-extras --generate-hashes --no-emit-index-url pyproject.toml -o requirements.lock

clean:
	rm -rf .venv runs dist site
