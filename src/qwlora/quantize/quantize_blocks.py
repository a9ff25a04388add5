"""Quantize a model part by part, each on the inputs that the already quantized parts before it
make.

A part is a member of an outermost `ModuleList` (a decoder block) that holds tensors to quantize, or
a layer outside all lists. For each part, in the order of the forward pass: the part runs as it is
on every batch while second moments of each layer are collected (`observe.py`); its layers are
solved and packed; then it runs again, packed, to make the input of the next. Peak memory is the
model, one part's moments ([in, in] a layer, and [out, out] where those are asked for) and the
activations of one batch in it, and the hidden states of the batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qwlora.errors import CalibrationError, GridError
from qwlora.formats.meta_model import blocks_of
from qwlora.graph.call_arguments import as_arguments
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
    done: dict[str, LayerReport] = {}
    finished = BlockCache(work, batches, moments)
    with _runner(model, list(blocks), batches) as runner:
        for _ in track(range(len(blocks)), "quantizing", len(blocks)):
            part = runner.advance()
            if part is None:
                break
            finished.begin(part, {name: tensor_out_in(model, name) for name in blocks[block]}, plan)
            kept = finished.read()
            if kept is None:
                follow = [
                    name
                    for name in blocks[block]
                    if moments is not None or SOLVERS[plan[name].solver].needs_calibration
                ]
                kept = _solve_block(
                    model,
                    blocks[block],
                    plan,
                    observe(model, part, follow, runner, moments is not None),
                    moments,
                )
                finished.write(*kept)
            quantized, reports = kept
            for name in blocks[block]:
                pack_at_(model, name, quantized[name])
            done.update({canonical_name(n): r for n, r in reports.items()})
        else:
            runner.advance()
    if missed := [canonical_name(n) for n in plan if canonical_name(n) not in done]:
        raise CalibrationError(
            f"layers that no calibration batch reaches: {listed(missed)}; give them solver rtn or "
            "search, or keep them float, by a rule"
        )
    return done


def observe_moments(
    model: nn.Module,
    calibration: Tensor | Iterable[Any],
    moments: Moments | None = None,
    *,
    track: Track = untracked,
) -> Moments:
    """The moments (`grid/moment.py`) of a quantized model's packed linear layers: what starts that
    follow the data need, where a base was made elsewhere.

    Args:
        calibration: token ids [sequences, tokens], or batches as a DataLoader gives them (dicts,
            tensors, tuples).
        moments: where they go; into memory unless given.

    Raises:
        GridError: no linear layer is packed.
        CalibrationError: an input holds nan or infinity, or a part cannot be differentiated.
    """
    moments = moments if moments is not None else Moments()
    blocks = tensors_by_block(
        model,
        {
            f"{path}.weight": None
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and is_packed(module)
        },
    )
    if not parts:
        raise GridError(
            "no linear layer of the model is packed, so there is nothing to observe; quantize it "
            "first"
        )
    with _runner(model, list(blocks), batches_of(calibration, model)) as runner:
        for _ in track(range(len(blocks)), "observing", len(blocks)):
            part = runner.advance()
            if part is None:
                break
            for name, observed in observe(model, part, blocks[block], runner).items():
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
        GridError: there are none.
        CaptureError: see `as_arguments`.
    """
    if calibration is None:
        raise GridError(
            "solver gptq and moments need calibration data: token ids, or batches of the model's "
            "inputs"
        )
    if isinstance(calibration, Tensor):
        return [{"input_ids": row.unsqueeze(0)} for row in calibration]
    names = list(arguments_of(model))
    return [as_arguments(batch, names) for batch in calibration]


def tensors_by_block(model: nn.Module, tensors: Mapping[str, object]) -> dict[str, list[str]]:
    """The tensors of each part, by path of the part."""
    blocks = blocks_of(model)
    parts: dict[str, list[str]] = {}
    for layer in tensors:
        part = next(
            (block for block in blocks if layer.startswith(f"{block}.")), layer.rpartition(".")[0]
        )
        parts.setdefault(part, []).append(layer)
    return parts


def _runner(
    model: nn.Module, parts: Sequence[str], batches: Sequence[Mapping[str, Any]]
) -> BlockRunner:
    keep = {"use_cache": False} if "use_cache" in arguments_of(model) else {}
    return BlockRunner(model, parts, [{**batch, **keep} for batch in batches])


def arguments_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a model's forward, in order, through PEFT's wrapper."""
    inner = getattr(model, "get_base_model", lambda: model)()
    return tuple(inspect.signature(inner.forward).parameters)


def _solve_block(
    model: nn.Module,
    tensors: Sequence[str],
    plan: Mapping[str, Assignment],
    seen: dict[str, Observed],
    moments: Moments | None,
) -> QuantizedBlock:
    """Codes and report of each tensor; R and G go to `moments`, and out of `seen`."""
    quantized, reports = {}, {}
    for name in tensors:
        moment = seen.pop(name).moment if name in seen else None
        quantized[name], reports[name] = solve_tensor(
            name, tensor_out_in(model, name), plan[name], None if moment is None else moment.input
        )
        if moments is not None and moment is not None:
            moments.put(canonical_name(name).removesuffix(".weight"), moment)
    return quantized, reports
