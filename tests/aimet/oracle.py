"""AIMET's quantizers for our schemes, and their comparison with our encodings."""

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "aimet_torch", reason="runs in an environment with aimet-torch: make test-aimet"
)

from aimet_torch.nn import QuantizationMixin
from aimet_torch.quantization.affine import GroupedBlockQuantizeDequantize, QuantizeDequantize
from aimet_torch.quantization.encoding_analyzer import (
    EncodingAnalyzer,
    MinMaxEncodingAnalyzer,
    PercentileEncodingAnalyzer,
    SqnrEncodingAnalyzer,
)
from aimet_torch.quantsim import QuantizationSimModel

from qwlora.grid.encoding import Encoding
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme

from .table import Comparison

__all__ = [
    "GroupedBlockQuantizeDequantize",
    "PercentileEncodingAnalyzer",
    "QuantizationMixin",
    "QuantizationSimModel",
    "QuantizeDequantize",
    "SqnrEncodingAnalyzer",
    "aimet_lpbq_quantizer",
    "aimet_numbers",
    "aimet_quantizer",
    "compare",
    "ulps",
]


def aimet_shape(
    scheme: Scheme, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """AIMET's (shape of the parameters, block size) for a scheme and a tensor's shape."""
    match scheme.granularity:
        case PerTensor():
            return (), None
        case PerChannel(axis):
            axis %= len(shape)
            return tuple(n if i == axis else 1 for i, n in enumerate(shape)), None
        case PerBlock(size) | Lpbq(size):
            return (*shape[:-1], shape[-1] // size), (*(1 for _ in shape[:-1]), size)


def aimet_quantizer(
    x: Tensor,
    scheme: Scheme,
    analyzer: type[EncodingAnalyzer] = MinMaxEncodingAnalyzer,
    **options: float,
) -> QuantizeDequantize:
    """A calibrated AIMET quantizer."""
    shape, block_size = aimet_shape(scheme, tuple(x.shape))
    quantizer = QuantizeDequantize(
        shape,
        scheme.bitwidth,
        scheme.symmetric,
        analyzer(shape, block_size=block_size, **options),
        block_size,
    )
    with torch.no_grad(), quantizer.compute_encodings():
        quantizer(x)
    return quantizer


def aimet_lpbq_quantizer(x: Tensor, scheme: Scheme) -> GroupedBlockQuantizeDequantize:
    """A calibrated AIMET LPBQ quantizer, with one float scale per row."""
    assert isinstance(scheme.granularity, Lpbq)
    shape, block_size = aimet_shape(scheme, tuple(x.shape))
    bitwidth = scheme.bitwidth + scheme.granularity.scale_bitwidth
    analyzer = MinMaxEncodingAnalyzer(shape, block_size=block_size)
    quantizer = GroupedBlockQuantizeDequantize(
        shape, scheme.bitwidth, True, bitwidth, analyzer, block_size, block_grouping=(1, -1)
    )
    with torch.no_grad(), quantizer.compute_encodings():
        quantizer(x)
    return quantizer


def aimet_numbers(quantizer: QuantizeDequantize) -> tuple[Tensor, Tensor]:
    """(scale, offset for unsigned codes), flat."""
    scale = quantizer.get_scale().detach()
    offset = (quantizer.get_offset().detach() + quantizer.qmin).broadcast_to(scale.shape)
    return scale.flatten(), offset.flatten().to(torch.int32)


def ulps(a: Tensor, b: Tensor) -> int:
    """The largest distance between positive float32 numbers, in representable numbers."""
    first, second = (x.contiguous().view(torch.int32).long() for x in (a, b))
    return int((first - second).abs().max())


def compare(row: Comparison, x: Tensor, encoding: Encoding, quantizer: QuantizeDequantize) -> None:
    """Compare scales, offsets and fake-quantized values of `x`.

    AIMET divides by the scale if gradients are enabled. Under `no_grad`, per tensor and per
    channel, it calls `torch.fake_quantize_*`, which multiplies by the reciprocal of the scale.
    """
    scale, offset = aimet_numbers(quantizer)
    ours, theirs = encoding.fake_quantize(x), quantizer(x).detach()
    with torch.no_grad():
        shortcut = quantizer(x)
    row.tensors += 1
    row.scales += scale.numel()
    row.values += x.numel()
    row.worst_ulps = max(row.worst_ulps, ulps(scale, encoding.scale.flatten()))
    row.scales_differ += int((scale != encoding.scale.flatten()).sum())
    row.offsets_differ += int((offset != encoding.offset.flatten()).sum())
    row.values_differ += int((theirs != ours).sum())
    row.shortcut_differ += int((shortcut != ours).sum())
