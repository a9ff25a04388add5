"""A model as graphs for Qualcomm's HTP, on its emulator: what is computed, and whether whole.

    python benchmarks/npu.py    SmolLM2-135M; writes benchmarks/results/npu-MODEL-w4-channel.json,
                                and the table of all results into docs/log/runtimes.md
    python benchmarks/npu.py --weights w4-lpbq64    the same with LPBQ
    python benchmarks/npu.py --targets aimet qairt    these rows only; those of qnn stay
    python benchmarks/npu.py --layers 1 --tokens 40 --prefill 32    a smoke test on the first
                                                                    layers; writes nothing

Target qnn needs `pip install 'qwlora[qnn]'`. aimet and qairt are the same graphs as float models
with encodings, in ONNX Runtime on the CPU. The base is W4 (head and embeddings W8 per tensor),
activations have 16 bits, keys and values 8. Two adapters of rank 8 on the projections of attention,
trained for a few steps on two texts, share one grid; `zero` is the base. Tokens are held-out text:
a prefill in pieces, and the last ones one by one. Seconds are of an emulator and say nothing about
the NPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from measuring import RESULTS, SMOLLM2, distance, machine_line, markdown, train_, write_table
from qwlora import LayerRule, Scheme, Schemes, export, quantize_
from qwlora.formats.model_source import load_model, load_tokenizer
from qwlora.grid.scheme import parse_scheme
from qwlora.simulation.adapter_simulations import AdapterSimulations, simulate_adapters
from qwlora.simulation.kv_cache_graph import cache_sizes
from qwlora.simulation.simulation import Simulation
from qwlora.targets.npu.qnn import QnnModel
from qwlora.targets.proof.reference import perplexity, token_losses
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedGraph

SCHEMES = Schemes(
    quantize_residual_adds=True,
    symmetric_matmul_second_input=True,
    key_value_bitwidth=8,
    adapter_weights=Scheme(8),
)
SWITCHED = 3  # tokens
TEXTS = {
    "first": ("lambda", "class", "try", "with"),
    "second": ("strings", "numbers", "if", "while"),
}


def tokens_of(tokenizer: Any, names: tuple[str, ...]) -> torch.Tensor:
    return torch.tensor([tokenizer("\n".join(topics[n] for n in names))["input_ids"]])


def pieces(ids: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Sequences of 128 tokens, from the beginning again after the last one."""
    starts = (step * 128 % max(1, ids.shape[1] - 128) for step in range(count))
    return [ids[:, start : start + 128] for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["qnn", "aimet", "qairt"])
    parser.add_argument("--source", default=SMOLLM2, help="a model; its name is in the result's")
    parser.add_argument("--weights", default="w4-channel")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--decode", type=int, default=8, help="tokens one by one")
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6, help="training steps of an adapter")
    arguments = parser.parse_args()
    model_name = arguments.source.rpartition("/")[2].partition(".")[0].lower()
    config = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    tokenizer = load_tokenizer(arguments.source)

    def train(model: Any, name: str) -> None:
        train_(model, pieces(tokens_of(tokenizer, TEXTS[name]), arguments.steps))

    configs = dict.fromkeys(TEXTS, config)
    simulations = calibrated(
        arguments.source, arguments.weights, configs, arguments.layers, tokenizer, train
    )
    held_out = tokens_of(tokenizer, ("for", "import"))[:, : arguments.tokens]
    graphs = [arguments.prefill, 1]
    context = arguments.tokens + arguments.prefill
    file = RESULTS / f"npu-{model_name}-{arguments.weights}.json"
    result = {"machine": machine_line(), "model": model_name, "weights": arguments.weights}
    if file.exists() and not arguments.layers:
        result = json.loads(file.read_text())
    for target in arguments.targets:
        folder = Path(tempfile.mkdtemp()) / target
        if target == "qnn":
            result |= on_htp(simulations, graphs, context, held_out, arguments.decode, folder)
        else:
            made = exported(simulations, graphs, context, held_out)
            result[target] = as_floats(target, made, held_out, arguments.decode, folder)
        shutil.rmtree(folder.parent)
    if arguments.layers:
        print(table([result]))
    else:
        file.write_text(json.dumps(result, indent=1) + "\n")
        results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("npu-*.json"))]
        write_table("log/runtimes.md", "npu.py", f"{table(results)}\n\n{results[0]['machine']}")


def calibrated(
    source: str,
    weights: str,
    configs: Mapping[str, LoraConfig],
    layers: int | None,
    tokenizer: Any,
    train: Callable[[Any, str], None],
) -> AdapterSimulations:
    """Simulations of a model with adapters by name of their text, each trained by `train`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = load_model(source)
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    rules = [LayerRule("*embed_tokens", Scheme(8)), LayerRule("lm_head", Scheme(8))]
    quantize_(model, parse_scheme(weights), "search", rules=rules)
    adapted: Any = None
    for name, config in configs.items():
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    for name in configs:
        adapted.set_adapter(name)
        train(adapted, name)
    adapted.eval()
    calibration = [{"input_ids": tokens_of(tokenizer, texts)[:, :256]} for texts in TEXTS.values()]
    example = tokens_of(tokenizer, TEXTS["first"])[:, :16]
    inputs = {"input_ids": example, "attention_mask": torch.ones_like(example)}
    simulations = simulate_adapters(adapted, inputs, SCHEMES, "none")
    simulations.calibrate(calibration)
    return simulations


def exported(
    simulations: Mapping[str, Simulation], graphs: list[int], context: int, ids: torch.Tensor
) -> dict[str, ExportedGraph]:
    """What targets are given, by use case."""
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        "none" if name == "base" else name: ExportedGraph(
            simulations[name], {}, sample, "1.0.0", cache_sizes(graphs, [context])
        )
        for name in (*TEXTS, "base")
    }


def as_floats(
    target: str, made: dict[str, ExportedGraph], ids: torch.Tensor, decode: int, folder: Path
) -> dict[str, Any]:
    """The rows of target aimet or qairt."""
    rows, kind = {}, TARGETS[target]
    if kind.has_cases:
        kind.backend.write_cases(replace(made["none"], updatable="none"), made, folder)
    for name, one in made.items():
        began = time.perf_counter()
        if kind.has_cases:
            opened = kind.backend.open(folder, name)
            size = sizes(kind.backend.own_files(folder, name))
        elif name == "none":
            continue
        else:
            kind.backend.write_adapter(one, folder, folder / name)
            opened, size = (
                kind.backend.open(folder / name, name),
                sizes((folder / name).rglob("*")),
            )
        simulation = one.simulation
        found = {"cpu": opened.logits(ids, decode)}
        rows[name] = {**compared(simulation, found, ids), "bytes": size}
        rows[name]["seconds"] = time.perf_counter() - began
        print(target, name, json.dumps(rows[name]), flush=True)
        if target == "aimet":
            shutil.rmtree(folder / name)
    return rows


def compared(
    simulation: Simulation, runs: Mapping[str, torch.Tensor], ids: torch.Tensor
) -> dict[str, Any]:
    """Logits of runtimes and of a second simulation against the simulation."""
    expected, perturbed = (
        simulation.logits(ids),
        simulation.perturbed_outputs({"input_ids": ids})["logits"],
    )
    floor = against(perturbed, expected, ids)
    return {
        "tokens": ids.shape[1],
        "simulated_perplexity": against(expected, expected, ids)["perplexity"],
        "perturbed_sqnr": floor["sqnr"],
        "perturbed_top1_agreement": floor["top1_agreement"],
        **{place: against(logits, expected, ids) for place, logits in runs.items()},
    }


def against(logits: torch.Tensor, expected: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Perplexity, SQNR in dB and the share of tokens with the same likeliest next token."""
    losses = token_losses(logits, ids[0])
    return {
        "perplexity": perplexity(float(losses.sum()), len(losses)),
        **distance(logits, expected),
    }


def sizes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def on_htp(
    simulations: AdapterSimulations,
    graphs: list[int],
    context: int,
    held_out: torch.Tensor,
    decode: int,
    folder: Path,
) -> dict[str, Any]:
    """The result of target qnn."""
    began = time.perf_counter()
    export(simulations, "qnn", folder, graphs=graphs, context=[context])
    export_seconds = time.perf_counter() - began
    print(f"exported in {export_seconds:.0f} s", flush=True)
    rows = {}
    for name in (*TEXTS, "zero"):
        began = time.perf_counter()
        simulation = simulations["base" if name == "zero" else name]
        parts = (folder / "base", folder / name)
        with tempfile.TemporaryDirectory() as profiles:
            on_htp = QnnModel(*parts, htp=True, profiles=Path(profiles))
            runs = {
                "cpu": QnnModel(*parts, htp=False).logits(held_out, decode),
                "htp": on_htp.logits(held_out, decode),
            }
            placement = on_htp.placement()
        both = against(runs["htp"], runs["cpu"], held_out)
        rows[name] = {
            **compared(simulation, runs, held_out),
            "htp_sqnr": both["sqnr"],
            "htp_top1_agreement": both["top1_agreement"],
            "placement": placement,
            "bytes": sizes((folder / name).iterdir()),
            "seconds": time.perf_counter() - began,
        }
        print(name, json.dumps(rows[name]), flush=True)
    return {
        "export_seconds": export_seconds,
        "switching_equals_separate_runs": switching(folder, held_out[:, :SWITCHED]),
        "base_bytes": {f.name: f.stat().st_size for f in sorted((folder / "base").iterdir())},
        "adapters": rows,
    }


def switching(folder: Path, ids: torch.Tensor) -> bool:
    """Whether adapters switched in the loaded graph of one token give the bits of graphs that were
    loaded for each."""
    switched = QnnModel(folder / "base", folder / "first", htp=True)
    same = True
    for name in ("zero", "second", "first"):
        switched.use(folder / name)
        alone = QnnModel(folder / "base", folder / name, htp=True)
        same &= torch.equal(switched.logits(ids, ids.shape[1]), alone.logits(ids, ids.shape[1]))
    return same


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for target in ("aimet", "qairt", "qnn"):
            of_target = result.get("adapters" if target == "qnn" else target, {})
            for name, row in of_target.items():
                cpu, htp, placed = row["cpu"], row.get("htp"), row.get("placement", {}).values()
                ran = [f"{row['simulated_perplexity']:.3f}", f"{cpu['perplexity']:.3f}", "not run"]
                distances, agreement = (
                    ["not run", "not run"],
                    f"CPU to simulation {cpu['top1_agreement']:.1%}",
                )
                if htp:
                    ran[2] = f"{htp['perplexity']:.3f}"
                    distances = [sqnr(row, "htp_sqnr"), sqnr(htp)]
                    agreement = f"{row['htp_top1_agreement']:.1%}, {htp['top1_agreement']:.1%}"
                rows.append(
                    [
                        *(result["model"], result["weights"], target, name, ", ".join(ran)),
                        f"{', '.join([*distances, sqnr(cpu)])}; {sqnr(row, 'perturbed_sqnr')} dB",
                        f"{agreement}; {row['perturbed_top1_agreement']:.1%}",
                        ", ".join(str(p["partitions"]) for p in placed),
                        sum(p["cpu_nodes"] for p in placed) if htp else "",
                        f"{row['bytes']:,}",
                    ]
                )
    head = ["model", "weights", "target", "adapter", "perplexity simulated, CPU, HTP"]
    head += ["logits: HTP to CPU, HTP to simulation, CPU to simulation; two simulations"]
    head += ["same likeliest token: HTP to CPU, HTP to simulation; two simulations"]
    return markdown([*head, "partitions", "CPU nodes", "bytes"], rows)


def sqnr(found: dict[str, Any], key: str = "sqnr") -> str:
    """In dB; results have it if it is finite."""
    return f"{found[key]:.1f}" if key in found else "infinite"


if __name__ == "__main__":
    main()
