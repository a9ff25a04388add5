"""QW-LoRA on SmolLM2-135M in aimet-torch and in QWLoRA, step by step.

    python benchmarks/aimet.py OUT --aimet PYTHON --qnn PYTHON

`make benchmark-aimet` makes the environments and runs it. Each tool runs in its own process, on one
thread (`aimet_theirs.py` is the other side). What is in OUT already is not run again. Writes
benchmarks/results/aimet.json, and the table into docs/log/simulation.md.

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
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import onnx
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, nll_loss
from transformers import AutoModelForCausalLM

from measuring import (
    SMOLLM2,
    Phases,
    distance,
    earlier_result,
    machine_line,
    markdown,
    run_python,
    train_,
    write_result,
    write_table,
)
from qwlora import LayerRule, Scheme, Schemes, quantize_
from qwlora.errors import ExportError
from qwlora.formats.model_source import load_model, load_tokenizer
from qwlora.grid.scheme import parse_scheme
from qwlora.nn.packed_layer import packed_layers
from qwlora.simulation.adapter_simulations import simulate_adapters
from qwlora.simulation.kv_cache_graph import cache_sizes
from qwlora.system.atomic import write_text
from qwlora.targets.npu.float_onnx import MOVES
from qwlora.targets.npu.qnn import QnnModel, open_graph, placement
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedGraph

BASES = {"w4-channel": None, "w4-lpbq64": 64}  # block size
TEXTS = {"training": (15, 256), "calibration": (4, 256), "evaluation": (4, 256)}  # sequences
COMPARED_STEPS, GRAPH_TOKENS = 5, 64
TOOLS = {"aimet": "AIMET", "qwlora": "QWLoRA"}
# operators whose results are on the grid of what they read, or that are no computation
NO_COMPUTATION = MOVES | {"Cast", "Constant", "ConstantOfShape", "Trilu"}
Column = dict[str, Any]
Cell = Callable[[Column], str]
SCHEMES = Schemes(
    quantize_residual_adds=True,
    symmetric_matmul_second_input=True,
    key_value_bitwidth=16,
    adapter_weights=Scheme(8),
)


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
        ("qwlora", "aimet/model.aimet", "qnn/first/adapter.safetensors", "qnn/base/prompt_*.onnx"),
    ):
        out = folder / tool
        files = [file for file in sorted((out / model).iterdir()) if file.stem == "model"]
        found[tool] = {
            "files": {file.name: file.stat().st_size for file in files},
            **encodings_of(out / model),
            **adapter_of(out / adapter, next(out.glob(graph))),
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


def run_qwlora(folder: Path) -> dict[str, Any]:
    """QWLoRA's side: the same steps as `aimet_theirs.py`."""
    settings = json.loads((folder / "settings.json").read_text())
    phases, texts = Phases(), load_file(folder / "texts.safetensors")
    out = folder / "qwlora"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "float", attn_implementation="eager")
    rules = [LayerRule("*embed_tokens", Scheme(8)), LayerRule("lm_head", Scheme(8))]
    with phases("quantize"):
        quantize_(model, parse_scheme(settings["weights"]), "rtn", rules=rules)
    rounded = {
        f"{n}.weight": layer.weight.detach().clone() for n, layer in packed_layers(model).items()
    }
    save_file(rounded, folder / "rounded.safetensors")
    del rounded
    adapted = PeftModel.from_pretrained(model, folder / "start", is_trainable=True)
    training, compared = texts["training"].split(1), settings["compared_steps"]
    with phases("train"):
        losses = train_(adapted, training[:compared])
    train_(adapted, training[compared:])
    adapted.save_pretrained(folder / "trained")

    adapted.requires_grad_(False).eval()
    ids = texts["evaluation"][:1, : settings["graph_tokens"]]
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with phases("simulate"):
        simulations = simulate_adapters(adapted, example, SCHEMES, "none")
    own = simulations["default"]
    with phases("calibrate"):
        simulations.calibrate([{"input_ids": each} for each in texts["calibration"].split(1)])
    with phases("evaluate"):
        simulated = {
            name: torch.cat([simulations[each].logits(ids) for ids in texts["evaluation"].split(1)])
            for name, each in (("adapter", "default"), ("base", "base"))
        }
    save_file(simulated, folder / "qwlora-logits.safetensors")
    with phases("export"):
        exported = ExportedGraph(own, {}, example)
        TARGETS["aimet"].backend.write_adapter(exported, out / "aimet", out / "aimet")
    tokens = settings["graph_tokens"]
    with phases("export for the HTP"):
        exported = ExportedGraph(own, {}, example, graphs=cache_sizes([tokens], [2 * tokens]))
        TARGETS["qnn"].backend.write_cases(exported, {"first": exported}, out / "qnn")
    return {
        "machine": machine_line(),
        "phases": phases.figures,
        "losses": losses,
        "activation_quantizers": len(own.quantizers),
    }


def qwlora_logits(folder: Path, ids: Tensor, htp: bool) -> tuple[Tensor, dict[str, int]]:
    bundle = folder / "qwlora" / "qnn"
    with tempfile.TemporaryDirectory() as scratch:
        model = QnnModel(bundle / "base", bundle / "first", htp, profiles=Path(scratch))
        return model.logits(ids), next(iter(model.placement().values()))


def aimet_logits(folder: Path, ids: Tensor, htp: bool) -> tuple[Tensor, dict[str, int]]:
    with tempfile.TemporaryDirectory() as scratch:
        session = open_graph(folder / "aimet" / "qdq" / "model.onnx", htp, Path(scratch) / "run")
        feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        names = [each.name for each in session.get_inputs()]
        (logits,) = session.run(None, {name: feed[name] for name in names})
        return torch.from_numpy(logits), placement(session, len(names) + 1)


def run_on_htp(folder: Path, tool: str) -> dict[str, Any]:
    """One call of the graph that a tool exported, with the adapter, on Qualcomm's HTP emulator."""
    run = {"aimet": aimet_logits, "qwlora": qwlora_logits}[tool]
    tokens = json.loads((folder / "settings.json").read_text())["graph_tokens"]
    ids = load_file(folder / "texts.safetensors")["evaluation"][:1, :tokens]
    simulated = load_file(folder / f"{tool}-logits.safetensors")["adapter"][:1, :tokens]

    def of_tokens(logits: Tensor) -> float:
        return math.exp(float(cross_entropy(logits[0, :-1], ids[0, 1:])))

    on_cpu, _ = run(folder, ids, False)
    result: dict[str, Any] = {
        "tokens": tokens,
        "simulated_perplexity": of_tokens(simulated),
        "cpu": {"perplexity": of_tokens(on_cpu), **distance(on_cpu, simulated)},
    }
    began = time.perf_counter()
    try:
        on_htp, placed = run(folder, ids, True)
    except ExportError as error:
        result["refused"] = str(error)
    else:
        result["htp"] = {"perplexity": of_tokens(on_htp), **distance(on_htp, simulated)}
        result |= {"htp_to_cpu": distance(on_htp, on_cpu), "placement": placed}
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def measure(weights: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one base."""
    folder = options.out / weights
    if not (folder / "settings.json").exists():
        prepare(options.source, weights, folder)
    theirs = Path(__file__).with_name("aimet_theirs.py")

    def ran(name: str, python: str, *arguments: str | Path) -> Any:
        return once(folder / f"{name}.json", lambda: run_python(*arguments, python=python))

    result = {"qwlora": ran("qwlora", sys.executable, __file__, folder, "--side", "qwlora")}
    # takes the adapter of the first
    result["aimet"] = ran("aimet", options.aimet, theirs, folder)
    result["handed_over"] = handed_over(folder)
    result["quality"] = once(folder / "quality.json", lambda: quality(folder))
    if options.qnn:
        result["htp"] = {
            tool: ran(f"{tool}-htp", options.qnn, __file__, folder, "--side", f"{tool}-htp")
            for tool in TOOLS
        }
    return result


def table(results: dict[str, Any], steps: int) -> str:
    """Markdown of what `aimet.py` measured, by base.

    Args:
        steps: of training, in its phase.
    """
    columns = [
        {
            **result[tool],
            **result["quality"][tool],
            "files": result["handed_over"][tool],
            "htp": result.get("htp", {}).get(tool),
        }
        for result in results.values()
        for tool in TOOLS
    ]
    heads = [f"{name}, {weights}" for weights in results for name in TOOLS.values()]
    cells = rows(list(columns[0]["phases"]), steps)
    lines = [markdown(["", *heads], [[name, *map(cell, columns)] for name, cell in cells.items()])]
    one = next(iter(results.values()))
    adapters = ", ".join(
        f"with the adapter of {weights} {result['quality']['float']['adapter']['perplexity']:.3f}"
        for weights, result in results.items()
    )
    floats = one["quality"]["float"]["base"]["perplexity"]
    lines.append(f"\nPerplexity of the float model: {floats:.3f}; {adapters}.")
    for tool, name in TOOLS.items():
        missing = one["handed_over"][tool]["computed_without_an_encoding"].items()
        operators = ", ".join(f"{operator} {count}" for operator, count in missing)
        lines.append(f"\nValues without an encoding, {name}: {operators}.")
    lines += [f"\n{name}: {one[tool]['machine']}" for tool, name in TOOLS.items()]
    return "\n".join(lines)


def rows(phases: list[str], steps: int) -> dict[str, Cell]:
    """What a column shows, by name of the row."""
    found: dict[str, Cell] = {}
    for kind in ("base", "adapter"):
        found[f"perplexity, {kind}"] = lambda c, kind=kind: f"{c[kind]['perplexity']:.3f}"
        found[f"KL from float, {kind}"] = lambda c, kind=kind: f"{c[kind]['kl']:.4f}"
    found["quantizers of activations"] = lambda c: str(c["activation_quantizers"])
    for phase in phases:
        times = steps if phase == "train" else 1
        name = phase if times == 1 else "training step"
        found[f"{name}: processor seconds, peak memory"] = partial(cost, phase, times)
    return found | {
        "bytes of model and encodings": lambda c: f"{sum(c['files']['files'].values()):,}",
        "parameter encodings that name an initializer": lambda c: (
            f"{c['files']['parameters_that_are_initializers']} of {c['files']['parameters']}"
        ),
        "computed values without an encoding": lambda c: (
            f"{sum(c['files']['computed_without_an_encoding'].values())} "
            f"of {c['files']['computed']}"
        ),
        "adapter's tensors: inputs of the graph, initializers": lambda c: (
            f"{c['files']['adapter_inputs']}, {c['files']['adapter_initializers']} "
            f"of {c['files']['adapter_tensors']}"
        ),
        "HTP: partitions, nodes on the CPU": on_htp(
            lambda r: f"{r['placement']['partitions']}, {r['placement']['cpu_nodes']}"
        ),
        "HTP to ONNX Runtime's CPU, to the simulation": on_htp(
            lambda r: f"{r['htp_to_cpu']['sqnr']:.1f}, {r['htp']['sqnr']:.1f} dB"
        ),
        "HTP and simulation: same likeliest token": on_htp(
            lambda r: f"{r['htp']['top1_agreement']:.1%}"
        ),
        "perplexity of the graph's tokens: simulated, CPU, HTP": on_htp(
            lambda r: (
                f"{r['simulated_perplexity']:.3f}, {r['cpu']['perplexity']:.3f}, "
                f"{r['htp']['perplexity']:.3f}"
            )
        ),
    }


def cost(phase: str, times: int, column: Column) -> str:
    used = column["phases"][phase]
    return f"{used['processor_seconds'] / times:.1f}, {used['peak_bytes'] / 1e9:.2f} GB"


def on_htp(show: Callable[[dict[str, Any]], str]) -> Cell:
    def cell(column: Column) -> str:
        run = column["htp"]
        if run is None:
            return "not run"
        return "refused" if "refused" in run else show(run)

    return cell


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--aimet", help="a Python with aimet-torch")
    parser.add_argument("--qnn", help="a Python with onnxruntime-qnn")
    parser.add_argument("--weights", nargs="*", choices=BASES, default=list(BASES))
    parser.add_argument("--source", default=SMOLLM2, help="another Llama; writes no result")
    sides = ("qwlora", *(f"{tool}-htp" for tool in TOOLS))
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.side:
        tool, _, on_htp = options.side.partition("-")
        print(json.dumps(run_on_htp(options.out, tool) if on_htp else run_qwlora(options.out)))
        return
    if not options.aimet:
        parser.error("--aimet is needed")
    results = {weights: measure(weights, options) for weights in options.weights}
    if options.source == SMOLLM2:
        results = earlier_result("aimet") | results
        write_result("aimet", results)
        write_table("log/simulation.md", "aimet.py", table(results, COMPARED_STEPS))
    print(table(results, COMPARED_STEPS))


if __name__ == "__main__":
    main()
