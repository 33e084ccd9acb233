# Everything keeps to .venv in this folder. `make` alone lists what there is.
PYTHON ?= python3
BIN := .venv/bin
# What `make compat` and `make zoo` run with: the oldest torch that the project is said to work with, and the newest.
TORCH ?= 2.9.1
NEWEST ?= 2.15.0

.PHONY: help demo test lint paper docs documents package compat zoo benchmarks study study-small mutants clean
help:
	@echo "make demo   set everything up and run the demonstration on a real 3-D network (a minute, once 1.4 GB are installed)"
	@echo "make test   set everything up and run all the tests (many minutes, and 2.8 GB)"
	@echo "make lint   formatting, lint and types"
	@echo "make paper  compute the paper's numbers, draw its figures, build build/paper.html"
	@echo "make docs   build the site, build/docs/index.html (half a minute)"
	@echo "make documents  compute what is generated: docs/conformance.md, docs/states.md, docs/study.md, the notebook, the paper (some minutes)"
	@echo "make package  build wheel and sdist into dist, and check them"
	@echo "make compat TORCH=2.9.1  run the core's tests with this torch and note it in docs/versions.md (gigabytes)"
	@echo "make zoo    run models of torchvision and timm, and the recipes for them, with the newest torch (gigabytes)"
	@echo "make benchmarks  measure the costs and write docs/benchmarks.md and its picture (a few minutes)"
	@echo "make study  train what the study still misses, and write docs/study.md (an hour on two free cores)"
	@echo "make study-small  the same in small, into build/study-small (two minutes)"
	@echo "make mutants  change the code in small ways and list the changes that no test notices (hours; OF='momentum_fix.formula*': of one file)"
	@echo "make clean  remove .venv and caches"

.venv/with-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$*]'
	touch $@

demo: .venv/with-demo
	$(BIN)/python examples/brain.py

test: .venv/with-dev
	$(BIN)/python -m pytest --numprocesses 2 --durations=10

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
	$(BIN)/python benchmarks/zoo.py --page
	$(BIN)/python tests/versions.py
	$(BIN)/python paper.py

package: .venv/with-dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest --numprocesses 0 tests/test_package.py

# Environments beside .venv, each with a torch of its own instead of the pinned one, and everything else as pinned.
.compat/constraints.txt: constraints.txt
	mkdir -p .compat
	grep -v '^torch==' constraints.txt > $@

compat: COMPAT = .compat/$(TORCH)-$(notdir $(PYTHON))
compat: .compat/constraints.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --constraint $< --editable '.[core]' torch==$(TORCH)
	$(COMPAT)/bin/python tests/versions.py core

zoo: .compat/constraints.txt
	$(PYTHON) -m venv .compat/zoo
	.compat/zoo/bin/python -m pip install --constraint $< --editable '.[zoo]' torch==$(NEWEST)
	.compat/zoo/bin/python benchmarks/zoo.py
	.compat/zoo/bin/python tests/versions.py recipes

benchmarks: .venv/with-benchmarks
	$(BIN)/python benchmarks/run.py

study: .venv/with-study
	$(BIN)/python benchmarks/study.py --workers 2
	$(BIN)/python benchmarks/study_page.py

study-small: .venv/with-study
	$(BIN)/python benchmarks/study.py --small --workers 2
	$(BIN)/python benchmarks/study_page.py --small

mutants: export OMP_NUM_THREADS = 1
mutants: .venv/with-dev
	$(BIN)/mutmut run $(patsubst %,'%',$(OF))
	$(BIN)/mutmut results | sed '/: not checked$$/d'

clean:
	rm -rf .venv .compat build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis mutants
	find momentum_fix tests -name __pycache__ -type d -exec rm -rf {} +
