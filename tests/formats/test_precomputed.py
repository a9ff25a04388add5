"""Building a model from a checkpoint, loading and releasing modules, and streamed quantization.

Expected values come from a plain transformers model with the same values as floats.
"""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from conftest import ARCHITECTURES, byte_tokenizer, tiny_model
from formats.models import logits, mixtral, read_integers
from formats.packing import quantized
from qwlora import fingerprint, load_base, save_base
from qwlora.errors import CalibrationError, GridError, SourceError
from qwlora.formats.checkpoint import LazyModel
from qwlora.formats.open_checkpoint import load_precomputed
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import Scheme, parse_scheme
from qwlora.nn import is_packable, is_packed, packed_weights, weight_out_in
from qwlora.nn.packed_layer import parameter_out_in
from qwlora.quantize.layer_rules import LayerRule
from qwlora.quantize.quantize_model import quantize_checkpoint

KINDS = (*ARCHITECTURES, "mixtral")


def model_of(kind: str) -> PreTrainedModel:
    return mixtral(vocab_size=260) if kind == "mixtral" else tiny_model(kind)


class Held:
    """A checkpoint in memory with the values of `model`, quantized if a scheme is given.

    `changes` are functions that replace single values, by name.
    """

    path = Path("in memory")

    def __init__(self, model: PreTrainedModel, scheme: Scheme | None = None, changes: Any = ()):
        self.model, self.config, self.scheme = model, model.config, scheme
        self.changes = dict(changes)
        first: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            first.setdefault(id(tensor), name)
        self.order = list(first.values())
        self.given: list[weakref.ref[Any]] = []
        self.most_alive = 0

    def names(self) -> list[str]:
        return self.order

    def read(self, name: str) -> Tensor | QuantizedTensor:
        value = self._stored(name)
        return self.changes[name](value) if name in self.changes else value

    def _stored(self, name: str) -> Tensor | QuantizedTensor:
        path, _, key = name.rpartition(".")
        module = self.model.get_submodule(path)
        value = self.model.state_dict()[name]
        if self.scheme is not None and value.ndim == 3:  # experts
            return quantized(parameter_out_in(module, key), self.scheme)
        if self.scheme is not None and is_packable(module) and key == "weight":
            return quantized(weight_out_in(module), self.scheme)
        if value.dtype != torch.float32:
            return value.clone()

        array = value.numpy().copy()  # alive as long as any tensor on its memory is
        self.given.append(weakref.ref(array))
        alive = [held for reference in self.given if (held := reference()) is not None]
        self.most_alive = max(self.most_alive, sum(held.nbytes for held in alive))
        return torch.from_numpy(array)


def float_twin(checkpoint: Held) -> PreTrainedModel:
    """The same model with the dequantized values, in transformers' own layers."""
    twin = type(checkpoint.model)(checkpoint.config).eval()
    twin.load_state_dict(checkpoint.model.state_dict())
    for name in checkpoint.names():
        value = checkpoint.read(name)
        if isinstance(value, QuantizedTensor):
            parameter, weight = twin.get_parameter(name), value.dequantize()
            is_turned = isinstance(twin.get_submodule(name.rpartition(".")[0]), Conv1D)
            parameter.data.copy_(weight.T if is_turned else weight.view(parameter.shape))
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["w4-block32", "w3-block16-asymmetric", "w8-channel"])
def test_an_assembled_model_is_its_float_twin(kind: str, scheme: str, tmp_path: Path) -> None:
    checkpoint = Held(model_of(kind), parse_scheme(scheme))
    model = load_precomputed(checkpoint)
    expected = logits(float_twin(checkpoint))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert not any(t.is_meta for t in model.state_dict().values())
    assert not any(p.requires_grad for p in model.parameters())
    for name, layer in packed_weights(model).items():
        if not layer.is_tied:
            value = read_integers(checkpoint, name)
            assert torch.equal(layer.codes, value.codes)
    identity = save_base(model, tmp_path, byte_tokenizer(), source="somewhere")
    loaded = load_base(tmp_path)
    assert fingerprint(loaded) == fingerprint(load_precomputed(checkpoint)) == identity
    assert torch.equal(logits(loaded), logits(model))


def test_a_tied_tensor_is_read_once_under_either_name() -> None:
    checkpoint = Held(tiny_model("llama"), parse_scheme("w4-block32"))
    assert "lm_head.weight" not in checkpoint.names()
    model: Any = load_precomputed(checkpoint)
    assert is_packed(model.lm_head)
    assert model.lm_head.tensor.parts.packed is model.model.embed_tokens.packed
    floats = Held(tiny_model("llama"))
    floats.order[floats.order.index("model.embed_tokens.weight")] = "lm_head.weight"
    model = load_precomputed(floats)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def changed(name: str, change: Callable[[Any], Any], scheme: Scheme | None = None) -> Held:
    """A checkpoint of which one tensor is another."""
    return Held(tiny_model("llama"), scheme, {name: change})


def wrong_names() -> Held:
    checkpoint = Held(tiny_model("llama"))
    checkpoint.order = [n for n in checkpoint.order if "q_proj" not in n] + ["model.layers.9.mlp"]
    return checkpoint


def no_language_model() -> Held:
    checkpoint = Held(tiny_model("llama"))
    checkpoint.config = PretrainedConfig()
    return checkpoint


UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
FOUR, EIGHT = parse_scheme("w4-block32"), parse_scheme("w8-tensor")
MISSING = r"missing: .*0.self_attn.q_proj.weight, .*1.*q_proj.weight"
TURNED = quantized(torch.randn(64, 128), FOUR)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (wrong_names, rf"{MISSING}; unknown .*: model.layers.9.mlp"),
        (no_language_model, "does not describe a causal language model"),
        (lambda: changed(UP, lambda t: t.T), rf"{UP} has shape \[64, 128\] .* but \[128, 64\]"),
        (lambda: changed(UP, lambda _: TURNED, FOUR), rf"{UP} is int4 .* cannot .*\[64, 128\]"),
        (
            lambda: changed(NORM, lambda t: quantized(t, EIGHT)),
            rf"{NORM} is int8 .* cannot be pack",
        ),
    ],
)
def test_what_does_not_fit_is_named(checkpoint, message) -> None:
    with pytest.raises(SourceError, match=message):
        load_precomputed(checkpoint())


def test_parts_are_loaded_and_let_go() -> None:
    checkpoint = Held(tiny_model("llama"))
    lazy = LazyModel(checkpoint)
    assert all(p.is_meta for p in lazy.model.parameters())
    lazy.materialize_("model.layers.1")
    block: Any = lazy.model.get_submodule("model.layers.1")
    assert sum(not p.is_meta for p in lazy.model.parameters()) == len(list(block.parameters()))
    block.mlp.up_proj.weight.data.zero_()
    lazy.materialize_("model.layers.1")
    assert not block.mlp.up_proj.weight.any(), "what has data is not loaded again"
    lazy.release_("model.layers.1")
    lazy.materialize_("model.layers.1")
    assert bool(block.mlp.up_proj.weight.any())
    lazy.release_("model.layers.1")
    loaded: list[set[str]] = []  # numbers of blocks that have data, at each call of a block

    def record(*_: Any) -> None:
        names = [name for name, p in lazy.model.named_parameters() if not p.is_meta]
        loaded.append({name.split(".")[2] for name in names if ".layers." in name})

    for block in lazy.model.model.layers:
        block.mlp.register_forward_hook(record)
    with lazy.one_block_at_a_time() as model:
        for _ in range(2):
            assert torch.equal(logits(model), logits(tiny_model("llama")))
    assert loaded == [{"0"}, {"1"}] * 2
    assert all(p.is_meta for p in lazy.model.parameters())
    gc.collect()
    assert all(t() is None for t in checkpoint.given), "nothing holds the floats"


def stream(checkpoint: Held, folder: Path, solver: str = "rtn", **settings: Any) -> Any:
    scheme, tokenizer = settings.pop("scheme", "w4-block32"), byte_tokenizer()
    return quantize_checkpoint(checkpoint, tokenizer, folder, "x", scheme, solver, **settings)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
def test_what_streaming_holds(kind: str, tmp_path: Path, loaded_at_finish: list[str]) -> None:
    checkpoint = Held(model_of(kind))
    sizes = [p.nbytes for p in checkpoint.model.parameters()]
    rules = [LayerRule("*embed_tokens", parse_scheme("w4-block16"))]
    stream(checkpoint, tmp_path, rules=rules, shard_bytes=10_000)
    assert loaded_at_finish == [], "only shapes are left of the model"
    assert checkpoint.most_alive <= 2 * max(sizes) + 10_000
    assert checkpoint.most_alive < sum(sizes) / 2, "a model of more than one block"


def test_streaming_keeps_integers_and_an_older_base_when_it_stops(tmp_path: Path) -> None:
    checkpoint = Held(tiny_model("llama"), parse_scheme("w4-block32"))
    identity, _ = quantize_checkpoint(checkpoint, byte_tokenizer(), tmp_path, "x", None)
    assert identity == fingerprint(load_precomputed(checkpoint))
    with pytest.raises(SourceError, match=r"q_proj\.weight is already integers.*scheme"):
        stream(checkpoint, tmp_path)
    with pytest.raises(CalibrationError, match=f"{UP} contains"):
        stream(changed(UP, lambda t: t * torch.nan), tmp_path)
    assert fingerprint(load_base(tmp_path)) == identity
    assert not [*tmp_path.glob(".*")]


def test_what_cannot_be_streamed_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    checkpoint = Held(tiny_model("llama"))
    checkpoint.read = None  # type: ignore[method-assign, assignment]
    with pytest.raises(GridError, match="solver gptq and moments need calibration data"):
        stream(checkpoint, tmp_path, "gptq")
    with pytest.raises(GridError, match="block 48"):
        stream(checkpoint, tmp_path, scheme="w4-block48")
    with pytest.raises(GridError, match=r"'\*.nowhere' matches no layer"):
        stream(checkpoint, tmp_path, rules=[LayerRule("*.nowhere", None)])
