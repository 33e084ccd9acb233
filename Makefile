# Everything keeps to .venv in this folder. `make` alone lists what there is.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint paper docs documents benchmarks study study-small clean
help:
	@echo "make demo   set everything up and run the demonstration on a real 3-D network (a few minutes)"
	@echo "make test   set everything up and run all the tests"
	@echo "make lint   formatting, lint and types"
	@echo "make paper  compute the paper's numbers, draw its figures, build build/paper.html"
	@echo "make docs   build the site, build/docs/index.html (half a minute)"
	@echo "make documents  compute what is generated: docs/conformance.md, docs/states.md, docs/study.md, the notebook, the paper (some minutes)"
	@echo "make benchmarks  measure the costs and write docs/benchmarks.md and its picture (a few minutes)"
	@echo "make study  train, and write what uncorrected passes change into docs/study.md (an hour on two free cores)"
	@echo "make study-small  the same in small, into build/study-small (two minutes)"
	@echo "make clean  remove .venv and caches"

.venv/with-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

demo: .venv/with-demo
	$(BIN)/python examples/brain.py

test: .venv/with-dev
	$(BIN)/python -m pytest --numprocesses 2

lint: .venv/with-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/basedpyright

paper: .venv/with-dev
	$(BIN)/python paper.py

docs: .venv/with-docs
	rm -rf build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -c docs/site . build/docs
	cp build/docs/README.html build/docs/index.html

documents: .venv/with-dev
	$(BIN)/python tests/conformance.py
	$(BIN)/python tests/states.py
	$(BIN)/python notebooks/execute.py
	$(BIN)/python benchmarks/study_page.py
	$(BIN)/python paper.py

benchmarks: .venv/with-benchmarks
	$(BIN)/python benchmarks/run.py

study: .venv/with-study
	$(BIN)/python benchmarks/study.py

study-small: .venv/with-study
	$(BIN)/python benchmarks/study.py --small

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis mutants
	find momentum_fix tests -name __pycache__ -type d -exec rm -rf {} +
