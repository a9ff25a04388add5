"""The whole job for models of every kind: step 1, adapter, two optimizer steps, capture, calibration, export, ONNX Runtime.

With `ARCHITECTURES=FILE` in the environment each model also appends its row of docs/log/architectures.md to that file.
"""

import math
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwlora import Scheme, Schemes, quantize_
from qwlora.graph.capturable_model import visible_implementations
from qwlora.graph.capture import Captured, capture
from qwlora.graph.quantized_graph import Kind
from qwlora.simulation.saved_simulation import SimulationSource
from qwlora.simulation.simulation import Simulation
from qwlora.targets.onnx.onnx import export_onnx
from qwlora.targets.proof.checks import Limits, Parity
from simulation.tiny_architectures import ALL, inputs, make
from targets.proofs import sqnr, verify_onnx_outputs

SEEDS = range(3)
# at 8 bits one value that falls on the other side of a border is 30 dB of a tiny output
BELOW_FLOOR = {16: 6.0, 8: 15.0}


def adapted(name: str) -> nn.Module:
    """A packed model with a LoRA on every linear layer."""
    model = make(name)
    report = quantize_(model, "w4-block32", "rtn")
    # where PEFT does not know the model
    linear = [path.removesuffix(".weight") for path in report.layers]
    torch.manual_seed(1)
    targets = "all-linear" if isinstance(model, PreTrainedModel) else linear
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def primary(result: Mapping[str, Any]) -> Tensor:
    return result["logits"] if "logits" in result else next(iter(result.values()))


def train(model: nn.Module, name: str) -> None:
    """Two optimizer steps on the primary output."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model.train()
    for seed in range(2):
        loss = primary(model(**inputs(name, seed))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert math.isfinite(float(loss))
    model.eval()
    changed = [not torch.equal(old, new) for old, new in zip(before, trained, strict=True)]
    assert sum(changed) > len(trained) / 2


def simulated(
    model: nn.Module, captured: Captured, name: str, bitwidth: int
) -> tuple[Simulation, float, float]:
    """(simulation, SQNR of its primary output against the model's, seconds of calibration)."""
    schemes = Schemes(Scheme(bitwidth, symmetric=False), rules=ALL[name].rules)
    simulation = Simulation(captured, SimulationSource.of(model, {}, schemes))
    start = time.perf_counter()
    simulation.calibrate([inputs(name, seed) for seed in SEEDS])
    seconds = time.perf_counter() - start
    outputs, expected = list[Tensor](), list[Tensor]()
    for seed in SEEDS:
        with torch.no_grad(), visible_implementations(model):
            expected.append(primary(model(**inputs(name, seed))).flatten())
        output = simulation.outputs(inputs(name, seed))[captured.interface.primary]
        outputs.append(output.flatten())
    return simulation, sqnr(torch.cat(outputs), torch.cat(expected)), seconds


def exported(
    simulation: Simulation, name: str, bitwidth: int, folder: Path
) -> tuple[Parity, float]:
    start = time.perf_counter()
    export_onnx(simulation.graph(), folder)
    seconds = time.perf_counter() - start
    batches, tiny = [inputs(name, seed) for seed in range(2)], ALL[name]
    limits = Limits(layer_steps=tiny.layer_steps, layer_mean_steps=tiny.layer_mean_steps)
    limits = replace(limits, below_floor=BELOW_FLOOR[bitwidth])
    return verify_onnx_outputs(folder, simulation, batches, limits), seconds


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_whole_job(name: str, tmp_path: Path) -> None:
    table = os.environ.get("ARCHITECTURES")
    with warnings.catch_warnings():
        # what libraries say about their own arguments and optional parts
        warnings.simplefilter("ignore")
        model = adapted(name)
        train(model, name)
        start = time.perf_counter()
        captured = capture(model, inputs(name))
        capture_seconds = time.perf_counter() - start
        found = {bitwidth: simulated(model, captured, name, bitwidth) for bitwidth in (16, 8)}
    simulation = found[16][0]
    packed = {m for m in simulation.marks if m.kind is Kind.BASE}
    assert len(packed) == sum(hasattr(m, "packed") for m in model.modules())
    assert 10 < found[8][1] < found[16][1] - 3
    assert found[16][1] > 30
    interface = captured.interface
    shapes = [f"{n} [{', '.join(map(str, interface.shapes[n]))}]" for n in interface.inputs]
    row: list[Any] = [name, "; ".join(shapes)]
    row += [len(captured.program.graph.nodes), len(simulation.encodings), f"{capture_seconds:.1f}"]
    row += [f"{found[16][2]:.1f}", f"{found[16][1]:.1f}", f"{found[8][1]:.1f}"]
    for bitwidth in (16, 8) if table else (16,):
        parity, seconds = exported(found[bitwidth][0], name, bitwidth, tmp_path / str(bitwidth))
        figures = parity.figures
        for key in ("sqnr", "floor_sqnr"):
            decibel = figures[key][figures["primary"]]
            row.append("equal" if math.isinf(decibel) else f"{decibel:.0f}")
        row.append(f"{figures['worst_layer_steps']:.2f}")
    if table:
        with open(table, "a") as file:
            print(f"| {' | '.join(map(str, row))} | {seconds:.0f} |", file=file)
