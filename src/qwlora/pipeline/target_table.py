"""What `qwlora check`, `plan` and `run` say about a recipe's model and targets before anything is
quantized: which targets hold the grids of the base, and whether its integers are rounded again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.errors import GridError, SourceError
from qwlora.formats.model_source import fetch
from qwlora.grid.scheme import Scheme
from qwlora.recipe import Recipe
from qwlora.recipe.grid_sections import Model
from qwlora.targets.npu.htp_limits import weight_problem
from qwlora.targets.registry import TARGETS, vllm_problem
from qwlora.targets.target_compatibility import Grid, is_copied, refusals, table_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qwlora.formats.checkpoint import Checkpoint

_PROBED = 8  # tensors of a float checkpoint that are tested for a grid: one layer is enough to tell


def target_table(recipe: Recipe) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows of the table, and notes on what is not a matter of the grid.

    With solver keep, the integers of the model's files are read.

    Raises:
        GridError: a target cannot hold the grids, or not the integers that base.solver keep takes.
        SourceError: base.solver does not fit the model.
    """
    model, location = recipe.model, fetch(recipe.model.source)
    keeps = recipe.base.solver == "keep"
    if keeps and location.holds_floats and not location.gguf_file and not model.encodings:
        raise SourceError(
            f"base.solver keep: model {model.source!r} has no integers to keep; use another "
            "solver, or set model.encodings"
        )
    if not keeps and not location.holds_floats:
        raise SourceError(
            f"model {model.source!r} is already quantized; use base.solver: keep to take its "
            "integers unchanged"
        )
    if recipe.reference is not None and not location.holds_floats:
        raise SourceError(
            f"reference: float trains adapters on the float model, but {model.source!r} holds "
            "integers only. Remove reference, or set model.source to the float model"
        )
    grids = recipe.base.grids()
    if keeps:
        for name, grid in kept_layers(recipe)[1].items():
            grids.setdefault(grid, name)
    source = location.path
    refused = {n: "; ".join(refusals(t, grids, source, keeps)) for n, t in TARGETS.items()}
    if asked := [name for name in recipe.export.targets if refused[name]]:
        raise GridError(
            f"export.targets: {'; '.join(f'{name} cannot hold {refused[name]}' for name in asked)}"
            ". Remove the target, or quantize the model again"
        )
    copying = [name for name, target in TARGETS.items() if is_copied(target, source, keeps)]
    rows = list(table_rows(grids, TARGETS, recipe.export.targets, copying))
    notes = [f"{name}: {reason}" for name, reason in refused.items() if reason]
    linear = {grid.scheme for grid in grids if not grid.of_embedding}
    if not refused["hf"] and (problem := vllm_problem(linear)):
        notes.append(f"hf: vLLM does not compute this base: {problem}")
    notes += [f"warning: {note}" for note in htp_notes(recipe, linear)]
    if "gguf" in recipe.export.targets and "gguf" not in copying:
        notes.append("gguf: `qwlora run` checks architecture and tokenizer before it quantizes")
    return rows, notes


def htp_notes(recipe: Recipe, schemes: Collection[Scheme]) -> list[str]:
    """Which of these schemes of weights the HTP does not compute, if files for it are written."""
    names = ", ".join(name for name in recipe.export.targets if TARGETS[name].is_for_htp)
    bits = recipe.simulation.activation_bitwidth
    problems = filter(None, (weight_problem(s, bits) for s in schemes if names))
    return [f"{names}: {problem}" for problem in sorted(problems)]


def second_rounding(recipe: Recipe) -> str | None:
    """A warning if the model's weights are integers, or were, and the recipe rounds them again."""
    solver, location = recipe.base.solver, fetch(recipe.model.source)
    if solver == "keep" or not location.holds_floats:
        return None
    if location.gguf_file:
        from qwlora.formats.gguf.gguf_checkpoint import FLOATS
        from qwlora.formats.gguf.gguf_file import GgufFile

        kinds = {tensor.kind for tensor in GgufFile(location.path).tensors.values()}
        if not (integers := sorted(kinds - FLOATS.keys())):
            return None
        problem, remedy = f"holds integers ({', '.join(integers)})", "set base.solver: keep"
    elif _lies_on_grid(recipe, location.path):
        problem = "holds weights that were rounded to integers before"
        remedy = "set model.encodings to their encodings, and base.solver: keep"
    else:
        return None
    return (
        f"{recipe.model.source} {problem}; base.solver: {solver} rounds them a second time, to "
        f"another grid. To keep them, {remedy}"
    )


def _lies_on_grid(recipe: Recipe, folder: Path) -> bool:
    from qwlora.formats.checkpoint import LazyModel
    from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
    from qwlora.quantize.layer_rules import plan_layers
    from qwlora.quantize.quantize_tensor import is_on_grid

    if recipe.model.trust_remote_code:
        return False
    try:
        lazy = LazyModel(FolderCheckpoint(folder))
    except SourceError:  # pickles: only loading the whole model would tell
        return False
    base = recipe.base
    plan = plan_layers(lazy.model, base.weights.scheme(), base.solver, base.layer_rules())
    names = list(plan)[:: max(1, len(plan) // _PROBED)]
    tensors: dict[str, Any] = {name: lazy.checkpoint.read(lazy.stored[name]) for name in names}
    return any(is_on_grid(t, plan[name].scheme.bitwidth) for name, t in tensors.items())


def model_files(model: Model) -> Checkpoint:
    """The model's files, with integer weights where the files hold integers."""
    from qwlora.formats.open_checkpoint import open_checkpoint

    path, keep_float = fetch(model.source).path, model.keep_float
    return open_checkpoint(
        path,
        model.encodings,
        keep_float=keep_float,
        block_order=model.block_order,
        prefix=model.prefix,
    )


def kept_layers(recipe: Recipe) -> tuple[PreTrainedModel, dict[str, Grid]]:
    """The model without weights, and the grid of each tensor that its files hold as integers, by
    name. Reads all of them."""
    from qwlora.formats.checkpoint import LazyModel
    from qwlora.grid.encoding import QuantizedTensor

    lazy = LazyModel(model_files(recipe.model))
    embedding, grids = lazy.model.get_input_embeddings(), dict[str, Grid]()
    for name, stored in lazy.stored.items():
        tensor = lazy.checkpoint.read(stored)
        if isinstance(tensor, QuantizedTensor):
            of_embedding = lazy.model.get_submodule(name.rpartition(".")[0]) is embedding
            solver = None if tensor.encoding.fits_float16 else "keep"
            grids[name] = Grid(tensor.encoding.scheme, solver, of_embedding)
    return lazy.model, grids
