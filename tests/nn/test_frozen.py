"""Models that somebody changed, before `quantize_` and before `assert_frozen`: hooks, patches, wrappers, computed weights, NaN."""

from collections.abc import Callable
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
from qwlora.analysis.token_scores import score_tokens
from qwlora.errors import CalibrationError, GridError, NonFiniteError, SourceError
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.nn import packed_weights
from qwlora.nn.frozen import check_base_finite, check_finite
from qwlora.quantize.layer_rules import LayerRule
from qwlora.quantize.quantize_model import quantize_checkpoint

IDS = torch.arange(16).view(2, 8)
UP = "model.layers.1.mlp.up_proj"
PATCHED = rf"(?s)1 packed layers have a forward that was set .*{UP.replace('.', '[.]')}"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def plain() -> PreTrainedModel:
    return packed_model("qwen3")


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_a_model_dispatched_by_accelerate_computes_its_codes(architecture: str) -> None:
    plain = packed_model(architecture)
    model = dispatch_model(tiny_model(architecture), {"": "cpu"}, force_hooks=True)
    quantize_(model, "w4-block32", "rtn")
    assert torch.equal(logits(model), logits(plain))
    assert fingerprint(model) == fingerprint(plain)
    hooked = [m for m in model.modules() if isinstance(m, PackedLinear) and hasattr(m, "_hf_hook")]
    assert len(hooked) == len(packed_weights(model))
    path = next(name for name, module in model.named_modules() if module is hooked[0])
    unpack_(model)  # leaves no forward on codes
    layer = model.get_submodule(path)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias = None
    assert not layer(torch.ones(1, 64)).any()


def patched(model: nn.Module) -> nn.Module:
    layer = model.get_submodule(UP)
    layer.forward = layer.forward  # bound to this module, as any patch that calls the old one is
    return model


def patched_below_a_hook(model: nn.Module) -> nn.Module:
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    model.get_submodule(UP)._old_forward = lambda x: x
    return model


def on_layer(change: Callable[[nn.Module], Any]) -> Callable[[nn.Module], nn.Module]:
    return lambda model: [model, change(model.get_submodule(UP))][0]


COMPUTED = rf"(?s)1 layers.*{UP} computes its weight"
CHANGED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "patched": (patched, rf"(?s)1 layers.*{UP} has a 'forward'.*del layer"),
    "patched below a hook": (patched_below_a_hook, rf"(?s)1 layers.*{UP} has a 'forward'"),
    "compiled in place": (on_layer(lambda m: m.compile(backend="eager")), f"{UP} was compiled"),
    "weight_norm": (on_layer(parametrizations.weight_norm), COMPUTED),
    "old weight_norm": (on_layer(nn.utils.weight_norm), COMPUTED),
    "pruning": (on_layer(lambda m: prune.l1_unstructured(m, "weight", 0.5)), COMPUTED),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED)
def test_a_changed_layer_is_refused_by_name_unless_a_rule_keeps_it_float(
    change: Callable[[nn.Module], nn.Module], message: str
) -> None:
    model = change(tiny_model("qwen3"))
    with pytest.raises(GridError, match=message):
        quantize_(model, "w4-block32", "rtn")
    assert not packed_weights(model)
    quantize_(model, "w4-block32", "rtn", rules=[LayerRule(UP, None)])
    assert len(packed_weights(model)) == 13
    assert f"{UP}.weight" not in packed_weights(model)


def test_what_is_no_layer_of_its_own_does_not_disturb() -> None:
    model = tiny_model("qwen3")
    cpu_offload(model)
    with pytest.raises(GridError, match=r"q_proj\.weight.*device_map offloading"):
        quantize_(model, "w4-block32", "rtn")
    # tensors of a weight norm on a convolution are not taken for experts
    model = nn.Sequential(nn.Linear(32, 32), parametrizations.weight_norm(nn.Conv1d(32, 32, 3)))
    remove_parametrizations(parametrizations.weight_norm(model[0]), "weight")
    quantize_(model, "w4-block32", "rtn")
    assert packed_weights(model).keys() == {"0.weight"}


LORA = LoraConfig(r=2, target_modules="all-linear")
WRAPPERS = [
    partial(torch.compile, backend="eager"),
    nn.DataParallel,
    nn.Sequential,
    lambda model: get_peft_model(model, LORA).eval(),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_head_of_a_wrapped_model_stays_float(wrap: Any, plain: PreTrainedModel) -> None:
    model = tiny_model("qwen3")
    wrapped = wrap(model)
    if wrap is not nn.Sequential:
        logits(wrapped)  # a graph of floats, if it is compiled
    quantize_(wrapped, "w4-block32", "rtn")
    assert type(model.lm_head) is nn.Linear
    assert packed_weights(model).keys() == packed_weights(plain).keys()
    if wrap is not nn.Sequential:
        assert fingerprint(wrapped) == fingerprint(plain)
        torch.testing.assert_close(logits(wrapped), logits(plain))


def test_a_model_in_distributed_data_parallel_is_refused(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny_model("qwen3"))
        with pytest.raises(GridError, match=r"DistributedDataParallel.*Quantize first"):
            quantize_(wrapped, "w4-block32", "rtn")
    finally:
        torch.distributed.destroy_process_group()


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


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"modules_to_save": ["q_proj"]}, GridError, r"copied .*self_attn\.q_proj.*keep: float"),
        ({"trainable_token_indices": [1]}, SourceError, r"'default': .*trainable_token_indices"),
    ],
)
def test_adapters_that_change_the_base_are_refused(
    settings: dict[str, Any], error: Any, message: str, plain: PreTrainedModel, tmp_path: Path
) -> None:
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["up_proj"], **settings))
    with pytest.raises(error, match=message):
        save_adapter(adapted, tmp_path)
    assert not [*tmp_path.iterdir()]


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
    with pytest.warns(UserWarning, match="TwoLayers has no packed layer.*no base encodings"):
        simulation = simulate(model.eval(), {"x": torch.ones(2, 32)})
    assert not simulation.base_encodings
    quantize_(model, "w4-block32", "rtn")
    with pytest.raises(QwloraError, match=r"none of the 1 packed layers.*layer first"):
        simulate(model.eval(), {"x": torch.ones(2, 32)})


@pytest.mark.parametrize(
    ("tensor", "index", "found"),
    [
        ("model.norm.weight", 3, r"1 values .* first at index \[3\]"),
        ("model.embed_tokens.weight", (5, slice(2, 4)), r"2 values .* first at index \[5, 2\]"),
        ("model.layers.0.mlp.up_proj.scale", 3, "2 values"),
    ],
)
def test_no_nan_is_frozen(tensor: str, index: Any, found: str, tmp_path: Path) -> None:
    floats, packed, base = tiny_model("llama"), packed_model("llama"), tmp_path / "base"
    for model in (floats, packed):
        if tensor in model.state_dict():
            model.state_dict()[tensor][index] = torch.nan
    uses: list[Callable[[], Any]] = [lambda: save_base(packed, base, byte_tokenizer(), source="x")]
    if not tensor.endswith("scale"):
        floats.save_pretrained(tmp_path / "floats")
        checkpoint = FolderCheckpoint(tmp_path / "floats")
        uses += [
            lambda: quantize_(floats, "w4-block32", "rtn"),
            lambda: quantize_checkpoint(
                checkpoint, byte_tokenizer(), base, "x", "w4-block32", "rtn"
            ),
        ]
    for use in uses:
        with pytest.raises(CalibrationError, match=f"{tensor} contains {found}"):
            use()
        assert not (base / "base.json").exists()


def test_nan_and_infinities_are_counted_but_for_the_infinities_of_a_mask() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.tensor([0, torch.nan, torch.inf, -torch.inf], dtype=dtype)
        check_finite("w", values[:1])
        with pytest.raises(CalibrationError, match=r"w contains 3 values .* first at index \[1\]"):
            check_finite("w", values)
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    check_base_finite(module)
    module.register_buffer("mask", torch.tensor([0.0, torch.nan]))
    with pytest.raises(CalibrationError, match=r"mask contains 1 values .* first at index \[1\]"):
        check_base_finite(module)


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nan, "sequence 2 of 2 .* is nan"), (2e3, "sequence 1 of 2 .* perplexity is undefined")],
)
def test_a_perplexity_that_is_no_number_names_what_was_measured(value: float, message: str) -> None:
    def logits(ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(1, ids.shape[1], 260)
        out[..., 0] = value if ids[0, 0] or value == 2e3 else 0.0
        return out

    with pytest.raises(NonFiniteError, match=f"perplexity, float: .*{message}"):
        score_tokens(logits, IDS + (IDS >= 8), "perplexity, float")
