"""Freeze a model's weights to integers, in place or from files to files.

    quantize_(model, "w4-block32")
        each layer on its own (rtn, search, sqnr)
    quantize_(model, "w4-block32", "gptq", calibration=token_ids)
        block by block, with inputs computed by the quantized blocks before
    quantize_checkpoint(checkpoint, tokenizer, folder, source, "w4-block32", ...)
        the same for a checkpoint that may be larger than memory

`layer_rules.py` says which layers, on which grid, by which solver. Works before or after PEFT has
wrapped the layers: only the innermost base layer is replaced.

A checkpoint larger than memory is read as it is needed. Without calibration, memory holds one
module as floats (a linear layer, an embedding, a layer's fused experts), what its solver needs, and
one shard. With calibration:

    loaded     tensors outside all blocks (embeddings, last norm, head): at the start
               a block: when the first batch arrives at it
    released   a block: written to disk when the last batch has arrived at the next block
               everything else: at the end

Memory holds the tensors outside the blocks, one block as floats (two while batches move to the next
block), its moments, the activations of a batch, one shard, and the hidden states of the batches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwlora.errors import GridError, SourceError, listed
from qwlora.formats.base_files import SHARD_BYTES, BaseWriter, replacing_base, save_as_base_
from qwlora.formats.checkpoint import Checkpoint, LazyModel, is_below, put_, tensor_at
from qwlora.grid.scheme import Scheme, parse_scheme, similar_schemes
from qwlora.nn import pack_at_, packed_weights, tensor_out_in, tie_weights_
from qwlora.nn.fingerprint import base_modules, remember_base_
from qwlora.nn.frozen import (
    assert_frozen,
    check_base_finite,
    packing,
    refuse_half_quantized,
    refuse_meta,
)
from qwlora.nn.packed_layer import unwrapped
from qwlora.quantize.bit_budget import BitBudget, budget_rules
from qwlora.quantize.layer_rules import LayerRule, plan_layers
from qwlora.quantize.quantize_blocks import batches_of, quantize_blocks_, tensors_by_block
from qwlora.quantize.quantize_tensor import LayerReport, solve_tensor, warn_of_second_rounding
from qwlora.quantize.solvers import SOLVERS
from qwlora.system.device import CPU
from qwlora.system.parameter_names import canonical_name, is_adapter_name
from qwlora.system.processes import gathered
from qwlora.system.progress import Track, untracked


@dataclass(frozen=True)
class BaseSize:
    """Size of the packed layers."""

    bytes: int  # size of codes, scales and offsets
    weights: int
    float_weights: int  # number of weights that stay float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclass(frozen=True, repr=False)
class QuantizeReport:
    """The size of the base, and the solver and error of each quantized tensor by canonical name."""

    size: BaseSize
    layers: dict[str, LayerReport] = field(default_factory=dict)
    budget_rules: tuple[LayerRule, ...] = ()  # the schemes that a `BitBudget` chose

    def __repr__(self) -> str:
        counts = Counter(f"{layer.scheme} by {layer.solver}" for layer in self.layers.values())
        grids = listed([f"{count} {how}" for how, count in counts.most_common()], 3)
        return (
            f"QuantizeReport of {len(self.layers)} tensors ({grids}): "
            f"{self.size.bits_per_weight:.2f} bits per weight, {self.size.bytes / 1e6:.1f} MB, and "
            f"{self.size.float_weights:,} float weights"
        )


def quantize_(
    model: nn.Module,
    scheme: Scheme | str,
    solver: str = "search",
    *,
    rules: Sequence[LayerRule] = (),
    settings: Mapping[str, Any] | None = None,
    calibration: Tensor | Iterable[Any] | None = None,
    work: Path | None = None,
    budget: BitBudget | None = None,
    track: Track = untracked,
) -> QuantizeReport:
    """Quantize the layers of `model` in place: W becomes `W_hat = (codes + offset) * scale`.

    Args:
        model: the float model, with or without PEFT's wrappers.
        scheme: the grid of every weight, or its short name (`w4-block32`, see `parse_scheme`).
        solver: `rtn`, `search`, `sqnr` or `gptq` (see `solvers.py`).
        rules: exceptions for some layers (see `layer_rules.py`).
        settings: settings of solvers, by name: `{"gptq": GptqSettings(sweeps=0)}`.
        calibration: token ids [sequences, tokens], or batches as a DataLoader gives them (dicts,
            tensors, tuples); needed by gptq.
        work: a folder for finished blocks; the same call resumes after the last finished block.
            Model state that the fingerprint does not cover (`nn/fingerprint.py`) must not change.
        budget: choose a scheme for each matrix product that `rules` do not name
            (`bit_budget.py`). The report has the rules that it chose.

    Returns:
        The size of the base, and the error of each quantized tensor.

    Raises:
        GridError: a scheme does not fit its layer (all such layers are named), a rule matches
            nothing, there is nothing to quantize, or a budget cannot be met.
        CalibrationError: a tensor of the model or an input holds nan or infinity, a layer saw no
            data, or a block cannot be differentiated.

    If it raises after packing the first layer, every later call refuses the model: load it again.
    """
    model = model_to_pack(model)
    with packing(model):
        layers, chosen = _pack_(
            model, None, scheme, solver, rules, settings, calibration, work, budget, track
        )
        finish_packing_(model)
    return QuantizeReport(base_size(model), layers, chosen)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path | None,
    source: str,
    scheme: Scheme | str | None,
    solver: str = "search",
    *,
    shard_bytes: int = SHARD_BYTES,
    device: torch.device = CPU,
    **options: Any,
) -> tuple[str, QuantizeReport]:
    """Write the base of `checkpoint` into `folder`, which must exist; returns its fingerprint and
    the report. Same result as `quantize_` and `save_base`; the module describes the memory use.

    Args:
        folder: None in a process that shares the work but does not write.
        scheme, options: as for `quantize_`. Without a scheme, the checkpoint's integers are kept.
        shard_bytes: size of a shard, which is held in memory.
        device: where blocks are solved. It then holds everything except the shard.
    """
    lazy = LazyModel(checkpoint, device)
    with nullcontext() if folder is None else replacing_base(Path(folder), shard_bytes) as writer:
        files = InFiles(lazy, writer)
        layers, chosen = _pack_(lazy.model, files, scheme, solver, **options)
        report = QuantizeReport(base_size(lazy.model), layers, chosen)
        return writer.finish(lazy.model, tokenizer, source) if writer else "", report


class InFiles:
    """A checkpoint whose modules are in memory until they are quantized and go to `writer`, if
    there is one."""

    def __init__(self, lazy: LazyModel, writer: BaseWriter | None):
        self.lazy, self.writer, self.model = lazy, writer, lazy.model

    def modules(self, plan: Collection[str], track: Track) -> Iterator[str]:
        modules: dict[str, list[str]] = {}
        for name in self.lazy.stored:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
        for path in track(list(modules), "quantizing", len(modules)):
            for name in modules[path]:
                self.lazy.load_(name)
                if name in plan:
                    self._check_float(name)
                    yield name
            self._write(path)
            # Shapes stay, packed or not, for the size of the base.
            for name in modules[path]:
                if (tensor := tensor_at(self.model, name)) is None:
                    self.model.get_submodule(path).to("meta")
                else:
                    put_(self.model, self.lazy.aliases[name], tensor.to("meta"))

    @contextmanager
    def blocks(self, blocks: Mapping[str, Sequence[str]], batches: int) -> Iterator[None]:
        arrivals = dict.fromkeys(blocks, 0)
        visited, released = list[str](), set[str]()

        def arrived(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            if path in released:
                raise GridError(
                    f"{path} runs again after a later block, so this model cannot be quantized "
                    "block by block from its files. Load the whole model."
                )
            if not arrivals[path]:
                visited.append(path)
                self.lazy.materialize_(path)
                for name in blocks[path]:
                    self._check_float(name)
                # On a device, the CPU reads the next block while this one is solved.
                if (following := dict(pairwise(blocks)).get(path)) is not None:
                    self.lazy.read_ahead(following)
            arrivals[path] += 1
            # The previous block is in use until the last batch has left it.
            if arrivals[path] == batches and len(visited) > 1:
                block = visited[-2]
                readers = (
                    {next((p for p in blocks if is_below(name, p)), None) for name in names}
                    for names in self.lazy.aliases.values()
                )
                # A tensor that is read both inside a block and elsewhere is kept to the end.
                if not any(block in paths and len(paths) > 1 for paths in readers):
                    released.add(block)
                    self._write(block)
                    self.model.get_submodule(block).to("meta")

        self.lazy.load_outside_(blocks)
        with ExitStack() as stack:
            for path in blocks:
                module = self.model.get_submodule(path)
                stack.enter_context(module.register_forward_pre_hook(partial(arrived, path)))
            yield
        tie_weights_(self.model)
        self._write()

    def _write(self, path: str = "") -> None:
        if self.writer is not None:
            self.writer.add(self.model.get_submodule(path), path)

    def _check_float(self, name: str) -> None:
        if tensor_at(self.model, name) is None:
            raise SourceError(
                f"{name} is already integers in the files. Omit the scheme to keep them, or start "
                "from a float checkpoint."
            )


def _pack_(
    model: nn.Module,
    files: InFiles | None,
    scheme: Scheme | str | None,
    solver: str,
    rules: Sequence[LayerRule] = (),
    settings: Mapping[str, Any] | None = None,
    calibration: Tensor | Iterable[Any] | None = None,
    work: Path | None = None,
    budget: BitBudget | None = None,
    track: Track = untracked,
) -> tuple[dict[str, LayerReport], tuple[LayerRule, ...]]:
    """Quantize and pack the layers of `model`, from `files` or in memory. Returns their reports and
    the rules that a budget chose."""
    reports, chosen = dict[str, LayerReport](), list[LayerRule]()
    plan = {} if scheme is None else plan_layers(model, scheme, solver, rules, settings)
    # Tensors that are still in files are checked when they are read.
    check_base_finite(model)
    if budget is not None and scheme is not None:
        usual = parse_scheme(scheme) if isinstance(scheme, str) else scheme
        wanted = replace(budget, schemes=budget.schemes or similar_schemes(usual))
        batches, blocks = batches_of(calibration, model), tensors_by_block(model, plan)
        # Choosing runs through the whole float model, whose blocks are released as they are passed,
        # so quantizing needs a second lazy model.
        floats = files and InFiles(LazyModel(files.lazy.checkpoint, files.lazy.device), None)
        with floats.blocks(blocks, len(batches)) if floats else nullcontext():
            unchanged = floats.model if floats else model
            chosen = budget_rules(unchanged, plan, rules, wanted, blocks, batches, track)
        # In one of several processes an expert may get no token, and the choices would differ.
        chosen = gathered(chosen)[0]
        plan = plan_layers(model, scheme, solver, [*rules, *chosen], settings)
    if any(SOLVERS[todo.solver].needs_calibration for todo in plan.values()):
        batches = batches_of(calibration, model)
        blocks = tensors_by_block(model, plan)
        with files.blocks(blocks, len(batches)) if files else nullcontext():
            reports = quantize_blocks_(model, plan, blocks, batches, work, track)
    else:
        in_memory = track(list(plan), "quantizing", len(plan))
        for name in files.modules(plan, track) if files else in_memory:
            quantized, report = solve_tensor(name, tensor_out_in(model, name), plan[name])
            pack_at_(model, name, quantized)
            reports[canonical_name(name)] = report
    warn_of_second_rounding(reports)
    return reports, tuple(chosen)


def model_to_pack(model: nn.Module) -> nn.Module:
    """The model itself, without wrappers, whose weights can be replaced by packed layers."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise GridError(
            "the model is wrapped in DistributedDataParallel, which refers to the float weights "
            "that quantization replaces. Quantize first, then wrap"
        )
    model = unwrapped(model)
    refuse_meta(model, GridError)
    refuse_half_quantized(model)
    return model


def finish_packing_(model: nn.Module) -> None:
    """Turn a model whose weights were packed into a base."""
    if isinstance(model, PreTrainedModel):
        tie_weights_(model)
        # transformers 5.24 still marks a model as quantized after it has dequantized a GGUF file.
        if getattr(model, "quantization_method", None) == "gguf":
            cast(Any, model).hf_quantizer.remove_quantization_config(model)
    save_as_base_(next(base_modules(model))[1])
    assert_frozen(model)
    remember_base_(model)


def base_size(model: nn.Module) -> BaseSize:
    """Bytes and count of all packed weights in `model`."""
    tensors = [layer.tensor for layer in packed_weights(model).values() if not layer.is_tied]
    return BaseSize(
        sum(tensor.nbytes for tensor in tensors),
        sum(math.prod(tensor.shape) for tensor in tensors),
        sum(p.numel() for name, p in model.named_parameters() if not is_adapter_name(name)),
    )
