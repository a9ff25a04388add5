"""Freeze a model on an existing grid, from weights that lie on the grid or from integers.

    freeze_(model, "model.encodings")                                    an AIMET file
    freeze_(model, {"model.layers.0.mlp.up_proj.weight": encoding, ...})
    freeze_(model, {"model.layers.0.mlp.up_proj.weight": QuantizedTensor(codes, encoding), ...})

Unlike `quantize_`, which chooses a grid, this rounds nothing: a weight that is off its grid is
refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qwlora.errors import GridError, QwloraWarning, lines, listed, suggestion
from qwlora.formats.aimet import matched_encodings
from qwlora.formats.aimet_encodings.model import BlockOrder
from qwlora.grid.encoding import Encoding, QuantizedTensor
from qwlora.nn import pack_at_, tensor_out_in
from qwlora.nn.frozen import packing
from qwlora.nn.packed_tensor import PackedTensor
from qwlora.quantize.layer_rules import find_tensors
from qwlora.quantize.quantize_model import finish_packing_, model_to_pack

# Largest distance from the grid, in steps, that counts as rounding of the weight's computation.
TOLERANCE = 0.01


def freeze_(
    model: nn.Module,
    grids: Mapping[str, Encoding | QuantizedTensor] | str | Path,
    *,
    keep_float: Sequence[str] = (),
    block_order: BlockOrder | None = None,
    prefix: str | None = None,
) -> nn.Module:
    """Replace weights by packed layers on a given grid, in place; returns `model`.

        from an encoding    codes = round(W / scale) - offset, if |W - W_hat| <= 0.01 scale
        from integers       W_hat = (codes + offset) scale

    Weights in float16 or bfloat16 may be off the grid by the rounding of their type.

    Args:
        model: the float model.
        grids: an AIMET encodings file, or a dict from weight names to encodings or integers, in the
            layout [out, in] of a Linear layer.
        keep_float, block_order, prefix: for an encodings file; see `open_checkpoint`.

    Raises:
        EncodingsFileError: the file cannot be read, or does not fit the model.
        GridError: a name is not a weight that can be packed, a weight is off its grid (the message
            has the distance in steps), or integers do not fit it: the model is unchanged. Or a
            packed layer would not compute its codes (see `assert_frozen`): load the model again.

    Warns:
        QwloraWarning: an encodings file has entries for parameters that the model does not have, or
            that cannot be packed.
    """
    inner = model_to_pack(model)
    known = find_tensors(inner)
    if isinstance(grids, str | Path):
        encodings = matched_encodings(inner, grids, keep_float, block_order, prefix)
        # A vector's values already lie on its grid, and it has no packed layer.
        encodings = {n: grid for n, grid in encodings.items() if inner.get_parameter(n).ndim > 1}
        if others := sorted(encodings.keys() - known):
            warnings.warn(
                f"{grids}: {len(others)} entries belong to parameters without a packed layer and "
                f"are ignored: {listed(others, 10)}",
                QwloraWarning,
                stacklevel=2,
            )
        grids = {name: grid for name, grid in encodings.items() if name in known}
    packed, problems = dict[str, QuantizedTensor](), list[str]()
    for name, grid in grids.items():
        if name not in known:
            problems.append(f"{name}: no weight that can be packed{suggestion(name, list(known))}")
            continue
        weight = tensor_out_in(inner, name)
        try:
            packed[name] = _on_grid(weight, grid) if isinstance(grid, Encoding) else grid
            # Refuses what a packed layer cannot hold, before any layer is replaced.
            PackedTensor.from_quantized(packed[name])
        except GridError as error:
            problems.append(f"{name}: {error}")
        else:
            shapes = [list(tensor.shape) for tensor in (packed[name].codes, weight)]
            if shapes[0] != shapes[1]:
                problems.append(
                    f"{name}: the codes have shape {shapes[0]}, the weight is {shapes[1]} [out, in]"
                )
    if problems:
        shown = "\n  ".join(lines(problems))
        raise GridError(f"{len(problems)} weights cannot be frozen:\n  {shown}")
    if not packed:
        raise GridError("there is nothing to freeze: no weight is named")
    with packing(inner):
        for name, quantized in packed.items():
            pack_at_(inner, name, quantized)
        finish_packing_(inner)
    return model


def _on_grid(weight: Tensor, encoding: Encoding) -> QuantizedTensor:
    values = weight.detach().float()
    quantized = QuantizedTensor(encoding.quantize(values), encoding)
    ones = torch.ones_like(quantized.codes)
    # The step at each weight, whatever the granularity. Signed blocks have negative ones.
    step = (encoding.dequantize(ones) - encoding.dequantize(torch.zeros_like(ones))).abs()
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
