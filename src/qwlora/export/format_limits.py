"""Which schemes and kinds of layers the formats of weights targets can hold as integers. Imports no
torch."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

from qwlora.formats.bitwidths import MLX_BITWIDTHS
from qwlora.grid.scheme import Blocks, Scheme
from qwlora.messages import listed

MLX_GROUPS = (128, 64, 32)
NBITS_BLOCKS = (256, 128, 64, 32, 16)  # of ONNX Runtime's MatMulNBits


class LayerKind(Enum):
    """What a weight is part of."""

    LINEAR = "a Linear layer"
    CONV1D = "transformers' Conv1D"  # of GPT-2; its weight is [in, out]
    EMBEDDING = "an embedding"
    OTHER = "another layer"  # experts that are stacked in one tensor, convolutions


def layer_kind_problem(kind: LayerKind, holder: str) -> str | None:
    """Why no integers of a kind of layer are written for a format or program; None if they are, or
    floats are written instead, as for most embeddings."""
    match kind:
        case LayerKind.OTHER:
            return f"only Linear layers and embeddings can be written for {holder}"
        case LayerKind.CONV1D:
            return f"{holder} has no integers for transformers' Conv1D"
    return None


def encodings_problem(scheme: Scheme) -> str | None:
    """Why an AIMET encodings file cannot hold a scheme; None if it can."""
    if scheme.float_offset:
        return f"{scheme} has a float offset; AIMET encodings and NPUs have integer offsets only"
    return None


def compressed_tensors_problem(scheme: Scheme) -> str | None:
    """Why compressed-tensors cannot hold a scheme; None if it can."""
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
    """Why GGUF cannot hold a scheme; None if it can."""
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
    """Why MLX cannot hold a scheme; None if it can."""
    if scheme.bitwidth not in MLX_BITWIDTHS:
        return f"{scheme}: MLX has {', '.join(map(str, MLX_BITWIDTHS))} bits"
    match scheme.granularity:
        case Blocks(size) if all(size % group for group in MLX_GROUPS):
            return f"{scheme}: MLX has groups of 32, 64 and 128"
    return None


def nbits_problem(scheme: Scheme) -> str | None:
    """Why ONNX Runtime's MatMulNBits cannot hold a scheme; None if it can."""
    if scheme.bitwidth > 8:
        return f"{scheme}: MatMulNBits has 2, 4 and 8 bits"
    if scheme.float_offset and scheme.bitwidth > 4:
        return f"{scheme}: MatMulNBits has float offsets for 2 and 4 bits only"
    match scheme.granularity:
        case Blocks(size) if size % NBITS_BLOCKS[-1]:
            return f"{scheme}: MatMulNBits has blocks of 16, 32, 64, 128 and 256"
    return None


def openvino_problem(scheme: Scheme) -> str | None:
    """Why OpenVINO's IR cannot hold a scheme; None if it can."""
    if scheme.bitwidth > 8:
        return f"{scheme}: OpenVINO's constants have up to 8 bits"
    return None
