# Two commands: `make run` (the demonstration) and `make test`. Both set up what they need into .venv. `make help` lists
# the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
DIGITS := runs/digits

export PYTHONUNBUFFERED := 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup run doctor compare-methods test test-compile lint format typecheck chaos bench bench-losses \
  bench-methods clean clean-demo

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## install what requirements.lock names into .venv

# uv resolves and installs in half a minute what pip takes minutes for; where it cannot be had, pip does
$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; say make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	{ $(BIN)/python -m pip install --quiet uv \
	    && $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --requirement requirements.lock; } \
	  || $(BIN)/python -m pip install --requirement requirements.lock
	touch $(READY)

run: $(READY)  ## the demonstration: shards, teacher, student alone, student distilled, one table and a report
	rm -rf $(DIGITS)/teacher $(DIGITS)/baseline $(DIGITS)/distilled
	$(BIN)/python shards/prepare.py digits --out data/digits
	$(LAUNCH) pipelines/imagenet.py --recipe pipelines/recipes/digits/teacher.yaml --out $(DIGITS)/teacher
	$(LAUNCH) pipelines/imagenet.py --recipe pipelines/recipes/digits/baseline.yaml --out $(DIGITS)/baseline
	$(LAUNCH) pipelines/imagenet.py --recipe pipelines/recipes/digits/distilled.yaml --out $(DIGITS)/distilled \
	  --teacher-weights $(DIGITS)/teacher/student
	@echo
	@$(BIN)/python pipelines/compare.py $(DIGITS)/teacher $(DIGITS)/baseline $(DIGITS)/distilled
	@echo
	@$(BIN)/python pipelines/report.py --evaluate $(DIGITS)/teacher $(DIGITS)/baseline $(DIGITS)/distilled \
	  --out $(DIGITS)/report.html

doctor: $(READY)  ## a minute: what this machine has and lacks (docs/doctor.md)
	$(BIN)/python pipelines/doctor.py

# docs/methods.md has the table; the same command goes on where it stopped
compare-methods: $(READY)  ## half an hour: every method on the digits pair, three seeds, one table
	OMP_NUM_THREADS=1 $(BIN)/python pipelines/compare_methods.py --recipe pipelines/recipes/digits/distilled.yaml \
	  --out runs/methods --seeds 3 --teacher.epochs 6 --train.epochs 4 --train.evaluate_every 4

lint: $(READY)  ## ruff, its format, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(READY)  ## mypy alone
	$(BIN)/mypy

test: lint  ## lint, types, the whole suite
	$(BIN)/python -m pytest -n 3 --dist worksteal

# `make test` compiles every mechanism too, under a backend that takes seconds
test-compile: lint  ## minutes: the main command under inductor
	TEST_COMPILE=1 $(BIN)/python -m pytest tests/pipelines/test_compile.py

# `make test` has a short version
chaos: $(READY)  ## minutes: 20 random kills, each resumed
	$(BIN)/python -m tests.chaos --kills 20

# ratios of CPU seconds against the recorded ones; exit code 1 names what got worse
bench: $(READY)  ## minutes: what got slower than the recorded ratios
	$(BIN)/python -m tests.bench.guard

bench-losses: $(READY)  ## minutes: each loss beside a plain version of the same formula
	$(BIN)/python -m tests.bench.losses

bench-methods: $(READY)  ## minutes: what each method adds to the step of two pairs
	$(BIN)/python -m tests.bench.methods

clean:  ## remove caches; runs and prepared data stay
	rm -rf build dist distill.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find distill pipelines shards tests -name __pycache__ -prune -exec rm -rf {} +

clean-demo:  ## remove the demonstration's runs and shards, nothing else
	rm -rf $(DIGITS) data/digits
