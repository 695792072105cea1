# `make train`, `make test`, `make bench` and `make docs`; each sets up .venv first.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
RUNTIME = $(VENV)/.runtime-installed
DEV = $(VENV)/.dev-installed
DOCS = $(VENV)/.docs-installed
# Most of a test's time is compiling, which takes one core. Free workers take over from busy ones.
PARALLEL = --numprocesses=2 --dist=worksteal

.PHONY: train test test-fast bench docs lint

train: $(RUNTIME)
	$(RUN) -m maskrcnn_jax.data.shapes data/shapes --train=4000 --val=200
	$(RUN) train.py --config=configs/shapes.py --workdir=runs/shapes
	$(RUN) predict.py --workdir=runs/shapes --input=data/shapes/val2017 --output=runs/shapes/pictures

test: $(DEV)
	$(RUN) -m pytest $(PARALLEL)

test-fast: $(DEV)
	$(RUN) -m pytest $(PARALLEL) -m "not slow"

bench: $(DEV)
	mkdir -p runs/bench
	set -e; for subject in inference train ops eval compile memory scaling export; do \
	  $(RUN) tools/benchmark.py $$subject --against=torchvision --json=runs/bench/$$subject.json \
	    --docs=docs/benchmarks.md; done

docs: $(DOCS)
	$(RUN) tools/options_page.py
	$(RUN) -m mkdocs build --strict

lint: $(DEV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(RUNTIME): pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(DEV): pyproject.toml $(RUNTIME)
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

$(DOCS): pyproject.toml $(RUNTIME)
	$(RUN) -m pip install --quiet --editable ".[docs]"
	touch $@
