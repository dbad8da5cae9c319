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

# Draw a synthetic catalogue, shard it, train on two CPU ranks, evaluate, and print some lists.
demo: $(STAMP)
	rm -rf demo
	$(MAKE) demo/shards/manifest.json
	DS_ACCELERATOR=cpu $(BIN)/deepspeed --num_accelerators 2 launch/train.py --config configs/demo.yaml
	$(BIN)/python launch/evaluate.py --device cpu --baseline popularity --shards demo/shards
	$(BIN)/python launch/evaluate.py --device cpu --run demo/run
	$(BIN)/python launch/recommend.py --device cpu --run demo/run \
		--histories demo/interactions.parquet --k 10 --output demo/lists.csv --show 3

demo/shards/manifest.json: | $(STAMP)
	mkdir -p demo
	$(BIN)/python -m data_tools.synthesize demo/interactions.parquet \
		--users 3000 --items 800 --interactions 120000 --seed 1
	$(BIN)/python -m data_tools.shard demo/interactions.parquet demo/shards \
		--val_users 300 --test_users 600
	$(BIN)/python -m data_tools.verify demo/shards

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
