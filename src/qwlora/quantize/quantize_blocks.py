"""Quantize a model block by block. Each block's inputs are computed by the quantized blocks before
it.

A block is a member of an outermost `ModuleList` (a decoder block) with tensors to quantize, or a
layer outside all lists. For each block, in the order of the forward pass:

    1. run it as it is on every batch and collect each layer's second moments
    (`layer_statistics.py`)
    2. solve its layers
    3. pack them and run it again, to compute the inputs of the next block

Peak memory: the model, one block's moments ([in, in] per layer), the activations of one batch in
the block, and the hidden states of all batches.

An interrupted quantization resumes after the last finished block (`_BlockCache`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from qwlora.errors import CalibrationError, GridError, listed
from qwlora.formats.checkpoint import blocks_of
from qwlora.graph.call_arguments import arguments_of, as_arguments, check_token_ids
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.grid.second_moments import LayerMoments
from qwlora.nn import is_packed, pack_at_, tensor_out_in
from qwlora.nn.fingerprint import base_settings, base_tensors, settings_text, update_digest
from qwlora.nn.packed_tensor import PackedTensor, Parts
from qwlora.quantize.block_runner import Batches, BlockRunner
from qwlora.quantize.layer_rules import Assignment
from qwlora.quantize.layer_statistics import Observed, observe
from qwlora.quantize.quantize_tensor import LayerReport, solve_tensor
from qwlora.quantize.solvers import REVISIONS, SOLVERS
from qwlora.system import strict_json
from qwlora.system.atomic import read_tensors, write_tensors
from qwlora.system.device import CPU
from qwlora.system.parameter_names import canonical_name, is_adapter_name
from qwlora.system.processes import by_first, is_mine, share
from qwlora.system.progress import Track, untracked

QuantizedBlock = dict[str, tuple[QuantizedTensor, LayerReport]]


def quantize_blocks_(
    model: nn.Module,
    plan: Mapping[str, Assignment],
    blocks: Mapping[str, Sequence[str]],
    batches: Batches,
    work: Path | None,
    track: Track,
) -> dict[str, LayerReport]:
    """Quantize the tensors in `plan` (by their names in the model), which `tensors_by_block` has
    grouped into `blocks`; see `quantize_` for arguments and errors."""
    reports: dict[str, LayerReport] = {}
    cache = _BlockCache(work, model, blocks, batches)
    calibrated = {name for name in plan if SOLVERS[plan[name].solver].needs_calibration}

    def unreached(reached: Collection[str]) -> list[str]:
        names = [name for name in plan if canonical_name(name) not in reached]
        if failed := [n for n in names if n in calibrated or tensor_out_in(model, n).is_meta]:
            raise CalibrationError(
                f"No calibration data reached {listed(map(canonical_name, failed))}. Add a rule "
                "for these layers: solver: search, or keep: float."
            )
        return names

    def pack(block: QuantizedBlock, device: torch.device) -> None:
        for name, (quantized, report) in block.items():
            pack_at_(model, name, quantized.to(device))
            reports[canonical_name(name)] = report

    # One batch through the model shows which blocks no data reaches, before the first is packed. If
    # the model is in files, that would read the whole checkpoint twice.
    if not any(tensor_out_in(model, name).is_meta for name in plan):
        with BlockRunner(model, blocks, batches[:1]) as runner:
            unreached({canonical_name(name) for path in runner for name in blocks[path]})
    with BlockRunner(model, blocks, batches) as runner:
        for path in track(runner, "quantizing", len(blocks)):
            floats = {name: tensor_out_in(model, name) for name in blocks[path]}
            device = next(iter(floats.values())).device
            block = by_first(partial(cache.read, path, {name: plan[name] for name in floats}))
            # The first process solves for all, so that all have the same codes.
            if block is None:
                followed = [name for name in floats if name in calibrated]
                statistics = observe(model, path, followed, runner, outputs=False)
                block = by_first(partial(_solve, floats, plan, statistics))
                cache.write(block)
                del statistics
            del floats
            pack(block, device)
    for name in unreached(reports):
        weight = tensor_out_in(model, name)
        pack(by_first(partial(_solve, {name: weight}, plan, {})), weight.device)
    return reports


def _solve(
    floats: dict[str, Tensor], plan: Mapping[str, Assignment], statistics: dict[str, Observed]
) -> QuantizedBlock:
    block = QuantizedBlock()
    # Floats and moments leave their dicts one by one, so that each is freed when it is solved.
    for name in list(floats):
        inputs = statistics.pop(name).moment.input if name in statistics else None
        quantized, report = solve_tensor(name, floats.pop(name), plan[name], inputs)
        block[name] = quantized.to(CPU), report
    return block


def observe_moments(
    model: nn.Module, calibration: Tensor | Iterable[Any], *, track: Track = untracked
) -> Iterator[tuple[str, LayerMoments]]:
    """Observe the second moments that `initialize_` needs for `qera`, block by block.

    Args:
        model: the quantized base, without adapters.
        calibration: text of the adapter; see `quantize_`. 4,096 tokens suffice
            (docs/log/initialization.md).

    Returns:
        The canonical path and the second moments R [in, in] and G [out, out] of each packed linear
        layer. `dict` keeps them all in memory.

    Raises:
        GridError: no layer is packed, or the model has an adapter.
        CalibrationError: a block cannot be differentiated, or an input is not finite.
    """
    if any(is_adapter_name(name) for name, _ in model.named_parameters()):
        raise GridError(
            "the model has an adapter, which would change the second moments. Store them with "
            "dict(observe_moments(...)) before you attach it, or observe a copy of the base."
        )
    packed = [
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_packed(module)
    ]
    if not packed:
        raise GridError("no linear layer of the model is packed. Quantize it first.")
    blocks = tensors_by_block(model, packed)
    with BlockRunner(model, blocks, batches_of(calibration, model)) as runner:
        for path in track(runner, "observing the base on the adapter's text", len(blocks)):
            for name, layer in observe(model, path, blocks[path], runner).items():
                yield canonical_name(name).removesuffix(".weight"), layer.moment


def batches_of(calibration: Tensor | Iterable[Any] | None, model: nn.Module) -> Batches:
    """The batches of `calibration` (see `quantize_`) as keyword arguments of `model`. Each of
    several processes gets every n-th batch."""
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
    if len(batches) < (count := share()[1]):
        raise CalibrationError(
            f"{len(batches)} calibration sequences cannot be shared by {count} processes. Use more "
            "data, or fewer processes"
        )
    return [batch for number, batch in enumerate(batches) if is_mine(number)]


def tensors_by_block(model: nn.Module, tensors: Iterable[str]) -> dict[str, list[str]]:
    """The names in `tensors`, grouped by the path of their block."""
    paths, blocks = blocks_of(model), dict[str, list[str]]()
    for name in tensors:
        inside = (path for path in paths if name.startswith(f"{path}."))
        blocks.setdefault(next(inside, name.rpartition(".")[0]), []).append(name)
    return blocks


class _BlockCache:
    """Finished blocks on disk. Call `read` in model order, and `write` if a block is missing."""

    # The key of a block's file is a SHA-256 of everything that the result depends on. The digest
    # grows block by block, because a block's inputs depend on every block before it.

    def __init__(
        self,
        folder: Path | None,
        model: nn.Module,
        blocks: Collection[str],
        batches: Batches,
    ):
        self.folder, self.model = folder, model
        self._digest, self._file = hashlib.sha256(), Path()
        if folder is None:
            return
        revisions, settings = REVISIONS["layer_statistics"], settings_text(base_settings(model))
        update_digest(self._digest, [revisions, settings, *named_inputs(batches)])
        inside = tuple(f"{block}." for block in blocks)
        for name, (_, tensor) in base_tensors(model).items():
            # In a checkpoint larger than memory, tensors that were not read yet have no values.
            if not name.startswith(inside) and not tensor.is_meta:
                update_digest(self._digest, [name, tensor])

    def read(self, block: str, plan: Mapping[str, Assignment]) -> QuantizedBlock | None:
        """The cached result of `block`, assigned as in `plan`; None if it must be computed."""
        if self.folder is None:
            return None
        for name, (_, tensor) in base_tensors(self.model.get_submodule(block)).items():
            update_digest(self._digest, [name, tensor])
        for name, todo in plan.items():
            update_digest(self._digest, [name, todo, REVISIONS[todo.solver]])
        self._file = self.folder / f"{canonical_name(block)}.safetensors"
        if (stored := read_keyed(self._file, self._digest.hexdigest())) is None:
            return None
        tensors, metadata = stored
        result = {}
        for name, record in json.loads(metadata["layers"]).items():
            parts = Parts(*(tensors.get(f"{name}/{part}") for part in Parts._fields))  # type: ignore[arg-type]
            packed = PackedTensor(Scheme.from_json(record["scheme"]), record["count"], parts)
            result[name] = packed.quantized, LayerReport(**record["report"])
        return result

    def write(self, block: QuantizedBlock) -> None:
        """Store the result of the block that was read last."""
        if self.folder is None:
            return
        tensors, records = dict[str, Tensor](), {}
        for name, (quantized, report) in block.items():
            packed = PackedTensor.from_quantized(quantized)
            parts = packed.parts._asdict().items()
            tensors |= {f"{name}/{key}": part for key, part in parts if part is not None}
            scheme = packed.scheme.to_json()
            records[name] = {"scheme": scheme, "count": packed.count, "report": asdict(report)}
        metadata = {"layers": strict_json.dumps(records), "key": self._digest.hexdigest()}
        write_tensors(self._file, tensors, metadata)


def read_keyed(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file whose metadata has this `key`; None if the file is missing or
    damaged, or has another key."""
    try:
        tensors, metadata = read_tensors(file)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return (tensors, metadata) if metadata.get("key") == key else None


def named_inputs(batches: Batches) -> Iterator[Any]:
    """The inputs of each batch, each after its name."""
    for batch in batches:
        for path, value in tree_flatten_with_path(dict(batch))[0]:
            yield from (keystr(path), value)
