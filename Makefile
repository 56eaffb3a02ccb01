# Two commands: `make run` (the demonstration) and `make test`. Both set up what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
DIGITS := runs/digits

export PYTHONUNBUFFERED := 1
export HF_HUB_OFFLINE ?= 1

.PHONY: run test test-compile lint setup chaos bench bench-losses clean

setup: $(READY)

# uv resolves and installs in half a minute what pip takes minutes for; where it cannot be had, pip does
$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	{ $(BIN)/python -m pip install --quiet uv && $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --requirement requirements.lock; } \
	  || $(BIN)/python -m pip install --requirement requirements.lock
	touch $(READY)

run: $(READY)
	rm -rf $(DIGITS)/teacher $(DIGITS)/baseline $(DIGITS)/distilled
	$(BIN)/python shards/prepare.py digits --out data/digits
	$(LAUNCH) pipelines/imagenet.py --recipe pipelines/recipes/digits/teacher.yaml --out $(DIGITS)/teacher
	$(LAUNCH) pipelines/imagenet.py --recipe pipelines/recipes/digits/baseline.yaml --out $(DIGITS)/baseline
	$(LAUNCH) pipelines/imagenet.py --recipe pipelines/recipes/digits/distilled.yaml --out $(DIGITS)/distilled \
	  --teacher-weights $(DIGITS)/teacher/student
	@echo
	@$(BIN)/python pipelines/compare.py $(DIGITS)/teacher $(DIGITS)/baseline $(DIGITS)/distilled

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# the main command under torch.compile's own backend; `make test` has every mechanism under a cheaper one
test-compile: lint
	TEST_COMPILE=1 $(BIN)/python -m pytest tests/pipelines/test_compile.py

# minutes of random kills; `make test` has a short version
chaos: $(READY)
	$(BIN)/python -m tests.chaos --kills 20

# ratios against the recorded ones, on a CPU; exit code 1 names what got worse
bench: $(READY)
	$(BIN)/python -m tests.bench.guard

bench-losses: $(READY)
	$(BIN)/python -m tests.bench.losses

clean:
	rm -rf runs data .pytest_cache .mypy_cache .ruff_cache .hypothesis
