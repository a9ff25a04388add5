"""A simulation of what is not there any more is not calibrated, saved or exported; and modules with several names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from conftest import packed_model
from qwlora import export, fingerprint, load_simulation, quantize_, simulate, simulate_adapters
from qwlora.errors import CalibrationError
from qwlora.grid.encoding import measure
from qwlora.grid.scheme import parse_scheme
from qwlora.quantize.layer_rules import LayerRule

X = {"x": torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0))}
BATCHES = [{"x": X["x"] * (1 + i)} for i in range(3)]
LORA = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return y


def adapted(*names: str) -> PeftModel:
    model = Block().eval()
    quantize_(model, "w4-block32", "rtn")
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LORA, names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, LORA)
    return wrapped.eval()


def train(model: Any) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(**X).square().mean().backward()
    optimizer.step()


def double(weight: Tensor) -> None:
    weight.data = weight.data * 2


ADAPTER: dict[str, Any] = {
    "training": train,
    "another tensor": lambda m: double(m.base_model.model.up.lora_B["first"].weight),
    "scaling": lambda m: m.base_model.model.up.scaling.update(first=2 * LORA.lora_alpha / LORA.r),
}
BASE: dict[str, Any] = {
    "a norm": lambda m: m.base_model.model.norm.weight.data[3].add_(0.5),
    "a code": lambda m: m.base_model.model.down.base_layer.packed[0, 0].bitwise_xor_(1),
}


@pytest.mark.parametrize("change", ADAPTER | BASE)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_a_changed_model_is_refused(change: str, several: bool, tmp_path: Path) -> None:
    model = adapted("first", "second") if several else adapted("first")
    made: Any = simulate_adapters(model, X) if several else simulate(model, X)
    one = made["first"] if several else made
    made.calibrate(BATCHES)
    made.check_unchanged()
    before = {name: e.scale.clone() for name, e in one.encodings.items()}
    (ADAPTER | BASE)[change](model)
    what = "adapter first" if change in ADAPTER else "base"
    target = "onnx" if several else "onnx_each"
    for call in (
        lambda: made.observe(BATCHES),
        lambda: made.calibrate(BATCHES),
        lambda: one.save(tmp_path / "simulation"),
        lambda: export(made, target, tmp_path / "files"),
    ):
        with pytest.raises(CalibrationError, match=rf"the {what} of PeftModel has changed .*again"):
            call()
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(e.scale, before[name]) for name, e in one.encodings.items())


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_what_another_adapter_does_is_no_change(tmp_path: Path) -> None:
    model = adapted("first", "second")
    first = simulate(model, X)
    first.calibrate(BATCHES)
    model.set_adapter("second")
    train(model)
    with model.disable_adapter():
        first.calibrate(BATCHES)
    model.delete_adapter("second")
    model.requires_grad_(True).train()
    first.save(tmp_path / "first")
    model.delete_adapter("first")  # the simulation has its tensors
    first.calibrate(BATCHES)


def test_a_half_precision_model_is_unchanged() -> None:
    model = packed_model("llama", layers=1).to(torch.bfloat16)
    ids = {"input_ids": torch.arange(24).view(2, 12)}
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), "first").eval()
    made = simulate_adapters(wrapped, ids)
    assert made["base"].origin.base_fingerprint == fingerprint(wrapped)
    made.calibrate([ids])
    made.check_unchanged()


def test_a_failed_adapter_leaves_the_others_as_they_were() -> None:
    made = simulate_adapters(adapted("first", "second"), X)
    made.calibrate(BATCHES[:1])
    before = {
        a: {n: (e, s.quantizers[n].observer) for n, e in s.activation_encodings.items()}
        for a, s in made.items()
    }
    bad = {"first": BATCHES, "second": [{"x": X["x"] * torch.nan}], "base": BATCHES}
    for batches in ({"first": BATCHES}, bad):
        with pytest.raises(CalibrationError):
            made.calibrate(batches)
        for adapter, simulation in made.items():
            for name, encoding in simulation.activation_encodings.items():
                assert encoding.equals(before[adapter][name][0])
                assert simulation.quantizers[name].observer is before[adapter][name][1]


class Named(nn.Module):
    """One linear layer under several names, or one weight of several layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.others = nn.ModuleList([self.first, self.first])
        if kind == "tied":
            self.others = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
            for other in self.others:
                other[0].weight = self.first[0].weight
        self.steps = {"loop": [self.first] * 3, "last": [*self.others]}.get(
            kind, [self.first, *self.others]
        )
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "float"])
@pytest.mark.parametrize("kind", ["shared", "tied", "loop", "last"])
@pytest.mark.filterwarnings("ignore:Named has no packed layer")
def test_a_module_under_several_names(kind: str, is_packed: bool, tmp_path: Path) -> None:
    model = Named(kind).eval()
    if is_packed:
        rule = LayerRule("*", parse_scheme("w8-channel"), "rtn")  # tied weights need one
        quantize_(model, "w8-channel", "rtn", rules=[rule])
    made = simulate(model, X)
    with made.only(), torch.no_grad():
        assert torch.equal(made(**X), model(**X))
    made.calibrate(BATCHES)
    weights = [value for value in made.marks if value.name.endswith(".weight")]
    assert len(weights) == (4 if is_packed and kind == "tied" else 2)  # tied layers have their own
    for value in weights:
        module = model.get_submodule(value.name.removesuffix(".weight"))
        found = made.encodings[value.name]
        assert found.equals(module.encoding if is_packed else measure(module.weight, found.scheme))
    made.save(tmp_path / "simulation")
    again = load_simulation(tmp_path / "simulation", model)
    assert torch.equal(again(**X), made(**X))
    if kind == "shared" and is_packed:
        onnxruntime = pytest.importorskip("onnxruntime")
        export(made, "onnx_each", tmp_path / "onnx")
        session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
        (found,) = session.run(None, {"x": X["x"].numpy()})
        torch.testing.assert_close(torch.tensor(found), made(**X), rtol=1e-3, atol=1e-3)
