"""Freeze a model on an existing grid: from weights that lie on it, or from integers.

    freeze_(model, "model.encodings")                                    an AIMET file
    freeze_(model, {"model.layers.0.mlp.up_proj.weight": encoding, ...})
    freeze_(model, codes={"model.layers.0.mlp.up_proj.weight": (codes, scale)}, bitwidth=4)

Unlike `quantize_`, which chooses a grid, this rounds nothing: a weight that is off its grid is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qwlora.errors import GridError, lines, suggestion
from qwlora.formats.aimet import matched_encodings
from qwlora.grid.encoding import Encoding, QuantizedTensor
from qwlora.grid.scheme import Granularity, PerBlock, PerChannel, PerTensor, Scheme
from qwlora.nn import pack_at_, tensor_out_in
from qwlora.quantize.layer_rules import find_tensors
from qwlora.quantize.quantize_model import finish_packing_, model_to_pack

# Largest distance from the grid, in steps, that counts as rounding of the weight's computation.
TOLERANCE = 0.01


def freeze_(
    model: nn.Module,
    encodings: Mapping[str, Encoding] | str | Path | None = None,
    *,
    codes: Mapping[str, tuple[Tensor, ...]] | None = None,
    bitwidth: int | None = None,
    signed: bool = True,
    keep_float: Sequence[str] = (),
) -> nn.Module:
    """Replace weights by packed layers on a given grid, in place; returns `model`.

        from an encoding    codes = round(W / scale) - offset, if |W - W_hat| <= 0.01 scale
        from codes          W_hat = (code + offset) scale; offset 0 if it is not given

    Weights that are stored in float16 or bfloat16 may be off by the rounding of their type.

    Args:
        encodings: an AIMET encodings file, or encoding by the weight's name, in the layout
            [out, in] of a Linear layer.
        codes: (integers [out, in], scale) or (integers, scale, offset) by the weight's name. The
            scale's shape gives the granularity: [], [out], [out, 1] or [out, in / block size].
        bitwidth: of the codes.
        signed: whether the codes run from -2^(bitwidth - 1), or from 0.
        keep_float: with an encodings file: globs of parameters or layers that stay float.

    Raises:
        EncodingsFileError: the file cannot be read, or does not fit the model.
        GridError: a name is not a weight that can be packed, a weight lies off its grid (named,
            with the distance in steps), or a scale does not fit its codes. The model is unchanged.
    """
    if (encodings is None) == (codes is None):
        raise GridError("freeze_ takes either encodings or codes")
    given = model_to_pack(model)
    known = find_tensors(given)
    if isinstance(encodings, str | Path):
        grids = matched_encodings(given, encodings, keep_float)
        # a vector's values already lie on its grid, and it has no packed layer
        encodings = {n: grid for n, grid in grids.items() if given.get_parameter(n).ndim > 1}
    packed, problems = dict[str, QuantizedTensor](), list[str]()
    for name in encodings or codes or ():
        if name not in known:
            problems.append(f"{name}: no weight that can be packed{suggestion(name, list(known))}")
            continue
        try:
            if encodings is not None:
                packed[name] = _on_grid(tensor_out_in(given, name), encodings[name])
            elif codes is not None:
                packed[name] = _from_codes(codes[name], bitwidth, signed)
                shapes = [list(packed[name].codes.shape), list(tensor_out_in(given, name).shape)]
                if shapes[0] != shapes[1]:
                    raise GridError(
                        f"the codes have shape {shapes[0]}, the weight is {shapes[1]} [out, in]"
                    )
        except GridError as error:
            problems.append(f"{name}: {error}")
    if problems:
        shown = "\n  ".join(lines(problems))
        raise GridError(f"{len(problems)} weights cannot be frozen:\n  {shown}")
    if not packed:
        raise GridError("there is nothing to freeze: no weight is named")
    for name, quantized in packed.items():
        pack_at_(given, name, quantized)
    finish_packing_(given)
    return model


def _on_grid(weight: Tensor, encoding: Encoding) -> QuantizedTensor:
    """The codes of a weight that lies on the grid."""
    values = weight.detach().float()
    quantized = QuantizedTensor(encoding.quantize(values), encoding)
    ones = torch.ones_like(quantized.codes)
    step = encoding.dequantize(ones) - encoding.dequantize(torch.zeros_like(ones))
    distance = (values - quantized.dequantize()).abs() / step
    narrow = torch.finfo(weight.dtype).eps if weight.dtype != torch.float32 else 0.0
    off = distance > TOLERANCE + narrow * values.abs() / step
    if bool(off.any()):
        raise GridError(
            f"{int(off.sum()):,} of {off.numel():,} values lie off the grid, the farthest by "
            f"{float(distance[off].max()):.3g} steps. Use the grid that the weights were rounded "
            "to, or quantize_ to round them"
        )
    return quantized


def _from_codes(given: tuple[Tensor, ...], bitwidth: int | None, signed: bool) -> QuantizedTensor:
    if bitwidth is None:
        raise GridError("codes need their bitwidth: freeze_(..., bitwidth=4)")
    if len(given) not in (2, 3) or not all(isinstance(part, Tensor) for part in given):
        raise GridError("codes are given as tensors (codes, scale) or (codes, scale, offset)")
    integers, scale, *more = given
    if integers.is_floating_point():
        raise GridError(f"the codes are {integers.dtype}, not integers")
    half = 2 ** (bitwidth - 1)
    lowest = -half if signed else 0
    wide = integers.to(torch.int64) - lowest
    if wide.numel() and not 0 <= int(wide.min()) <= int(wide.max()) < 2 * half:
        raise GridError(
            f"codes run from {int(integers.min())} to {int(integers.max())}, but {bitwidth} bits "
            f"{'signed' if signed else 'unsigned'} hold {lowest} to {lowest + 2 * half - 1}"
        )
    rows, columns = integers.shape[0], integers.shape[-1]
    granularity: Granularity
    match tuple(scale.shape):
        case () | (1,) | (1, 1):
            granularity = PerTensor()
        case (n, blocks) if n == rows and blocks > 1 and columns % blocks == 0:
            granularity = PerBlock(columns // blocks)
        case (n,) | (n, 1) if n == rows:
            granularity = PerChannel()
        case _:
            raise GridError(
                f"a scale of shape {list(scale.shape)} fits no granularity of codes "
                f"{list(integers.shape)}: [] (per tensor), [{rows}] (per channel) or "
                f"[{rows}, {columns} / block size]"
            )
    shape = Scheme(8, granularity=granularity).scale_shape(tuple(integers.shape))
    offset = more[0].to(torch.int32) if more else torch.zeros_like(scale, dtype=torch.int32)
    offset = (offset + lowest).expand(scale.shape).reshape(shape)
    is_symmetric = bool((offset == -half).all())
    scheme = Scheme(bitwidth, is_symmetric, granularity)
    encoding = Encoding(scheme, scale.float().reshape(shape).contiguous(), offset.contiguous())
    return QuantizedTensor(wide.to(torch.uint8), encoding)
