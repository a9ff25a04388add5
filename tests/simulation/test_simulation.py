"""Capture, placement, calibration, simulation."""

from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from conftest import EACH_ARCHITECTURE
from qwlora import Scheme, simulate
from qwlora.analysis.quantization_costs import sensitivities
from qwlora.errors import CalibrationError, CaptureError
from qwlora.graph.capturable_model import visible_implementations
from qwlora.graph.capture import capture
from qwlora.graph.quantized_graph import Kind
from qwlora.simulation.simulation import Simulation
from qwlora.targets.onnx.onnx import export_onnx
from simulation.captured import adapted_layer as adapted
from simulation.captured import batch as inputs
from targets.proofs import verify_onnx_outputs

pytestmark = pytest.mark.usefixtures("shared_captures")


@cache
def calibrated(architecture: str) -> tuple[PeftModel, Simulation]:
    model = adapted(architecture)
    simulation = simulate(model, inputs())
    simulation.calibrate([inputs(seed=s) for s in range(4)])
    return model, simulation


def test_captured_graph_shares_storage_with_the_model_and_needs_one_row() -> None:
    model, batch = adapted("llama"), inputs(3, 20)
    with pytest.raises(CaptureError, match="training mode"):
        capture(model.train(), inputs())
    graph = capture(model.eval(), inputs(rows=1)).program.module(check_guards=False)
    with torch.no_grad(), visible_implementations(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert torch.equal(graph(*batch.values())[0], model(**batch, use_cache=False).logits)


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
def test_every_value_is_decided_about_and_every_weight_has_an_encoding(architecture: str) -> None:
    model, simulation = calibrated(architecture)
    graph = simulation.graph()
    decided = {p.node for p in simulation.placement.values if p.is_computed}
    floats = {
        n.name
        for n in graph.program.graph.nodes
        if n.op == "call_function"
        and isinstance(n.meta.get("val"), torch.Tensor)
        and n.meta["val"].is_floating_point()
    }
    bases = {m.node for m in graph.marks if m.kind is Kind.BASE}
    assert decided == floats - bases
    kinds = Counter(m.kind for m in graph.marks)
    packed = sum(hasattr(m, "packed") for m in model.modules())
    assert kinds[Kind.BASE] == packed
    assert kinds[Kind.ADAPTER] == sum("lora_" in n for n, _ in model.named_parameters())
    assert set(graph.encodings) == {m.name for m in graph.marks}
    assert len({m.name for m in graph.marks}) == len(graph.marks)


def test_simulated_values_lie_on_their_grids() -> None:
    simulation = calibrated("llama")[1]
    encodings = simulation.encodings
    values = simulation.values(inputs()["input_ids"])
    assert set(values) == {m.name for m in simulation.marks if m.kind is Kind.ACTIVATION}
    for name, value in values.items():
        assert torch.equal(encodings[name].fake_quantize(value), value)
        assert len(value.unique()) <= 2**16


def test_perturbed_logits_differ_a_little() -> None:
    simulation, ids = calibrated("llama")[1], inputs()["input_ids"]
    before = simulation.logits(ids)
    perturbed = simulation.perturbed_outputs({"input_ids": ids})["logits"]
    assert 0 < (perturbed - before).abs().max() < 0.01 * before.abs().max()
    assert torch.equal(simulation.logits(ids), before)


def test_calibration_says_what_is_missing() -> None:
    simulation = simulate(adapted("llama"), inputs())
    uses = (
        simulation.graph,
        simulation.as_model,
        lambda: simulation(**inputs()),
        lambda: simulation.outputs(inputs()),
        lambda: simulation.logits(inputs()["input_ids"]),
        lambda: simulation.primary(inputs()),
        lambda: simulation.values(inputs()),
        lambda: simulation.perturbed_outputs(inputs()),
    )
    simulation.observe([inputs()])  # what was observed alone is no encoding
    missing = r"has no encoding yet; call calibrate, .*simulation.only\(\):`"
    for use in uses:
        with pytest.raises(CalibrationError, match=missing):
            use()
    with simulation.only("*.lora_A.weight"):
        assert torch.isfinite(simulation.logits(inputs()["input_ids"])).all()
    simulation.freeze()
    for use in uses:
        use()
    with pytest.raises(CaptureError, match=r"3 tensors are given by position, but there are 2"):
        simulation(*inputs().values(), inputs()["input_ids"])
    softmax = "model.layers.0.self_attn.softmax"
    simulation.quantizers[softmax].scheme = Scheme(8, symmetric=False)
    with pytest.raises(CalibrationError, match=f"{softmax} has no encoding yet"):
        simulation.outputs(inputs())
    model = adapted("llama")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(torch.nan)
    with pytest.raises(CalibrationError, match=r"q_proj.lora_A.weight: the .* is not finite"):
        simulate(model, inputs())


def with_relu(inplace: bool) -> Simulation:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace), nn.Linear(8, 8))
    simulation = simulate(model.eval(), RELU_INPUTS)
    simulation.calibrate([RELU_INPUTS])
    return simulation


RELU_INPUTS = {"input": torch.randn(16, 8, generator=torch.Generator().manual_seed(0))}


@pytest.mark.filterwarnings("ignore:.* has no packed layer")  # a float model on purpose
def test_what_is_overwritten_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation, plain = with_relu(inplace=True), with_relu(inplace=False)
    values, expected = simulation.values(RELU_INPUTS), plain.values(RELU_INPUTS)
    assert float(values["0.linear"].min()) < 0
    for name, value in expected.items():
        assert torch.equal(values[name.replace("relu", "relu_")], value)
    export_onnx(simulation.graph(), tmp_path)
    figures = verify_onnx_outputs(tmp_path, simulation, [RELU_INPUTS]).figures
    assert figures["worst_layer_steps"] <= 1
    loss = "qwlora.analysis.quantization_costs.next_token_loss"
    monkeypatch.setattr(loss, lambda output, _: output.square().sum())
    costs = [sensitivities(s, [RELU_INPUTS]) for s in (simulation, plain)]
    assert [c.cost for c in costs[0]] == pytest.approx([c.cost for c in costs[1]])
    assert all(c.cost > 0 for c in costs[0])
