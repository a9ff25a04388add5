"""Every type of block against the gguf package's dequantization."""

import gguf
import numpy as np
import pytest
import torch

from formats.gguf_models import HALVES, KINDS, WITH_MINIMUM, random_rows, with_one_zero
from qwlora.errors import SourceError
from qwlora.formats.gguf.gguf_checkpoint import TYPES, decode_blocks, to_quantized
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import Scheme, SignedBlock
from qwlora.nn.packed_tensor import PackedTensor


def read(kind: str, raw: np.ndarray) -> QuantizedTensor:
    return to_quantized(kind, decode_blocks(kind, torch.from_numpy(raw)), f"tensor of {kind}")


def expected(kind: str, raw: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))


def equals_ggufs(kind: str, raw: np.ndarray) -> bool:
    values = read(kind, raw).dequantize()
    return torch.equal(with_one_zero(values), with_one_zero(expected(kind, raw)))


def set_halves(kind: str, raw: np.ndarray, *numbers: float) -> np.ndarray:
    """Set the scale of every block, and its minimum; returns a view of the bytes as blocks."""
    blocks = raw.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    for place, number in zip(HALVES[kind], numbers, strict=True):
        blocks[:, place : place + 2] = np.frombuffer(np.float16(number).tobytes(), np.uint8)
    return blocks


@pytest.mark.parametrize("kind", KINDS)
def test_random_blocks_with_scales_of_both_signs_and_zero(kind: str) -> None:
    raw = random_rows(kind, 24, 768)
    quantized = read(kind, raw)
    assert equals_ggufs(kind, raw)
    packed = PackedTensor.from_quantized(quantized).dequantize()
    assert torch.equal(with_one_zero(packed), with_one_zero(expected(kind, raw)))
    assert quantized.encoding.scheme.float_offset == (kind in WITH_MINIMUM)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_gguf_package_quantizes(kind: str) -> None:
    values = np.random.default_rng(1).normal(size=(16, 256)).astype(np.float32)
    values[3, 32:64] = 0.25  # a constant block, and one of zeros
    values[4, :32] = 0
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    assert equals_ggufs(kind, raw)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITH_MINIMUM])
def test_scales_of_either_sign_keep_the_codes(kind: str) -> None:
    raw = random_rows(kind, 4, 256)
    codes, scales = decode_blocks(kind, torch.from_numpy(raw))
    found, size = read(kind, raw), 256 // scales.shape[1]
    assert found.encoding.scheme == Scheme(TYPES[kind][0], True, SignedBlock(size))
    assert torch.equal(found.encoding.scale[scales != 0], scales[scales != 0])
    is_scaled = scales.repeat_interleave(size, 1) != 0
    assert torch.equal(found.codes[is_scaled], codes[is_scaled])
    blocks = set_halves(kind, raw, 0.01)
    if kind in ("Q6_K", "Q3_K"):  # which have more scales inside
        inside, value = {"Q6_K": (slice(192, 208), 5), "Q3_K": (slice(96, 108), 255)}[kind]
        blocks[:, inside] = value
    positive = read(kind, raw)
    assert positive.encoding.scheme.symmetric
    assert torch.equal(positive.codes, decode_blocks(kind, torch.from_numpy(raw))[0])
    values = positive.dequantize().view(torch.int32)
    assert torch.equal(values, expected(kind, raw).view(torch.int32))


@pytest.mark.parametrize("kind", WITH_MINIMUM)
def test_a_negative_scale_beside_a_minimum_is_exact_or_refused(kind: str) -> None:
    raw = random_rows(kind, 4, 256)
    set_halves(kind, raw, -0.25, 0.5)
    assert equals_ggufs(kind, raw)
    set_halves(kind, raw, -30000, 6e-8)
    with pytest.raises(SourceError, match=rf"tensor of {kind}: \d+ of \d+ scales are negative"):
        read(kind, raw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(kind: str, number: float) -> None:
    for place in HALVES[kind]:
        raw = random_rows(kind, 4, 256)
        raw[1, place : place + 2] = np.frombuffer(np.float16(number).tobytes(), np.uint8)
        with pytest.raises(SourceError, match=rf"tensor of {kind}: a (scale|minimum) .*damaged"):
            read(kind, raw)
