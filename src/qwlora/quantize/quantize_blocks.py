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

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qwlora.errors import CalibrationError, GridError
from qwlora.formats.meta_model import blocks_of
from qwlora.graph.call_arguments import as_arguments, check_token_ids
from qwlora.grid.second_moments import Moments
from qwlora.messages import listed
from qwlora.nn import is_packed, pack_at_
from qwlora.parameter_names import canonical_name
from qwlora.progress import Track, untracked
from qwlora.quantize.block_cache import BlockCache, QuantizedBlock
from qwlora.quantize.block_runner import BlockRunner
from qwlora.quantize.layer_rules import Assignment
from qwlora.quantize.layer_statistics import Observed, observe
from qwlora.quantize.quantize_tensor import LayerReport, solve_tensor, tensor_out_in
from qwlora.quantize.solvers import SOLVERS


def quantize_blocks_(
    model: nn.Module,
    plan: Mapping[str, Assignment],
    batches: Sequence[Mapping[str, Any]],
    moments: Moments | None,
    work: Path | None,
    track: Track,
) -> dict[str, LayerReport]:
    """Quantize the tensors in `plan` (by their names in the model); see `quantize_` for arguments
    and errors.
    """
    blocks = tensors_by_block(model, plan)
    reports: dict[str, LayerReport] = {}
    cache = BlockCache(work, batches, moments)
    with _runner(model, list(blocks), batches) as runner:
        for _ in track(range(len(blocks)), "quantizing", len(blocks)):
            block = runner.advance()
            if block is None:
                break
            names = blocks[block]
            cache.begin(block, {name: tensor_out_in(model, name) for name in names}, plan)
            result = cache.read()
            if result is None:
                observed = [
                    name
                    for name in names
                    if moments is not None or SOLVERS[plan[name].solver].needs_calibration
                ]
                statistics = observe(model, block, observed, runner, moments is not None)
                result = _solve_block(model, names, plan, statistics, moments)
                cache.write(*result)
            quantized, block_reports = result
            for name in names:
                pack_at_(model, name, quantized[name])
            reports.update({canonical_name(n): r for n, r in block_reports.items()})
        else:
            runner.advance()
    if missed := [canonical_name(n) for n in plan if canonical_name(n) not in reports]:
        raise CalibrationError(
            f"No calibration data reached {listed(missed)}. Add a rule for these layers: solver: "
            "search, or keep: float."
        )
    return reports


def observe_moments(
    model: nn.Module,
    calibration: Tensor | Iterable[Any],
    moments: Moments | None = None,
    *,
    track: Track = untracked,
) -> Moments:
    """Second moments of the packed linear layers of a quantized model, for adapter initializations
    that need them when the base was quantized elsewhere.

    Args:
        calibration: token ids [sequences, tokens], or batches as a DataLoader gives them (dicts,
            tensors, tuples).
        moments: where they are stored. Default: in memory.

    Raises:
        GridError: no linear layer is packed.
        CalibrationError: an input holds nan or infinity, or a part cannot be differentiated.
    """
    moments = moments if moments is not None else Moments()
    packed = [
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_packed(module)
    ]
    if not packed:
        raise GridError("no linear layer of the model is packed. Quantize it first.")
    blocks = tensors_by_block(model, packed)
    with _runner(model, list(blocks), batches_of(calibration, model)) as runner:
        for _ in track(range(len(blocks)), "observing", len(blocks)):
            block = runner.advance()
            if block is None:
                break
            for name, observed in observe(model, block, blocks[block], runner).items():
                moments.put(canonical_name(name).removesuffix(".weight"), observed.moment)
        else:
            runner.advance()
    return moments


def batches_of(
    calibration: Tensor | Iterable[Any] | None, model: nn.Module
) -> Sequence[Mapping[str, Any]]:
    """The keyword arguments of `model`, batch by batch.

    Args:
        calibration: token ids [sequences, tokens], or batches as a DataLoader gives them; see
            `call_arguments.py`.

    Raises:
        GridError: `calibration` is None.
        CalibrationError: there is no batch, or see `check_token_ids`.
        CaptureError: see `as_arguments`.
    """
    if calibration is None:
        raise GridError(
            "solver gptq and moments need calibration data: token ids, or batches of the model's "
            "inputs"
        )
    names = list(arguments_of(model))
    batches = (
        [{"input_ids": row.unsqueeze(0)} for row in calibration]
        if isinstance(calibration, Tensor)
        else [as_arguments(batch, names) for batch in calibration]
    )
    if not batches:
        raise CalibrationError("calibration needs at least one sequence, but got none")
    for batch in batches:
        check_token_ids(batch, model, CalibrationError)
    return batches


def tensors_by_block(model: nn.Module, tensors: Iterable[str]) -> dict[str, list[str]]:
    """The names in `tensors`, grouped by the path of their block."""
    paths = blocks_of(model)
    found: dict[str, list[str]] = {}
    for name in tensors:
        inside = (path for path in paths if name.startswith(f"{path}."))
        found.setdefault(next(inside, name.rpartition(".")[0]), []).append(name)
    return found


def _runner(
    model: nn.Module, blocks: Sequence[str], batches: Sequence[Mapping[str, Any]]
) -> BlockRunner:
    options = {"use_cache": False} if "use_cache" in arguments_of(model) else {}
    return BlockRunner(model, blocks, [{**batch, **options} for batch in batches])


def arguments_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a model's forward, in order, through PEFT's wrapper."""
    inner = getattr(model, "get_base_model", lambda: model)()
    return tuple(inspect.signature(inner.forward).parameters)


def _solve_block(
    model: nn.Module,
    names: Sequence[str],
    plan: Mapping[str, Assignment],
    statistics: dict[str, Observed],
    moments: Moments | None,
) -> QuantizedBlock:
    """Codes and report of each tensor. Moves the second moments from `statistics` to `moments`."""
    quantized, reports = {}, {}
    for name in names:
        moment = statistics.pop(name).moment if name in statistics else None
        quantized[name], reports[name] = solve_tensor(
            name, tensor_out_in(model, name), plan[name], None if moment is None else moment.input
        )
        if moments is not None and moment is not None:
            moments.put(canonical_name(name).removesuffix(".weight"), moment)
    return quantized, reports
