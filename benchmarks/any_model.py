"""Models that are no causal language models, with two trained adapters, in onnx, qairt and qnn.

    PYTHONPATH=tests python benchmarks/any_model.py    writes results/any_model.json, prints a table
    PYTHONPATH=tests python benchmarks/any_model.py unet    this model only; other rows stay

Needs `pip install 'qwlora[qnn]' diffusers`. The models are those of tests/targets/any_models.py:
tiny and random, but their adapters are trained, each on its own data. In one session of each
runtime, the adapters run one after another: first, second, none, first. Compared is the output with
the simulation's, on examples that no adapter was trained on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qwlora
from measuring import distance, earlier_result, machine_line, markdown, write_result
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.targets.npu.qnn import QnnModel
from qwlora.targets.registry import TARGETS
from targets.any_models import HTP, KINDS, batches, frozen, train_

NAMES = {
    "cnn": "convolutional network",
    "bert": "BERT, classification",
    "dit": "Stable Diffusion 3 transformer (DiT)",
    "unet": "Stable Diffusion UNet",
}
MODES: dict[Any, tuple[str, ...]] = {"none": ("qnn", "onnx"), "adapter_only": ("qairt",)}
SWITCHED = ("first", "second", "base", "first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--steps", type=int, default=60, help="training steps of an adapter")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for kind in chosen.kinds:
        row = measured(kind, chosen.steps)
        result = earlier_result("any_model") | {kind: row}
        write_result("any_model", result)
    packages = ("torch", "diffusers", "transformers", "peft", "onnxruntime", "onnxruntime-qnn")
    print(f"{table(result)}\n\n{machine_line(packages)}")


def measured(kind: str, steps: int) -> dict[str, Any]:
    """Losses of training, and what each target computes."""
    model: Any = frozen(kind, rank=4)
    losses = train_(model, kind, steps)
    found: dict[str, Any] = {
        "loss": {name: [mean(own[:10]), mean(own[-10:])] for name, own in losses.items()}
    }
    examples = batches(kind)
    for mode, targets in MODES.items():
        made = qwlora.simulate_adapters(model.eval(), examples[0], HTP, mode)
        made.calibrate(examples)
        for target in targets:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / target
                qwlora.export(made, target, folder, sample=examples[0])
                found[target] = of_target(target, folder, made, examples, Path(scratch))
                print(kind, target, json.dumps(found[target]), flush=True)
    return found


def mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def of_target(
    target: str,
    folder: Path,
    made: AdapterSimulations,
    examples: list[dict[str, Tensor]],
    scratch: Path,
) -> dict[str, Any]:
    """dB by adapter, and what else there is to say of a target."""
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
            found["placement"] = graphs.placement()["forward"]
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
        outputs.append(torch.cat([runtime.run(simulation.bind(b))[primary] for b in examples]))
        expected[name] = torch.cat([simulation.outputs(b)[primary] for b in examples])
    return {
        **{n: distance(o, expected[n])["sqnr"] for n, o in zip(SWITCHED, outputs, strict=True)},
        "equal_on_return": torch.equal(outputs[0], outputs[-1]),
        "second_to_first": distance(expected["second"], expected["first"])["sqnr"],
    }


def table(result: dict[str, Any]) -> str:
    head = ["model", "loss", "`onnx`", "`qairt`", "`qnn` on the CPU", "`qnn` on the HTP"]
    head += ["partitions", "nodes on the CPU", "equal on return"]
    rows = []
    for kind, row in ((kind, result[kind]) for kind in NAMES if kind in result):
        runs = [row["onnx"]["cpu"], row["qairt"]["cpu"], row["qnn"]["cpu"], row["qnn"]["htp"]]
        place = row["qnn"]["placement"]
        losses = [f"{before:.2f} to {after:.2f}" for before, after in row["loss"].values()]
        on_cpu = place["cpu_names"][: place["cpu_nodes"]]
        rows.append(
            [
                NAMES[kind],
                ", ".join(losses),
                *(", ".join(decibels(run[n]) for n in ("first", "second", "base")) for run in runs),
                place["partitions"],
                ", ".join(on_cpu) or "none",
                "yes" if all(run["equal_on_return"] for run in runs) else "no",
            ]
        )
    return markdown(head, rows)


def decibels(value: float) -> str:
    return "equal" if value == float("inf") else f"{value:.0f}"


if __name__ == "__main__":
    main()
