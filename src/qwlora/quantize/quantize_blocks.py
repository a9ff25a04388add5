"""Quantize a model block by block, each on the inputs that the already quantized blocks before it
give.

A block is a member of an outermost `ModuleList` (a decoder block) with tensors to quantize, or a
layer outside all lists. For each block, in the order of the forward pass:

    1. run it as it is on every batch and collect each layer's second moments
    (`layer_statistics.py`)
    2. solve and pack its layers
    3. run it again, packed, to compute the inputs of the next block

Peak memory: the model, one block's moments ([in, in] per layer, and [out, out] if requested), the
activations of one batch in the block, and the hidden states of all batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qwlora.errors import CalibrationError, GridError, listed
from qwlora.formats.meta_model import blocks_of
from qwlora.graph.call_arguments import as_arguments, check_token_ids
from qwlora.grid.second_moments import MomentStore
from qwlora.nn import is_packed, pack_at_, tensor_out_in
from qwlora.quantize.block_cache import BlockCache
from qwlora.quantize.block_runner import BlockRunner, arguments_of
from qwlora.quantize.layer_rules import Assignment
from qwlora.quantize.layer_statistics import observe
from qwlora.quantize.quantize_tensor import LayerReport, solve_tensor
from qwlora.quantize.solvers import SOLVERS
from qwlora.system.parameter_names import canonical_name
from qwlora.system.progress import Track, untracked


def quantize_blocks_(
    model: nn.Module,
    plan: Mapping[str, Assignment],
    blocks: Mapping[str, Sequence[str]],
    batches: Sequence[Mapping[str, Any]],
    moments: MomentStore | None,
    work: Path | None,
    track: Track,
) -> dict[str, LayerReport]:
    """Quantize the tensors in `plan` (by their names in the model); see `quantize_` for arguments
    and errors.

    Args:
        blocks: names of these tensors by block, see `tensors_by_block`.
    """
    reports: dict[str, LayerReport] = {}
    cache = BlockCache(work, batches, moments)
    with BlockRunner(model, blocks, batches) as runner:
        for path in track(runner, "quantizing", len(blocks)):
            floats = {name: tensor_out_in(model, name) for name in blocks[path]}
            cache.begin(path, floats, plan)
            block = cache.read()
            if block is None:
                followed = [
                    name
                    for name in floats
                    if moments is not None or SOLVERS[plan[name].solver].needs_calibration
                ]
                statistics, block = observe(model, path, followed, runner, moments is not None), {}
                for name in list(floats):
                    moment = statistics.pop(name).moment if name in statistics else None
                    second = None if moment is None else moment.input
                    block[name] = solve_tensor(name, floats.pop(name), plan[name], second)
                    if moments is not None and moment is not None:
                        moments[canonical_name(name).removesuffix(".weight")] = moment
                cache.write(block)
            del floats
            for name, (quantized, report) in block.items():
                pack_at_(model, name, quantized)
                reports[canonical_name(name)] = report
    if missed := [canonical_name(n) for n in plan if canonical_name(n) not in reports]:
        raise CalibrationError(
            f"No calibration data reached {listed(missed)}. Add a rule for these layers: solver: "
            "search, or keep: float."
        )
    return reports


def observe_moments(
    model: nn.Module,
    calibration: Tensor | Iterable[Any],
    moments: MomentStore | None = None,
    *,
    track: Track = untracked,
) -> MomentStore:
    """Second moments of the packed linear layers of a quantized model, for adapter initializations
    that need them when the base was quantized elsewhere. See `quantize_` for `calibration`.

    Args:
        moments: where they are stored. Default: in memory.
    """
    moments = moments if moments is not None else MomentStore()
    packed = [
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_packed(module)
    ]
    if not packed:
        raise GridError("no linear layer of the model is packed. Quantize it first.")
    blocks = tensors_by_block(model, packed)
    with BlockRunner(model, blocks, batches_of(calibration, model)) as runner:
        for path in track(runner, "observing", len(blocks)):
            for name, observed in observe(model, path, blocks[path], runner).items():
                moments[canonical_name(name).removesuffix(".weight")] = observed.moment
    return moments


def batches_of(
    calibration: Tensor | Iterable[Any] | None, model: nn.Module
) -> Sequence[Mapping[str, Any]]:
    """The keyword arguments of `model`, batch by batch, of the `calibration` of `quantize_`."""
    if calibration is None:
        raise GridError(
            "solver gptq and moments need calibration data: token ids, or batches of the model's "
            "inputs"
        )
    names = arguments_of(model)
    if isinstance(calibration, Tensor):
        calibration = [{"input_ids": row.unsqueeze(0)} for row in calibration]
    batches = [as_arguments(batch, names) for batch in calibration]
    if not batches:
        raise CalibrationError("calibration needs at least one sequence, but got none")
    for batch in batches:
        check_token_ids(batch, model, CalibrationError)
    return batches


def tensors_by_block(model: nn.Module, tensors: Iterable[str]) -> dict[str, list[str]]:
    """The names in `tensors`, grouped by the path of their block."""
    paths, blocks = blocks_of(model), dict[str, list[str]]()
    for name in tensors:
        inside = (path for path in paths if name.startswith(f"{path}."))
        blocks.setdefault(next(inside, name.rpartition(".")[0]), []).append(name)
    return blocks
