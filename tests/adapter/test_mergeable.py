"""Adapters that merge without loss: what they compute, their gradients, and what is refused."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import qwlora
from conftest import tiny_model
from formats.packing import quantized as measured
from qwlora.adapter.adapter_files import adapter_report
from qwlora.adapter.attach import LoraShape, attach
from qwlora.adapter.train import TrainingSettings, train_adapter
from qwlora.errors import CaptureError, ExportError, FingerprintError, MergeError, TrainingError
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme, parse_scheme
from qwlora.nn import is_packed, packed_weights
from qwlora.quantize.layer_rules import LayerRule
from qwlora.targets.canonical_adapter import read_canonical
from simulation.tiny_architectures import make

IDS = torch.arange(48).view(2, 24)
GRIDS = [
    *("w4-block32", "w4-signed32", "w3-block32-asymmetric", "w4-channel", "w8-tensor"),
    *("w4-lpbq32", "w2-channel-asymmetric"),
]


def adapted(model: Any, size: float = 0.0, **options: Any) -> Any:
    """`model` with a mergeable adapter; `size` of lora_B."""
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # tested here
        peft = get_peft_model(model, LoraConfig(**options)).eval()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            parameter.data.normal_(std=size) if size else parameter.data.zero_()
    qwlora.mergeable_(peft)
    return peft


def quantized(grid: str | Scheme, architecture: str = "llama", **options: Any) -> Any:
    model = tiny_model(architecture, layers=1)
    qwlora.quantize_(model, parse_scheme(grid) if isinstance(grid, str) else grid, "rtn", **options)
    return model


def in_a_float_offset() -> Any:
    """On GGUF's Q4_1 grid."""
    model = tiny_model("llama", layers=1)
    scheme = Scheme(4, False, PerBlock(32), float_offset=True)
    names = [f"model.{n}.weight" for n, m in model.model.named_modules() if type(m) is nn.Linear]
    qwlora.freeze_(model, {name: measured(model.get_parameter(name), scheme) for name in names})
    return model


def bases() -> dict[str, Any]:
    return {
        **{grid: lambda grid=grid: quantized(grid) for grid in GRIDS},
        "float offset": in_a_float_offset,
        "input channels": lambda: quantized(Scheme(4, True, PerChannel(1))),
        "gpt2": lambda: quantized("w4-block32", "gpt2"),
        "falcon": lambda: quantized("w4-block32", "falcon"),
        "bfloat16": lambda: quantized("w4-block32").to(torch.bfloat16),
    }


def in_lanes(*fast: str, slow: Sequence[str]) -> list[Any]:
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.codes for name, layer in packed_weights(model).items()}


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """Q(W + scaling B A) of every adapted layer, by the grid's own rounding of PEFT's delta."""
    found = {}
    for name, layer in packed_weights(model).items():
        path = name.removesuffix(".weight")
        values = layer.quantized.dequantize().double()
        for name_in_peft, owner in model.named_modules():
            if name_in_peft.endswith(path) and isinstance(owner, LoraLayer):
                values += owner.get_delta_weight("default").double().reshape(values.shape)
        found[name] = layer.encoding.quantize(values)
    return found


FAST = ("w4-signed32", "w3-block32-asymmetric", "gpt2")


@pytest.mark.parametrize("base", in_lanes(*FAST, slow=[b for b in bases() if b not in FAST]))
@torch.no_grad()
def test_merging_writes_the_integers_that_were_computed(base: str) -> None:
    """Before it is trained, those of the base."""
    model = bases()[base]()
    alone, before = model(IDS).logits, codes_of(model)
    peft = adapted(model)
    assert torch.equal(peft(IDS).logits, alone)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    expected, trained = rounded(peft), peft(IDS).logits
    with qwlora.memory_saving(peft, chunked_loss=False):
        torch.testing.assert_close(peft(IDS).logits, trained)  # oneDNN sums in another order
    with peft.disable_adapter():
        assert torch.equal(peft(IDS).logits, alone)
    merged = qwlora.merged_model(peft)
    assert torch.equal(merged(IDS).logits, trained)
    found = codes_of(merged)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], codes) for name, codes in expected.items())
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert changed == [name for name in found if "lm_head" not in name]


STRAIGHT = in_lanes("w3-block32-asymmetric", "falcon", slow=["w4-block32", "gpt2"])


@pytest.mark.parametrize("base", STRAIGHT)
def test_gradients_are_straight_through(base: str) -> None:
    """Those of y = W' x with W' = Q(W + Delta) + Delta - Delta.detach(), by autograd."""
    peft = adapted(bases()[base](), 0.1)
    layers = [m for m in peft.modules() if isinstance(m, LoraLayer)]
    peft(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in peft.named_parameters() if p.grad is not None}
    assert len(found) == 2 * len(layers)
    peft.zero_grad()

    def explicit(layer: Any) -> Any:
        variant = layer.lora_variant["default"]

        def forward(x: Tensor) -> Tensor:
            a, b = (f["default"].weight for f in (layer.lora_A, layer.lora_B))
            delta = b @ a * layer.scaling["default"]
            with torch.no_grad():
                eye = torch.eye(a.shape[1])
                merged = variant.forward(layer, "default", eye, eye)
                bias = layer.base_layer.bias
                merged = (merged if bias is None else merged - bias).T
            return nn.functional.linear(x, merged + delta - delta.detach(), layer.base_layer.bias)

        return forward

    for layer in layers:
        layer.forward = explicit(layer)
    peft(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in peft.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_a_trained_adapter_is_read_merged_and_refused(tmp_path: Path) -> None:
    folder, base, model = tmp_path / "adapter", tmp_path / "base", quantized("w4-block32")
    qwlora.save_base(model, base, source="here")
    peft: Any = attach(model, LoraShape(rank=4, alpha=64.0), seed=0)
    qwlora.mergeable_(peft)
    settings = TrainingSettings(8, 0.02, 4, 1, "constant", 8, 0)
    with torch.enable_grad():
        report = train_adapter(peft, torch.arange(96).view(4, 24) % 17, settings, tmp_path / "work")
    assert report.losses[-1] < report.losses[0] - 0.5
    qwlora.save_adapter(peft.eval(), folder)
    assert json.loads((folder / "qwlora.json").read_text())["mergeable"] == {"remainders": None}
    assert adapter_report(folder, tmp_path).kind == "mergeable LoRA"
    logits, expected = peft(IDS).logits, rounded(peft)
    again = qwlora.load_adapter(qwlora.load_base(base), folder).eval()
    assert torch.equal(again(IDS).logits, logits)
    merged = qwlora.merged_model(again)
    found, before = codes_of(merged), codes_of(qwlora.load_base(base))
    assert all(torch.equal(found[name], codes) for name, codes in expected.items())
    assert any(not torch.equal(found[name], codes) for name, codes in before.items())
    qwlora.save_base(merged, tmp_path / "merged", source="here")
    other = qwlora.load_base(tmp_path / "merged")
    assert torch.equal(other(IDS).logits, logits)
    with pytest.raises(FingerprintError, match=r"adapter'.* was trained on the base with"):
        qwlora.load_adapter(other, folder)
    with pytest.raises(ExportError, match=r"is mergeable.*Merge it \(`qwlora merge`"):
        read_canonical(folder)
    with pytest.raises(CaptureError, match=r"is mergeable.*qwlora\.merged_model"):
        qwlora.simulate(peft, {"input_ids": IDS})


@pytest.mark.parametrize(
    "base", in_lanes("w4-signed32", slow=["w4-block32", "w8-tensor", "float offset"])
)
@torch.no_grad()
def test_with_float_weights_their_sum_is_rounded(base: str, tmp_path: Path) -> None:
    """Of a base that was rounded to nearest, up to the sixteenths of a step that are kept."""
    floats = {n: p.detach() for n, p in tiny_model("llama", layers=1).named_parameters()}
    model = bases()[base]()
    alone = model(IDS).logits

    def weight(path: str) -> Tensor:
        return floats[f"{path}.weight"]

    peft = adapted(model)
    qwlora.mergeable_(peft, weight=weight)
    assert torch.equal(peft(IDS).logits, alone)
    size = 0.02 if base == "w8-tensor" else 0.1
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=size)
    expected = {}
    for name, layer in packed_weights(model).items():
        owner: Any = peft.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        total = floats[name] + owner.get_delta_weight("default")
        expected[name] = layer.encoding.quantize(total)
    qwlora.save_adapter(peft, tmp_path)
    found = codes_of(qwlora.merged_model(peft))
    for name, codes in expected.items():
        off = (found[name].int() - codes.int()).abs()
        assert int(off.max()) <= 1
        assert float(off.float().mean()) < 0.04  # the mean of 1/16 either way is 1/32
    again = bases()[base]()
    with pytest.raises(FingerprintError, match=r"are needed\. Pass them as weight="):
        qwlora.load_adapter(again, tmp_path)
    loaded = qwlora.load_adapter(bases()[base](), tmp_path, weight=weight)
    merged = codes_of(qwlora.merged_model(loaded))
    assert all(torch.equal(merged[name], codes) for name, codes in found.items())
    floats["model.layers.0.mlp.up_proj.weight"] = floats["model.layers.0.mlp.up_proj.weight"] * 1.1
    with pytest.raises(FingerprintError, match="differ from these"):
        qwlora.load_adapter(bases()[base](), tmp_path, weight=weight)


@torch.no_grad()
def test_merged_into_floats_it_computes_the_same() -> None:
    peft = adapted(quantized("w4-block32", "gpt2"), 0.1)
    expected = peft(IDS).logits
    merged = qwlora.merged_model(peft, "float")
    assert not any(is_packed(module) for module in merged.modules())
    torch.testing.assert_close(merged(IDS).logits, expected)
    peft = adapted(quantized("w4-block32"), 0.1)
    expected = peft(IDS).logits
    assert torch.equal(peft.merge_and_unload()(IDS).logits, expected)  # PEFT's own


@pytest.mark.parametrize(
    "targets", in_lanes("embed_tokens", slow=["lm_head", "embed_tokens lm_head"])
)
def test_tied_ends_get_integers_of_their_own(targets: str, tmp_path: Path) -> None:
    rules = [LayerRule("lm_head", parse_scheme("w8-block32"))]
    peft = adapted(quantized("w4-block32", rules=rules), 0.1, target_modules=targets.split())
    peft(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for p in peft.parameters() if p.requires_grad]
    assert all(g is not None and bool(g.any()) for g in gradients)
    with torch.no_grad():
        expected = peft(IDS).logits
        merged = qwlora.merged_model(peft)
        assert torch.equal(merged(IDS).logits, expected)
        qwlora.save_base(merged, tmp_path, source="here")
        assert torch.equal(qwlora.load_base(tmp_path)(IDS).logits, expected)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.grouped = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 1, groups=2)
        self.last = nn.Conv1d(8, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.grouped(self.first(x)).flatten(2))
        return y


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_convolutions() -> None:
    model = Convolutions()
    grid = parse_scheme("w4-channel")
    qwlora.quantize_(model, grid, "rtn", rules=[LayerRule("*", grid)])  # no default for these
    config = {"target_modules": ["first", "last"], "task_type": None}
    peft = adapted(model, 0.2, **config)
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    peft(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in peft.parameters() if p.requires_grad)
    with torch.no_grad():
        expected, codes = peft(x), rounded(peft)
        merged: Any = qwlora.merged_model(peft)
        assert torch.equal(merged(x), expected)
    assert all(torch.equal(codes_of(merged)[name], wanted) for name, wanted in codes.items())
    with pytest.raises(TrainingError, match="grouped is a convolution in groups"):
        adapted(merged, r=2, **config | {"target_modules": ["grouped"]})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lora_dropout": 0.1}, "q_proj has dropout"),
        ({"use_dora": True}, "q_proj has DoRA"),
        ({"target_modules": ["lm_head"]}, "lm_head is float in the base. Quantize it by a rule"),
    ],
)
def test_what_integers_cannot_hold_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(TrainingError, match=rf"adapter 'default' .*{problem}"):
        adapted(quantized("w4-block32"), **options)
    model, experts = make("Mixtral"), {"target_parameters": ["mlp.experts.down_proj"]}
    qwlora.quantize_(model, "w4-block32", "rtn")
    with pytest.raises(TrainingError, match="fused experts"):
        adapted(model, target_modules=["q_proj"], **experts)


def test_one_is_active_at_a_time_and_a_merge_is_final() -> None:
    peft = adapted(quantized("w4-block32"))
    peft.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(TrainingError, match="no adapter 'third'"):
        qwlora.mergeable_(peft, "third")
    qwlora.mergeable_(peft, "other")
    peft.base_model.set_adapter(["default", "other"])
    with pytest.raises(TrainingError, match=r"default, other are mergeable.*Activate only one"):
        peft(IDS)
    peft.set_adapter("other")
    peft.merge_adapter()
    with pytest.raises(MergeError, match="Load the base and the adapter again"):
        peft.unmerge_adapter()
