"""GPTQ and AWQ folders: our integers, read by our readers, the formats' formula, and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from conftest import byte_tokenizer, tiny_model
from qwlora import quantize_
from qwlora.errors import ExportError
from qwlora.export.registry import TARGETS
from qwlora.export.target import ExportedBase, WeightsTarget
from qwlora.formats.assemble_model import load_precomputed
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme
from qwlora.nn.pack_at import packed_weights
from qwlora.nn.packed_modules import PackedEmbedding
from qwlora.quantize.layer_rules import Rule

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # autoawq, utils/packing_utils.py


def target(name: str) -> WeightsTarget:
    found = TARGETS[name]
    assert isinstance(found, WeightsTarget)
    return found


def base(scheme: Scheme, rules: list[Rule] | None = None, architecture: str = "llama") -> Any:
    """A quantized model whose scales are float16."""
    model = tiny_model(architecture, layers=1)
    quantize_(model, scheme, "search", rules=rules or [])
    for layer in packed_weights(model).values():
        with torch.no_grad():
            for name, buffer in layer.named_buffers():
                if name == "scale":
                    buffer.copy_(buffer.half())
    return model


def fields(words: NDArray[np.int32], bits: int, count: int) -> NDArray[np.int64]:
    """The fields of each row's little-endian bit stream, by numpy."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))


def gptq_values(folder: Path, layer: str, bits: int) -> NDArray[np.float32]:
    """W = scales[g_idx] * (qweight - qzeros[g_idx]), by AutoGPTQ; zeros are one less in v1."""
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    qweight, qzeros, scales, index = (
        tensors[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    codes = fields(qweight.T, bits, len(index)).T
    zeros = fields(qzeros, bits, scales.shape[1]) + (settings["checkpoint_format"] == "gptq")
    return (scales.astype(np.float32)[index] * (codes - zeros[index])).T.astype(np.float32)


def awq_values(folder: Path, layer: str) -> NDArray[np.float32]:
    tensors = load_file(folder / "model.safetensors")
    qweight, qzeros, scales = (tensors[f"{layer}.{p}"] for p in ("qweight", "qzeros", "scales"))

    def columns(words: NDArray[np.int32]) -> NDArray[np.int64]:
        nibbles = (words.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
        ordered = np.empty_like(nibbles)
        ordered[..., AWQ_ORDER] = nibbles
        return ordered.reshape(len(words), -1).astype(np.int64)

    repeated = len(qweight) // len(scales)
    zeros, wide = (np.repeat(x, repeated, axis=0) for x in (columns(qzeros), scales))
    return ((columns(qweight) - zeros) * wide.astype(np.float32)).T.astype(np.float32)


SCHEMES = [
    Scheme(bits, symmetric, granularity)
    for bits in (2, 3, 4, 5, 8)
    for symmetric in (True, False)
    for granularity in (PerBlock(32), PerBlock(64), PerChannel(), PerTensor(), PerBlock(16))
]


@pytest.mark.parametrize("name", ["gptq", "awq"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_is_held_bit_for_bit_or_refused(
    name: str, scheme: Scheme, tmp_path: Path
) -> None:
    model = base(scheme)
    bits = (4,) if name == "awq" else (2, 3, 4, 8)
    if scheme.bitwidth not in bits or scheme.granularity == PerBlock(16):
        assert target(name).problem(scheme) is not None
        with pytest.raises(ExportError, match=r"7 layers of this base"):
            target(name).write_base(ExportedBase(model, None), tmp_path)
        return
    assert target(name).problem(scheme) is None
    target(name).write_base(ExportedBase(model, byte_tokenizer()), tmp_path)
    found = packed_weights(load_precomputed(open_checkpoint(tmp_path)))
    expected = packed_weights(model)
    assert found.keys() == expected.keys()
    for path, layer in expected.items():
        assert torch.equal(found[path].codes, layer.codes)
        values = layer.tensor.dequantize()
        assert torch.equal(found[path].tensor.dequantize(), values)
        stored = path.removesuffix(".weight")
        by_formula = (
            awq_values(tmp_path, stored)
            if name == "awq"
            else gptq_values(tmp_path, stored, scheme.bitwidth)
        )
        assert np.array_equal(by_formula, values.numpy())


def test_a_zero_point_of_zero_is_written_in_version_2(tmp_path: Path) -> None:
    model = base(Scheme(4, False, PerBlock(32)))
    layer = next(iter(packed_weights(model).values()))
    for written, zero, version in ((tmp_path / "a", 1, "gptq"), (tmp_path / "b", 0, "gptq_v2")):
        for each in packed_weights(model).values():
            with torch.no_grad():
                each.get_buffer("zero_point").bitwise_or_(0x11)  # two 4-bit fields a byte
        if zero == 0:
            layer.get_buffer("zero_point").zero_()
        written.mkdir()
        target("gptq").write_base(ExportedBase(model, None), written)
        settings = json.loads((written / "config.json").read_text())["quantization_config"]
        assert settings["checkpoint_format"] == version
        found = packed_weights(load_precomputed(open_checkpoint(written)))
        for path, each in packed_weights(model).items():
            assert torch.equal(found[path].tensor.dequantize(), each.tensor.dequantize())
            values = gptq_values(written, path.removesuffix(".weight"), 4)
            assert np.array_equal(values, each.tensor.dequantize().numpy())


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_float_layers_are_named_and_embeddings_are_floats(name: str, tmp_path: Path) -> None:
    rules = [
        Rule("*.o_proj", None),
        Rule("*embed_tokens", Scheme(8, True, PerChannel())),
    ]
    model = base(Scheme(4, True, PerBlock(32)), rules, "qwen3")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    target(name).write_base(ExportedBase(model, None), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    kept = settings.get("dynamic", {}) | dict.fromkeys(settings.get("modules_to_not_convert") or ())
    assert len(kept) == 1
    assert "o_proj" in next(iter(kept))
    stored = load_file(tmp_path / "model.safetensors")
    assert np.array_equal(
        stored["model.embed_tokens.weight"], embedding.tensor.dequantize().numpy()
    )


@pytest.mark.parametrize(
    ("name", "architecture", "scheme", "rules", "message"),
    [
        ("gptq", "gpt2", Scheme(4), [], r"c_attn\.weight.*Conv1D"),
        (
            "gptq",
            "llama",
            Scheme(4, True, PerBlock(32)),
            [Rule("*.mlp.*", Scheme(8, True, PerBlock(32)))],
            "one bitwidth",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, architecture: str, scheme: Scheme, rules: list[Rule], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        target(name).write_base(ExportedBase(base(scheme, rules, architecture), None), tmp_path)


def test_a_scale_that_is_no_float16_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=1)
    quantize_(model, Scheme(4, True, PerBlock(32)), "rtn")
    with pytest.raises(ExportError, match=r"no float16.*gptq, search"):
        target("awq").write_base(ExportedBase(model, None), tmp_path)


@pytest.mark.client
def test_mlx_reads_the_same_weights(tmp_path: Path) -> None:
    """mlx-lm is somebody else's reader of GPTQ and AWQ folders; it has 4 bits in groups."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    for name in ("awq",):
        model = base(Scheme(4, False, PerBlock(32)))
        folder = tmp_path / name
        folder.mkdir()
        target(name).write_base(ExportedBase(model, byte_tokenizer()), folder)
        loaded = dict(load_model(folder)[0].named_modules())
        for path, layer in packed_weights(model).items():
            theirs = loaded[path.removesuffix(".weight")]
            values = mx.dequantize(
                theirs.weight,
                theirs.scales.astype(mx.float32),
                theirs.biases.astype(mx.float32),
                32,
                4,
            )
            expected = layer.tensor.dequantize().numpy()
            assert np.abs(np.array(values) - expected).max() <= 2e-3 * np.abs(expected).max()
