# `make` builds the environment. `make demo` and `make test` need no other setup on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: all demo compare docs test test-slow lint types clean
all: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# A first run: draw a synthetic catalogue, fit EASE and VASP, compare them, print some lists.
demo: $(STAMP)
	$(BIN)/dist-vasp demo

demo/shards/manifest.json: | $(STAMP)
	$(BIN)/dist-vasp demo

# Compare models on the demo's data: demo/compare/report.html.
compare: $(STAMP) demo/shards/manifest.json
	$(BIN)/python launch/compare.py --config configs/compare.yaml --output demo/compare

# Build the site in site/ from docs/; a warning is an error.
docs: $(STAMP) .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/.docs: $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf .venv demo build site *.egg-info
