"""Models that are no causal language models, with two trained adapters, in onnx, qairt and qnn.

    PYTHONPATH=tests python benchmarks/any_model.py    writes results/any_model.json and the table
    PYTHONPATH=tests python benchmarks/any_model.py unet    this model only; other rows stay

Needs `pip install 'qwlora[qnn]' diffusers`. The models are those of tests/targets/any_models.py,
and a Qwen2-VL: tiny and random, but their adapters are trained, each on its own data.
`qwlora.export` writes each target from one simulation, and `qwlora.verify` checks it. Then the
adapters run one after another, for onnx and qnn in one session: first, second, none, first. Outputs
are compared with the simulation's, on examples used in neither training nor calibration.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qwlora
from measuring import (
    distance,
    earlier_result,
    machine_line,
    markdown,
    write_result,
    write_table,
)
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.targets.npu.kv_cache_graphs import CachedGraphs
from qwlora.targets.npu.qnn import QnnModel
from qwlora.targets.registry import TARGETS
from simulation.tiny_architectures import VISION_LANGUAGE, image_and_text, with_large_weights
from targets.any_models import HTP, KINDS, Kind, batches, frozen, train_

MODELS = {  # name, layers with LoRA
    "cnn": ("convolutional network", "convolutions, Linear"),
    "bert": ("BERT, classification", "query, value"),
    "dit": ("Stable Diffusion 3 transformer (DiT)", "to_q, to_v"),
    "unet": ("Stable Diffusion UNet", "attention"),
    "vlm": ("Qwen2-VL, language model", "attention, MLP"),
}
WRITTEN = ("onnx", "qairt", "qnn")
SWITCHED = ("first", "second", "base", "first")
SIZES: dict[str, Any] = {"graphs": [12, 1], "context": [24]}
PACKAGES = ("torch", "diffusers", "transformers", "peft", "onnxruntime", "onnxruntime-qnn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(MODELS))
    parser.add_argument("--steps", type=int, default=60, help="training steps of an adapter")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for kind in chosen.kinds:
        row = measured(kind, chosen.steps)
        models = earlier_result("any_model").get("models", {}) | {kind: row}
        write_result("any_model", {"machine": machine_line(PACKAGES), "models": models})
    page = f"{table(models)}\n\n{machine_line(PACKAGES)}"
    write_table("log/runtimes.md", "any_model.py", page)
    print(page)


@cache
def qwen2_vl() -> Any:
    torch.manual_seed(0)
    return with_large_weights(VISION_LANGUAGE["Qwen2-VL"]())


def image_among_words(adapter: str, g: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Embeddings of words and of an image of four tokens, and the token that follows: 0 or 1, by
    the image, or by the words after it."""
    label, seed = torch.randint(0, 2, (1,), generator=g), torch.randint(2**31, (1,), generator=g)
    both = image_and_text(qwen2_vl(), int(seed))
    batch = {n: t[:, :1] if n == "position_ids" else t[:1] for n, t in both.items()}
    embeddings = batch["inputs_embeds"]
    decisive = embeddings[:, 3:7] if adapter == "first" else embeddings[:, 7:]
    decisive[..., :32] += (2 * label - 1) * embeddings.std()
    expected = torch.full((1, 12), -100)  # ignored by the loss
    expected[0, -1] = label
    return batch, expected


KINDS["vlm"] = Kind(
    lambda: deepcopy(qwen2_vl()),
    r"model\.language_model.*_proj",
    image_among_words,
    replace(HTP, key_value_bitwidth=8),
    tower="model.visual*",
)


def measured(kind: str, steps: int) -> dict[str, Any]:
    """Losses of training, and what each target computes."""
    began, known = time.process_time(), KINDS[kind]
    model: Any = frozen(kind, rank=4)
    losses = train_(model, kind, steps)
    row: dict[str, Any] = {
        "loss": {name: [mean(own[:10]), mean(own[-10:])] for name, own in losses.items()}
    }
    seen, unseen = batches(kind), batches(kind, seed=2)
    made = qwlora.simulate_adapters(model.eval(), seen[0], known.schemes, "none")
    made.calibrate(seen)
    ids = torch.randint(7, 256, (2, 12), generator=torch.Generator().manual_seed(3))
    is_language = kind == "vlm"
    sample, sizes = ({"input_ids": ids[:1]}, SIZES) if is_language else (seen[0], {})
    for target in WRITTEN:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / target
            qwlora.export(made, target, folder, sample=sample, **sizes)
            checks = qwlora.verify(folder, made, ids if is_language else unseen)
            row[target] = {
                "checks": len(checks),
                "failed": [check.sentence for check in checks if not check.passed],
                **switched(target, folder, made, unseen, Path(scratch)),
            }
            print(kind, target, json.dumps(row[target]), flush=True)
    return {**row, "processor_seconds": round(time.process_time() - began)}


def mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def switched(
    target: str,
    folder: Path,
    made: AdapterSimulations,
    examples: list[dict[str, Tensor]],
    scratch: Path,
) -> dict[str, Any]:
    """dB by adapter, on the CPU and on the HTP, and what the HTP left to the CPU."""
    if target == "qairt":  # use cases are files of their own, which QAIRT's importer switches
        cases = {name: "none" if name == "base" else name for name in SWITCHED}
        opened = {name: TARGETS[target].open(folder, case) for name, case in cases.items()}
        return {"cpu": compared(made, examples, lambda name: opened[name])}
    if target == "onnx":
        session = TARGETS[target].open(folder, "first")

        def use(name: str) -> Any:
            session.use(None if name == "base" else folder / name)
            return session

        return {"cpu": compared(made, examples, use)}
    found: dict[str, Any] = {}
    for place in ("cpu", "htp"):
        profiles = scratch if place == "htp" else None
        graphs = QnnModel(folder / "base", folder / "first", place == "htp", profiles)

        def switch(name: str, graphs: QnnModel = graphs) -> Any:
            graphs.use(folder / ("zero" if name == "base" else name))
            return graphs

        found[place] = compared(made, examples, switch)
        if profiles:
            (found["placement"],) = graphs.placement().values()
    return found


def compared(
    made: AdapterSimulations, examples: list[dict[str, Tensor]], use: Callable[[str], Any]
) -> dict[str, Any]:
    """dB of each adapter, of all examples together; whether the first adapter returns the same bits
    after the others; and how far apart adapters are."""
    outputs, expected = list[Tensor](), dict[str, Tensor]()
    for name in SWITCHED:
        runtime, simulation = use(name), made[name]
        primary = simulation.graph().interface.primary
        outputs.append(torch.cat([output(runtime, simulation.bind(b), primary) for b in examples]))
        expected[name] = torch.cat([simulation.outputs(b)[primary] for b in examples])
    return {
        **{n: decibels(o, expected[n]) for n, o in zip(SWITCHED, outputs, strict=True)},
        "equal_on_return": torch.equal(outputs[0], outputs[-1]),
        "second_to_first": decibels(expected["second"], expected["first"]),
    }


def decibels(found: Tensor, expected: Tensor) -> float | None:
    """Signal to noise in dB; None if they are equal."""
    ratio = distance(found, expected)["sqnr"]
    return None if math.isinf(ratio) else round(ratio, 1)


def output(runtime: Any, inputs: dict[str, Tensor], primary: str) -> Tensor:
    """The output of one example; a graph with a key-value cache takes all tokens in one call."""
    if isinstance(runtime, CachedGraphs) and runtime.context:
        embeddings, positions = inputs["inputs_embeds"], inputs["position_ids"]
        cache = runtime.empty_cache()
        outputs = runtime.call("prompt_ar12_cl24", embeddings, 0, cache, positions=positions)[1]
    else:
        outputs = runtime.run(inputs)
    result: Tensor = outputs[primary]
    return result


def table(models: dict[str, Any]) -> str:
    head = ["model", "LoRA on", "loss", "second to first", "`onnx`", "`qairt`", "`qnn` on the CPU"]
    head += ["`qnn` on the HTP", "partitions", "nodes on the CPU", "equal on return", "verify"]
    rows = []
    for kind, row in ((kind, models[kind]) for kind in MODELS if kind in models):
        onnx, qairt, qnn = (row[target] for target in WRITTEN)
        onnx, qairt, cpu, htp = onnx["cpu"], qairt["cpu"], qnn["cpu"], qnn["htp"]
        place = qnn["placement"]
        losses = [f"{before:.2f} to {after:.2f}" for before, after in row["loss"].values()]
        failed = [sentence for target in WRITTEN for sentence in row[target]["failed"]]
        rows.append(
            [
                *MODELS[kind],
                ", ".join(losses),
                shown(onnx["second_to_first"]),
                *(
                    ", ".join(shown(run[n]) for n in SWITCHED[:3])
                    for run in (onnx, qairt, cpu, htp)
                ),
                place["partitions"],
                ", ".join(place["cpu_names"][: place["cpu_nodes"]]) or "none",
                "yes" if all(run["equal_on_return"] for run in (onnx, cpu, htp)) else "no",
                "; ".join(failed) or "passes",
            ]
        )
    return markdown(head, rows)


def shown(value: float | None) -> str:
    return "equal" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    main()
