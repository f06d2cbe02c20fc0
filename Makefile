# Every target sets up what it needs in .venv; only a change of pyproject.toml does so again.

PYTHON ?= python3
# Installed before the rest, so that nothing else decides which build of torch there is. Override to choose another.
TORCH ?= torch==2.13.0
# Further arguments of the example: make train ARGS="--slow-worker 0.5"
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: train test lint format docs clean

train: $(INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 examples/train_lm.py $(ARGS)

test: $(INSTALLED)
# Some of the tests start interpreters that import the package: it is to be compiled once.
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 4 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

clean:
	rm -rf .venv runs build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev,examples]'
	touch $@
