"""Models that somebody changed: hooks, patches, wrappers, computed weights; before `quantize_`, and
before `assert_frozen`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import PreTrainedModel

from conftest import byte_tokenizer, packed_model, tiny_model
from qwlora import (
    PackedLinear,
    QwloraError,
    assert_frozen,
    fingerprint,
    quantize_,
    save_adapter,
    save_base,
    simulate,
)
from qwlora.adapter.adapter_deltas import unpack_
from qwlora.adapter.train import TrainingSettings, train_adapter
from qwlora.errors import GridError, SourceError
from qwlora.nn import packed_weights
from qwlora.quantize.layer_rules import LayerRule

IDS = torch.arange(16).view(2, 8)
UP = "model.layers.1.mlp.up_proj"
PATCHED = rf"(?s)1 packed layers have a forward that was set .*{UP.replace('.', '[.]')}"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture
def plain() -> PreTrainedModel:
    return packed_model("qwen3")


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_a_model_dispatched_by_accelerate_computes_its_codes(architecture: str) -> None:
    plain, model = tiny_model(architecture), tiny_model(architecture)
    quantize_(plain, "w4-block32", "rtn")
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    quantize_(model, "w4-block32", "rtn")
    assert torch.equal(logits(model), logits(plain))
    assert fingerprint(model) == fingerprint(plain)
    hooked = [m for m in model.modules() if isinstance(m, PackedLinear) and hasattr(m, "_hf_hook")]
    assert len(hooked) == len(packed_weights(model))


def test_unpacking_a_dispatched_model_leaves_no_forward_on_codes() -> None:
    model = dispatch_model(tiny_model("qwen3"), {"": "cpu"}, force_hooks=True)
    quantize_(model, "w4-block32", "rtn")
    unpack_(model)
    layer = model.get_submodule(UP)
    with torch.no_grad():
        layer.weight.zero_()
    assert not layer(torch.ones(1, 64)).any()


def test_offloaded_layers_are_refused_by_name() -> None:
    model = tiny_model("qwen3")
    cpu_offload(model)
    with pytest.raises(GridError, match=r"q_proj\.weight.*device_map offloading"):
        quantize_(model, "w4-block32", "rtn")


@pytest.mark.parametrize("below_hook", [False, True])
def test_a_patched_forward_is_refused_by_name_before_anything_is_packed(below_hook: bool) -> None:
    model = tiny_model("qwen3")
    layer = model.get_submodule(UP)
    layer.forward = layer.forward  # bound to this module, as any patch that calls the old one is
    if below_hook:
        model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
        layer._old_forward = lambda x: x
    with pytest.raises(GridError, match=rf"(?s)1 layers.*{UP} has a 'forward'.*del layer"):
        quantize_(model, "w4-block32", "rtn")
    assert not packed_weights(model)
    quantize_(model, "w4-block32", "rtn", rules=[LayerRule(UP, None)])
    assert f"{UP}.weight" not in packed_weights(model)


def test_a_layer_compiled_in_place_is_refused_by_name() -> None:
    model = tiny_model("qwen3")
    model.get_submodule(UP).compile(backend="eager")
    with pytest.raises(GridError, match=rf"{UP} was compiled"):
        quantize_(model, "w4-block32", "rtn")


class Holder(nn.Module):
    """Any wrapper of a user's own."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel, Holder])
def test_the_head_of_a_wrapped_model_stays_float(wrap: Any, plain: PreTrainedModel) -> None:
    model = tiny_model("qwen3")
    wrapped = wrap(model)
    quantize_(wrapped, "w4-block32", "rtn")
    assert type(model.lm_head) is nn.Linear
    assert packed_weights(model).keys() == packed_weights(plain).keys()
    if not isinstance(wrapped, Holder):
        assert fingerprint(wrapped) == fingerprint(plain)


def test_a_compiled_model_computes_its_codes_after_quantizing(plain: PreTrainedModel) -> None:
    compiled = torch.compile(tiny_model("qwen3"), backend="eager")
    before = logits(compiled)
    quantize_(compiled, "w4-block32", "rtn")
    assert not torch.allclose(logits(compiled), before)
    torch.testing.assert_close(logits(compiled), logits(plain))


def test_a_model_in_distributed_data_parallel_is_refused(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny_model("qwen3"))
        with pytest.raises(GridError, match=r"DistributedDataParallel.*quantize first"):
            quantize_(wrapped, "w4-block32", "rtn")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compute", ["weight_norm", "old weight_norm", "pruning"])
def test_a_computed_weight_is_refused_by_name_unless_a_rule_keeps_it_float(compute: str) -> None:
    model, remedied = tiny_model("qwen3"), tiny_model("qwen3")
    layer = model.get_submodule(UP)
    match compute:
        case "weight_norm":
            parametrizations.weight_norm(layer)
            normed = parametrizations.weight_norm(remedied.get_submodule(UP))
            remove_parametrizations(normed, "weight")
        case "old weight_norm":
            nn.utils.weight_norm(layer)
        case _:
            prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(GridError, match=rf"(?s)1 layers.*{UP} computes its weight"):
        quantize_(model, "w4-block32", "rtn")
    quantize_(model, "w4-block32", "rtn", rules=[LayerRule(UP, None)])
    assert len(packed_weights(model)) == 13
    quantize_(remedied, "w4-block32", "rtn")
    assert f"{UP}.weight" in packed_weights(remedied)


def test_tensors_of_a_weight_norm_on_a_convolution_are_not_taken_for_experts() -> None:
    model = nn.Sequential(nn.Linear(32, 32), parametrizations.weight_norm(nn.Conv1d(32, 32, 3)))
    quantize_(model, "w4-block32", "rtn")
    assert packed_weights(model).keys() == {"0.weight"}


def test_attaching_first_and_quantizing_after_gives_the_same_base(plain: PreTrainedModel) -> None:
    wrapped = get_peft_model(tiny_model("qwen3"), LoraConfig(r=2, target_modules="all-linear"))
    quantize_(wrapped, "w4-block32", "rtn")
    assert fingerprint(wrapped) == fingerprint(plain)
    torch.testing.assert_close(logits(wrapped.eval()), logits(plain))


def test_a_forward_that_was_set_on_a_packed_layer_is_refused_and_hooks_are_not(
    plain: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("a weight was unpacked")

    with pytest.raises(GridError, match=r"Qwen3ForCausalLM has no packed layer.*quantize_"):
        assert_frozen(tiny_model("qwen3"))
    monkeypatch.setattr("qwlora.nn.packed_tensor.unpack", refuse)
    layer = plain.get_submodule(UP)
    layer.register_forward_hook(lambda *_: None)
    add_hook_to_module(plain.get_submodule("model.layers.0.mlp.up_proj"), AlignDevicesHook("cpu"))
    assert_frozen(plain)
    layer.forward = lambda x: x.new_zeros(*x.shape[:-1], 128)
    with pytest.raises(GridError, match=PATCHED):
        assert_frozen(plain)
    add_hook_to_module(layer, ModelHook())
    with pytest.raises(GridError, match=PATCHED):
        assert_frozen(plain)


def test_copies_of_packed_layers_are_refused_since_they_cannot_be_trained(
    plain: PreTrainedModel, tmp_path: Path
) -> None:
    saved = LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["q_proj"])
    adapted = get_peft_model(plain, saved)
    with pytest.raises(GridError, match=r"copied .*self_attn\.q_proj.*keep: float"):
        save_adapter(adapted, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_settings_that_change_the_base_are_refused(plain: PreTrainedModel, tmp_path: Path) -> None:
    rows = LoraConfig(r=2, target_modules=["up_proj"], trainable_token_indices=[1])
    with pytest.raises(SourceError, match=r"'default': .*trainable_token_indices: \[1\], .*rows"):
        save_adapter(get_peft_model(plain, rows), tmp_path)


def test_training_simulation_and_saving_check_it(plain: PreTrainedModel, tmp_path: Path) -> None:
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["up_proj"]))
    layer = adapted.base_model.model.get_submodule(f"{UP}.base_layer")
    layer.forward = lambda x: x @ torch.randn(64, 128)
    settings = TrainingSettings(1, 1e-3, 1, 0, "constant", 1, 0)
    for use in (
        lambda: train_adapter(adapted, IDS, settings, tmp_path / "work"),
        lambda: simulate(adapted.eval(), {"input_ids": IDS}),
        lambda: save_adapter(adapted, tmp_path / "adapter"),
        lambda: save_base(plain, tmp_path, byte_tokenizer(), source="here"),
    ):
        with pytest.raises(GridError, match=PATCHED):
            use()
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(QwloraError, match=r"none of the 1 packed layers.*layer first"):
        simulate(model.eval(), {"x": torch.ones(2, 32)})


def test_simulating_a_float_model_warns_that_there_are_no_base_encodings() -> None:
    with pytest.warns(UserWarning, match="Linear has no packed layer.*no base encodings"):
        simulation = simulate(nn.Linear(4, 4).eval(), {"input": torch.ones(2, 4)})
    assert not simulation.base_encodings
