"""Quantize a checkpoint to a base on disk without holding the model in memory.

For each module in the order of the files: read its tensors, solve and pack its weight if the rules
say so, write the result to the current shard, release the module. Peak memory is one module as
floats (a linear layer, an embedding, a layer's fused experts), what its solver needs, and one
shard. A solver that needs calibration holds a block of the model at a time, and what is outside all
blocks (`streamed_blocks.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwlora.errors import SourceError
from qwlora.formats.assemble_model import LazyModel
from qwlora.formats.base_files import SHARD_BYTES, BaseWriter
from qwlora.formats.checkpoint import Checkpoint
from qwlora.formats.meta_model import put_, tensor_at
from qwlora.grid.scheme import Scheme, parse_scheme
from qwlora.grid.second_moments import Moments
from qwlora.nn import pack_at_, tie_weights_
from qwlora.parameter_names import canonical_name
from qwlora.progress import Track, untracked
from qwlora.quantize.layer_rules import Assignment, Rule
from qwlora.quantize.quantize_blocks import batches_of, quantize_blocks_, tensors_by_block
from qwlora.quantize.quantize_model import QuantizeReport, base_size, plan_layers
from qwlora.quantize.quantize_tensor import (
    LayerReport,
    solve_tensor,
    tensor_out_in,
    warn_of_second_rounding,
)
from qwlora.quantize.solvers import SOLVERS
from qwlora.quantize.streamed_blocks import BlocksOnDemand


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """The fingerprint of the base that was written, and how each tensor was quantized."""

    fingerprint: str
    report: QuantizeReport


def quantize_checkpoint(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    source: str,
    scheme: Scheme | str | None,
    solver: str = "search",
    *,
    rules: Sequence[Rule] = (),
    calibration: Tensor | Iterable[Any] | None = None,
    moments: Moments | None = None,
    work: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    track: Track = untracked,
) -> QuantizedCheckpoint:
    """Write the base of `checkpoint` into `folder`, which must exist. Same result as `quantize_`
    and `save_base`.

    Args:
        scheme: as for `quantize_`. None keeps the integers that the checkpoint has, and quantizes
            nothing.
        calibration, moments, work, settings: as for `quantize_`.
        shard_bytes: size of a shard, which is also held in memory.

    Raises:
        GridError: as `quantize_`; or the model runs a block again after a later one.
        SourceError: a tensor cannot be read, or a layer to quantize is already integers.
        CalibrationError: a weight or an input holds nan or infinity, no data reached a layer, or a
            block cannot be differentiated.
    """
    lazy = LazyModel(checkpoint)
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    plan = {} if scheme is None else plan_layers(lazy.model, scheme, solver, rules, settings)
    writer = BaseWriter(Path(folder), shard_bytes)
    if moments is not None or any(SOLVERS[todo.solver].needs_calibration for todo in plan.values()):
        batches = batches_of(calibration, lazy.model)
        with BlocksOnDemand(lazy, writer, tensors_by_block(lazy.model, plan), len(batches)):
            layers = quantize_blocks_(lazy.model, plan, batches, moments, work, track)
    else:
        layers = _module_by_module(lazy, writer, plan, track)
    warn_of_second_rounding(layers)
    return QuantizedCheckpoint(
        writer.finish(lazy.model, tokenizer, source), QuantizeReport(base_size(lazy.model), layers)
    )


def _module_by_module(
    lazy: LazyModel, writer: BaseWriter, plan: Mapping[str, Assignment], track: Track
) -> dict[str, LayerReport]:
    reports = {}
    modules: dict[str, list[str]] = {}
    for name in lazy.stored:
        modules.setdefault(lazy.places[name][0][0], []).append(name)
    for path in track(list(modules), "quantizing", len(modules)):
        for name in modules[path]:
            lazy.load_(name)
            if name in plan:
                reports[canonical_name(name)] = _quantize_(lazy, name, plan[name])
        writer.add(lazy.model.get_submodule(path), path)
        for name in modules[path]:
            _drop_data_(lazy, name)
    return reports


def _quantize_(lazy: LazyModel, name: str, todo: Assignment) -> LayerReport:
    """Pack the tensor `name` everywhere it is read."""
    (path, key), *others = lazy.places[name]
    if key not in lazy.model.get_submodule(path)._parameters:
        raise SourceError(
            f"{name} is already integers in the files. Omit the scheme to keep them, or start from "
            "a float checkpoint."
        )
    quantized, report = solve_tensor(name, tensor_out_in(lazy.model, name), todo)
    pack_at_(lazy.model, name, quantized)
    if others:
        tie_weights_(lazy.model)
    return report


def _drop_data_(lazy: LazyModel, name: str) -> None:
    """Keep only the shapes of a tensor that was written, packed or not."""
    places = lazy.places[name]
    tensor = tensor_at(lazy.model, places[0])
    if tensor is None:
        lazy.model.get_submodule(places[0][0]).to("meta")
    else:
        put_(lazy.model, places, tensor.to("meta"))
