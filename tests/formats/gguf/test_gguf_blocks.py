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


def in_blocks(kind: str, raw: np.ndarray) -> np.ndarray:
    """A view of the bytes as [blocks, bytes]."""
    return raw.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])


def half(number: float) -> np.ndarray:
    return np.frombuffer(np.float16(number).tobytes(), np.uint8)


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


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K"])
def test_positive_scales_keep_the_codes_and_the_symmetric_grid(kind: str) -> None:
    raw = random_rows(kind, 8, 512)
    blocks, place = in_blocks(kind, raw), HALVES[kind][0]
    blocks[:, place : place + 2] = half(0.01)
    if kind == "Q6_K":
        blocks[:, 192:208] = 5
    if kind == "Q3_K":
        blocks[:, 96:108] = 0xFF  # every scale 63 - 32
    quantized = read(kind, raw)
    assert quantized.encoding.scheme.symmetric
    assert torch.equal(quantized.codes, decode_blocks(kind, torch.from_numpy(raw))[0])
    bits = [values.view(torch.int32) for values in (quantized.dequantize(), expected(kind, raw))]
    assert torch.equal(*bits)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITH_MINIMUM])
def test_negative_scales_are_kept_as_signed_blocks(kind: str) -> None:
    raw = random_rows(kind, 4, 256)
    codes, scales = decode_blocks(kind, torch.from_numpy(raw))
    found = read(kind, raw)
    assert found.encoding.scheme == Scheme(
        TYPES[kind][0], True, SignedBlock(256 // scales.shape[1])
    )
    is_block = scales.repeat_interleave(256 // scales.shape[1], 1) != 0
    assert torch.equal(found.codes[is_block], codes[is_block])
    assert torch.equal(found.encoding.scale[scales != 0], scales[scales != 0])


def test_a_constant_block_of_a_grid_with_minimum_has_its_minimum() -> None:
    raw = random_rows("Q4_1", 1, 32)
    raw[0, :4] = np.array([0, -1.5], np.float16).view(np.uint8)
    assert read("Q4_1", raw).dequantize().unique().tolist() == [-1.5]


@pytest.mark.parametrize("kind", WITH_MINIMUM)
def test_a_negative_scale_beside_a_minimum_is_exact_or_refused(kind: str) -> None:
    raw = random_rows(kind, 4, 256)
    blocks, (first, second) = in_blocks(kind, raw), HALVES[kind]
    blocks[:, first : first + 2] = half(-0.25)
    blocks[:, second : second + 2] = half(0.5)
    assert equals_ggufs(kind, raw)
    blocks[:, first : first + 2] = half(-30000)
    blocks[:, second : second + 2] = half(6e-8)
    facts = rf"tensor of {kind}: \d+ of \d+ scales are negative, .* quantize the float model"
    with pytest.raises(SourceError, match=facts):
        read(kind, raw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(kind: str, number: float) -> None:
    for place in HALVES[kind]:
        raw = random_rows(kind, 4, 256)
        raw[1, place : place + 2] = half(number)
        facts = rf"tensor of {kind}: a (scale|minimum) is .*finite.*file is damaged"
        with pytest.raises(SourceError, match=facts):
            read(kind, raw)
