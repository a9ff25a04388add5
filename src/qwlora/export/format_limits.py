"""Which schemes and kinds of layers the formats of targets can hold as integers. Imports no torch.

A function here gives the reason why not, and None if a format can.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from functools import partial

from qwlora.errors import listed
from qwlora.export.npu.htp_limits import table_problem, weight_problem
from qwlora.formats.bitwidths import MLX_BITWIDTHS
from qwlora.grid.scheme import Blocks, Scheme

MLX_GROUPS = (128, 64, 32)
NBITS_BLOCKS = (256, 128, 64, 32, 16)  # of ONNX Runtime's MatMulNBits


class LayerKind(Enum):
    """What a weight is part of."""

    LINEAR = "a Linear layer"
    CONV1D = "transformers' Conv1D"  # of GPT-2; its weight is [in, out]
    EMBEDDING = "an embedding"
    OTHER = "another layer"  # experts that are stacked in one tensor, convolutions


def _kind_problem(holder: str, kind: LayerKind) -> str | None:
    """Embeddings are no problem: they are written as floats where there are no integers for
    them."""
    match kind:
        case LayerKind.OTHER:
            return f"only Linear layers and embeddings can be written for {holder}"
        case LayerKind.CONV1D:
            return f"{holder} has no integers for transformers' Conv1D"
    return None


compressed_tensors_kind_problem = partial(_kind_problem, "compressed-tensors")
mlx_kind_problem = partial(_kind_problem, "mlx-lm")


def gguf_kind_problem(kind: LayerKind) -> str | None:
    """Of GGUF files."""
    if kind is LayerKind.CONV1D:
        return "GGUF files hold transformers' Conv1D in a form that no adapter can be added to"
    return None


def htp_problem(scheme: Scheme) -> str | None:
    """Of products on Qualcomm's HTP."""
    problem = weight_problem(scheme)
    return problem and f"{scheme}: {problem}"


def htp_embedding_problem(scheme: Scheme) -> str | None:
    """Of embeddings on Qualcomm's HTP."""
    problem = table_problem(scheme)
    return problem and f"{scheme} of an embedding: {problem}"


def encodings_problem(scheme: Scheme) -> str | None:
    """Of an AIMET encodings file."""
    if scheme.float_offset:
        return f"{scheme} has a float offset; AIMET encodings and NPUs have integer offsets only"
    return None


def compressed_tensors_problem(scheme: Scheme) -> str | None:
    """Of compressed-tensors."""
    if scheme.float_offset:
        return f"{scheme} has a float offset; compressed-tensors has integer zero points only"
    return None


def transformers_conflict(schemes: Collection[Scheme]) -> str | None:
    """Why transformers cannot read layers of these schemes from one folder; None if it can."""
    if len(schemes) < 2 or all(scheme.symmetric for scheme in schemes):
        return None
    return (
        f"{listed(sorted(map(str, schemes)))} together: transformers reads an asymmetric scheme "
        "only if all layers have it"
    )


def gguf_problem(scheme: Scheme) -> str | None:
    """Of GGUF."""
    bits = (4, 5) if scheme.float_offset else (4, 5, 8)
    if not (scheme.symmetric or scheme.float_offset):
        return f"{scheme}: GGUF has symmetric grids and float offsets, no integer zero points"
    if scheme.bitwidth not in bits:
        return f"{scheme}: GGUF has {' and '.join(map(str, bits))} bits in blocks of 32"
    match scheme.granularity:
        case Blocks(size) if size % 32:
            return f"{scheme}: GGUF has blocks of 32"
    return None


def mlx_problem(scheme: Scheme) -> str | None:
    """Of MLX."""
    if scheme.bitwidth not in MLX_BITWIDTHS:
        return f"{scheme}: MLX has {', '.join(map(str, MLX_BITWIDTHS))} bits"
    match scheme.granularity:
        case Blocks(size) if all(size % group for group in MLX_GROUPS):
            return f"{scheme}: MLX has groups of 32, 64 and 128"
    return None


def nbits_problem(scheme: Scheme) -> str | None:
    """Of ONNX Runtime's MatMulNBits."""
    if scheme.bitwidth > 8:
        return f"{scheme}: MatMulNBits has 2, 4 and 8 bits"
    if scheme.float_offset and scheme.bitwidth > 4:
        return f"{scheme}: MatMulNBits has float offsets for 2 and 4 bits only"
    match scheme.granularity:
        case Blocks(size) if size % NBITS_BLOCKS[-1]:
            return f"{scheme}: MatMulNBits has blocks of 16, 32, 64, 128 and 256"
    return None


def openvino_problem(scheme: Scheme) -> str | None:
    """Of OpenVINO's IR."""
    if scheme.bitwidth > 8:
        return f"{scheme}: OpenVINO's constants have up to 8 bits"
    return None
