"""Graphs of models with special layers: half precision, autocast, experts, and packed weights that
are read more than once, by a layer that runs again or by an adapter that asks for its layer's weight."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import qwlora
from conftest import byte_tokenizer, tiny_model
from qwlora import PlacementRule, Schemes, quantize_, simulate
from qwlora.errors import CaptureError
from qwlora.graph.capturable_model import visible_implementations
from qwlora.graph.quantized_graph import Kind
from qwlora.graph.value_traits import Decision
from qwlora.nn.custom_ops import linear
from qwlora.simulation.adapter_simulations import simulate_adapters
from qwlora.simulation.simulation import Simulation
from qwlora.targets.onnx.onnx import export_onnx
from simulation.captured import batch
from simulation.tiny_architectures import ENCODER, VOCABULARY, inputs, make
from targets.proofs import verify_onnx, verify_onnx_outputs

HALF = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
IDS = torch.randint(0, 256, (3, 2, 16), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in IDS]


def trained(folder: Path, dtype: torch.dtype, **lora: bool) -> PeftModel:
    """A checkpoint in `dtype`, loaded in its own type, quantized and trained for a step."""
    tiny_model("llama", layers=1).to(dtype).save_pretrained(folder)
    model = t.AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == dtype
    quantize_(model, "w4-block32", "rtn")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, config, **lora)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(input_ids=IDS[0], labels=IDS[0]).loss.backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_model_becomes_a_verified_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model = trained(tmp_path / "checkpoint", dtype)
    parameters = {name: (id(p), p.dtype) for name, p in model.state_dict(keep_vars=True).items()}
    own = model(**BATCHES[0]).logits
    simulation = simulate(model, BATCHES[0])
    after = model.state_dict(keep_vars=True)
    assert {name: (id(p), p.dtype) for name, p in after.items()} == parameters
    assert torch.equal(model(**BATCHES[0]).logits, own)
    simulation.calibrate(BATCHES)
    export_onnx(simulation.graph(), tmp_path / "onnx")
    verify_onnx(tmp_path / "onnx", simulation, IDS[2], layer_tokens=16)
    with torch.no_grad():
        found = simulation(**BATCHES[0]).logits
    assert own.dtype == dtype
    assert found.dtype == torch.float32
    rounding = 16 * torch.finfo(dtype).eps * own.float().abs().max()
    assert (own.float() - found).abs().max() < rounding

    # the graph is that of the base that is saved, and another capture gives nodes the same names
    simulation.save(tmp_path / "simulation")
    qwlora.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    qwlora.save_base(model.get_base_model(), tmp_path / "base", byte_tokenizer(), source="tiny")
    base = qwlora.load_base(tmp_path / "base")
    adapted = qwlora.load_adapter(base, tmp_path / "adapter").eval()
    again = qwlora.load_simulation(tmp_path / "simulation", adapted)
    assert torch.equal(again(**BATCHES[0]).logits, found)


def test_adapters_in_half_precision_share_one_graph(tmp_path: Path) -> None:
    model = trained(tmp_path / "checkpoint", torch.bfloat16, autocast_adapter_dtype=False)
    model.add_adapter("second", model.peft_config["default"], autocast_adapter_dtype=False)
    assert {p.dtype for name, p in model.named_parameters() if "lora" in name} == {torch.bfloat16}
    simulations = simulate_adapters(model.eval(), BATCHES[0])
    assert simulations.captures == 1
    with simulations["default"].only(), simulations["second"].only():
        first, second = (simulations[name](**BATCHES[0]).logits for name in ("default", "second"))
    assert not torch.equal(first, second)


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
    """PEFT adds the factors' product to the weight under autocast that is off."""
    model = make("Mixtral", layers=1)
    quantize_(model, "w4-block32", "rtn")
    targets: Any = {"target_modules": ["q_proj"], "init_lora_weights": False}
    targets["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, **targets)).eval()
    schemes = Schemes(rules=(PlacementRule("*.mlp.gate", bitwidth=16),))
    made = simulate(adapted, inputs("Mixtral"), schemes)
    experts = "model.layers.0.mlp.experts"
    kinds = {m.name: m.kind for m in made.marks if m.name.startswith(experts)}
    packed = {name for name, kind in kinds.items() if kind is Kind.BASE}
    assert packed == {f"{experts}.gate_up_proj", f"{experts}.down_proj"}
    assert sum(kind is Kind.ADAPTER for kind in kinds.values()) == 4
    of_experts = [p for p in made.placement.values if p.module == experts]
    sums = [p.decision for p in of_experts if p.operator in ("baddbmm", "index")]
    assert {*sums} == {Decision.FLOAT}
    made.calibrate([inputs("Mixtral", seed) for seed in range(2)])
    one = inputs("Mixtral")
    with torch.no_grad(), visible_implementations(adapted):
        expected = adapted(**one, use_cache=False).logits
    with made.only(), torch.no_grad():
        assert torch.equal(made(**one).logits, expected)
    assert float((made.outputs(one)["logits"] - expected).norm() / expected.norm()) < 0.03
    export_onnx(made.graph(), tmp_path)
    assert verify_onnx_outputs(tmp_path, made, [one]).figures["worst_layer_steps"] <= 2


TEXT = batch()["input_ids"]


def checked(model: nn.Module) -> Simulation:
    """A calibrated simulation with one mark for each packed layer, which computes the model."""
    made = simulate(model, batch())
    made.calibrate([batch(seed=seed) for seed in range(2)])
    packed = [path for path, module in model.named_modules() if hasattr(module, "packed")]
    assert sum(mark.kind is Kind.BASE for mark in made.marks) == len(packed)
    arguments = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad(), visible_implementations(model):
        expected: Tensor = model(**batch(), **arguments).logits
    with made.only():
        assert torch.equal(made.logits(TEXT), expected)
    assert float((made.logits(TEXT) - expected).norm() / expected.norm()) < 0.02
    return made


def test_layers_that_are_shared() -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    model = t.AlbertForMaskedLM(t.AlbertConfig(**ENCODER, **sizes))
    quantize_(model, "w4-block32", "rtn")
    made = checked(model.eval())
    query = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"
    names = {name.removeprefix(query) for name in made.encodings if name.startswith(query)}
    assert names == {".weight", ".bias", ".linear", ".linear_1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dora_asks_for_the_weight_of_its_layer(name: str) -> None:
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    quantize_(model, "w4-block32", solver="rtn")
    torch.manual_seed(1)
    options = {"init_lora_weights": False, "use_dora": True}
    checked(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options)).eval())


@pytest.mark.slow
def test_a_model_without_packed_weights_needs_no_operators_of_theirs() -> None:
    program = "import torch; from qwlora import simulate; "
    program += "model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval(); "
    program += "print(simulate(model, {'input': torch.ones(2, 4)}).inputs)"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == "('input',)\n", found.stderr
