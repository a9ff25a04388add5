"""`assert_frozen`, and what calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import qwlora
from conftest import byte_tokenizer, tiny_model
from qwlora import assert_frozen, quantize_, save_adapter, simulate
from qwlora.adapter.train import TrainingSettings, train_adapter
from qwlora.errors import GridError
from qwlora.formats.base_folder import save_base
from qwlora.grid.min_max import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import PerChannel, Scheme
from qwlora.nn import pack_module

LORA = LoraConfig(r=2, target_modules=["up_proj"])
UP = "model.layers.1.mlp.up_proj"
FORWARD = rf"{UP.replace('.', '[.]')}: its own forward"


@pytest.fixture
def model() -> PreTrainedModel:
    model = tiny_model("qwen3")
    quantize_(model, "w4-block32", "rtn")
    return model


def patch(model: nn.Module) -> None:
    """Give one layer a forward on float weights."""
    weight = torch.randn(128, 64)
    layer = next(m for path, m in model.named_modules() if path.endswith(f"{UP}.base_layer"))
    layer.forward = lambda x: F.linear(x, weight)


def test_a_float_model_is_not_frozen() -> None:
    with pytest.raises(GridError, match=r"Qwen3ForCausalLM has no packed layer.*quantize_"):
        assert_frozen(tiny_model("qwen3"))


def test_a_forward_on_other_weights_is_named(model: PreTrainedModel) -> None:
    assert_frozen(model)
    adapted = get_peft_model(model, LORA)
    patch(adapted)
    with pytest.raises(GridError, match=FORWARD):
        assert_frozen(adapted)


def test_a_forward_on_the_codes_passes(model: PreTrainedModel) -> None:
    layer = model.get_submodule(UP)
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1
    add_hook_to_module(model.get_submodule("model.layers.0.mlp.up_proj"), AlignDevicesHook("cpu"))
    before = layer.tensor.parts.scale.clone()
    assert_frozen(model)
    assert torch.equal(layer.tensor.parts.scale, before)


def test_a_forward_below_an_accelerate_hook_is_seen(model: PreTrainedModel) -> None:
    layer = model.get_submodule(UP)
    layer.forward = lambda x: x.new_zeros(*x.shape[:-1], 128)
    add_hook_to_module(layer, ModelHook())
    with pytest.raises(GridError, match=FORWARD):
        assert_frozen(model)


@pytest.mark.parametrize(
    "layer", [nn.Embedding(70, 32), nn.Conv1d(8, 16, 4), nn.Conv2d(4, 8, (3, 4), dilation=2)]
)
def test_every_kind_of_layer_can_be_checked(layer: nn.Module) -> None:
    weight = layer.weight.detach().flatten(1)
    grid = measure(weight, Scheme(4, granularity=PerChannel(0)))
    packed = pack_module(layer, QuantizedTensor(grid.quantize(weight), grid))
    model = nn.Sequential(packed)
    forward = packed.forward
    packed.forward = lambda x: forward(x) * 2  # type: ignore[method-assign]
    assert_frozen(model)
    packed.forward = layer.forward  # type: ignore[method-assign]
    with pytest.raises(GridError, match="0: its own forward"):
        assert_frozen(model)


def test_training_simulation_and_saving_check_it(model: PreTrainedModel, tmp_path: Path) -> None:
    adapted = get_peft_model(model, LORA)
    patch(adapted)
    ids = torch.arange(16).view(2, 8)
    settings = TrainingSettings(1, 1e-3, 1, 0, "constant", 1, 0)
    with pytest.raises(GridError, match=FORWARD):
        train_adapter(adapted, ids, settings, tmp_path / "work")
    with pytest.raises(GridError, match=FORWARD):
        simulate(adapted.eval(), {"input_ids": ids})
    with pytest.raises(GridError, match=FORWARD):
        save_adapter(adapted, tmp_path / "adapter")
    with pytest.raises(GridError, match=FORWARD):
        save_base(model, byte_tokenizer(), tmp_path, "here")
    assert not list(tmp_path.iterdir())


def test_it_unpacks_nothing_in_a_model_without_patches(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("a weight was unpacked")

    monkeypatch.setattr("qwlora.nn.packed_tensor.unpack", refuse)
    assert_frozen(model)


def test_it_is_public() -> None:
    assert qwlora.assert_frozen is assert_frozen
    assert "assert_frozen" in qwlora.__all__


class TwoLayers(nn.Module):
    """Computes with a weight that it kept for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.kept = [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.kept[0](x)


def test_a_graph_that_uses_no_packed_layer_is_refused() -> None:
    model = TwoLayers()
    quantize_(model, "w4-block32", "rtn")
    with pytest.raises(qwlora.QwloraError, match=r"none of the 1 packed layers.*layer first"):
        simulate(model.eval(), {"x": torch.ones(2, 32)})


def test_simulating_a_float_model_warns_that_there_are_no_base_encodings() -> None:
    with pytest.warns(UserWarning, match="Linear has no packed layer.*no base encodings"):
        simulation = simulate(nn.Linear(4, 4).eval(), {"input": torch.ones(2, 4)})
    assert not simulation.base_encodings
