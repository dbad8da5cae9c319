# `make` builds the environment; `make demo` and `make test` do all set-up themselves on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: all demo compare docs test test-slow lint types clean
all: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# A synthetic catalogue, sharded, trained on two CPU ranks whatever the machine has, evaluated, and three users' lists.
demo: $(STAMP)
	rm -rf demo
	$(MAKE) demo/shards/manifest.json
	DS_ACCELERATOR=cpu $(BIN)/deepspeed --num_accelerators 2 launch/train.py --config configs/demo.yaml
	$(BIN)/python launch/evaluate.py --device cpu --baseline popularity --shards demo/shards
	$(BIN)/python launch/evaluate.py --device cpu --run demo/run
	$(BIN)/python launch/recommend.py --device cpu --run demo/run --histories demo/interactions.parquet --k 10 --output demo/lists.csv --show 3

demo/shards/manifest.json: | $(STAMP)
	mkdir -p demo
	$(BIN)/python -m data_tools.synthesize demo/interactions.parquet --users 3000 --items 800 --interactions 120000 --seed 1
	$(BIN)/python -m data_tools.shard demo/interactions.parquet demo/shards --val_users 300 --test_users 600
	$(BIN)/python -m data_tools.verify demo/shards

# Which model wins on the demo's data, and at what cost: demo/compare/report.md.
compare: $(STAMP) demo/shards/manifest.json
	$(BIN)/python launch/compare.py --config configs/compare.yaml --output demo/compare

# The pages of docs/ as a site in site/, every warning an error.
docs: $(STAMP) .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/.docs: $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf .venv demo build site *.egg-info
