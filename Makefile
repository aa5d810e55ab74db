# Two commands: `make bench` and `make test`, from a fresh clone, with or without a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# The oldest and the newest Triton that headfold takes: the Hopper kernels are compiled by both.
TRITONS := 3.6.0 3.9.0
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: bench test check lint setup tritons clean

bench: setup  ## Measure attention on the shapes of real models, beside PyTorch, on this machine.
	$(BIN)/headfold bench $(ARGS)

test: setup lint tritons  ## Run every test that this machine can run.
	$(BIN)/pytest -n $(WORKERS) tests --ignore tests/aot
	$(BIN)/pytest -n $(WORKERS) --dist loadfile tests/aot

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.ready

tritons: $(TRITONS:%=$(VENV)/triton-%/.ready)

$(VENV)/triton-%/.ready: $(VENV)/.ready
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(@D) triton==$*
	touch $@

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
