"""What `qwlora check` says about targets: which of them hold the grids of a recipe's base."""

from __future__ import annotations

from qwlora.errors import GridError
from qwlora.export.grid_table import Grid, problems, table_rows
from qwlora.export.registry import TARGETS
from qwlora.formats.model_source import fetch
from qwlora.recipe import Recipe


def target_table(recipe: Recipe) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows of the table, and notes on what is not a matter of the grid.

    With solver keep, the integers of the model's files are read.

    Raises:
        GridError: a target of the recipe cannot hold the integers that base.solver keep takes.
        SourceError: the model's files cannot be read.
    """
    source = fetch(recipe.model.source).path
    grids = kept_grids(recipe) if recipe.base.solver == "keep" else recipe.base.grids()
    keeping = [n for n, t in TARGETS.items() if recipe.base.solver == "keep" and t.keeps(source)]
    reasons = {
        name: target.source_problem(source) or "; ".join(problems(target, list(grids)))
        for name, target in TARGETS.items()
        if name not in keeping
    }
    if refused := [
        f"{n} cannot hold {reasons[n]}" for n in recipe.export.targets if reasons.get(n)
    ]:
        raise GridError(
            f"export.targets: {'; '.join(refused)}. Remove the target, or quantize the model anew"
        )
    rows = list(table_rows(grids, TARGETS, recipe.export.targets, keeping))
    notes = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    return rows, notes


def kept_grids(recipe: Recipe) -> dict[Grid, str]:
    """The grids of the integers in the model's files, and one tensor that has each."""
    from qwlora.formats.assemble_model import LazyModel
    from qwlora.formats.open_checkpoint import open_checkpoint
    from qwlora.grid.quantized_tensor import QuantizedTensor

    model = recipe.model
    lazy = LazyModel(
        open_checkpoint(
            fetch(model.source).path,
            model.encodings,
            keep_float=model.keep_float,
            block_order=model.block_order,
        )
    )
    embedding = lazy.model.get_input_embeddings()
    found: dict[Grid, str] = {}
    for name, stored in lazy.stored.items():
        tensor = lazy.checkpoint.read(stored)
        if isinstance(tensor, QuantizedTensor):
            path = name.rpartition(".")[0]
            of_embedding = lazy.model.get_submodule(path) is embedding
            found.setdefault(Grid(tensor.encoding.scheme, None, of_embedding), name)
    return found
