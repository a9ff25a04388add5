"""What runs under autocast or another gradient mode is in the graph like the rest; what cannot be is refused."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qwlora import PlacementRule, Schemes, quantize_, simulate
from qwlora.errors import CaptureError
from qwlora.graph.capturable_model import visible_implementations
from qwlora.graph.quantized_graph import Kind
from qwlora.graph.value_traits import Decision
from qwlora.nn.custom_ops import linear
from qwlora.targets.onnx.onnx import export_onnx
from simulation.tiny_architectures import inputs, make
from targets.proofs import verify_onnx_outputs

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


class Wrapped(nn.Module):
    """Layers under what torch.export wraps; the last one under `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(32, 32) for _ in range(3))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.first(x)
            with torch.enable_grad():
                x = self.second(x).relu()
        if self.kind == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.third(x).float()
        if self.kind == "branch":
            return torch.cond(x.sum() > 0, lambda x: self.third(x), lambda x: x + 1, (x,))
        if self.kind == "operator":
            return linear(x, *self.third.operands)
        return self.third(x)


def wrapped(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Wrapped(kind)
    quantize_(model, "w4-block32", "rtn")
    return model.eval()


def test_layers_under_wrappers_are_simulated_and_exported(tmp_path: Path) -> None:
    model = wrapped("none")
    made = simulate(model, {"x": X})
    made.calibrate([{"x": X}])
    layers = ("first", "second", "third")
    packed = {m.name for m in made.marks if m.kind is Kind.BASE}
    assert packed == {f"{layer}.weight" for layer in layers}
    assert {f"{layer}.linear" for layer in layers} <= set(made.encodings)
    assert next(p for p in made.placement.values if p.operator == "relu").name == "output.relu"
    with torch.no_grad(), made.only():
        assert torch.equal(made(x=X), model(X))
    export_onnx(made.graph(), tmp_path)
    assert verify_onnx_outputs(tmp_path, made, [{"x": X}]).figures["worst_layer_steps"] <= 1


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.cond about its own
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("autocast", r"the model runs wrap_with_autocast, a nested graph .*cast the model"),
        ("branch", "the model runs cond, a nested graph.*capture again"),
        ("operator", r"third\.weight: linear reads its codes.*layer\(x\)"),
    ],
)
def test_what_the_graph_would_hide_is_refused(kind: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        simulate(wrapped(kind), {"x": X})


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_adapted_experts_are_base_weight_and_factors(tmp_path: Path) -> None:
    """PEFT adds the factors' product to the weight under autocast that is off: no activation, and on no grid of its own."""
    model = make("Mixtral", layers=1)
    quantize_(model, "w4-block32", "rtn")
    targets = {"target_modules": ["q_proj"]}
    targets["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, **targets, init_lora_weights=False)
    torch.manual_seed(1)
    adapted = get_peft_model(model, config).eval()
    schemes = Schemes(rules=(PlacementRule("*.mlp.gate", bitwidth=16),))
    made = simulate(adapted, inputs("Mixtral"), schemes)
    experts = "model.layers.0.mlp.experts"
    kinds = {m.name: m.kind for m in made.marks if m.name.startswith(experts)}
    packed = {name for name, kind in kinds.items() if kind is Kind.BASE}
    assert packed == {f"{experts}.gate_up_proj", f"{experts}.down_proj"}
    assert sum(kind is Kind.ADAPTER for kind in kinds.values()) == 4
    sums = [
        p
        for p in made.placement.values
        if p.module == experts and p.operator in ("baddbmm", "index")
    ]
    assert sums
    for placed in sums:
        assert placed.reason == "a weight computed from weights, which have their own grids"
        assert placed.decision is Decision.FLOAT
    made.calibrate([inputs("Mixtral", seed) for seed in range(2)])
    batch = inputs("Mixtral")
    with torch.no_grad(), visible_implementations(adapted):
        expected = adapted(**batch, use_cache=False).logits
    with made.only(), torch.no_grad():
        assert torch.equal(made(**batch).logits, expected)
    assert float((made.outputs(batch)["logits"] - expected).norm() / expected.norm()) < 0.03
    export_onnx(made.graph(), tmp_path)
    assert verify_onnx_outputs(tmp_path, made, [batch]).figures["worst_layer_steps"] <= 2
