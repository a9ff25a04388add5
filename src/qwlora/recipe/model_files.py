"""What a recipe and the files of its model say together. Imports torch where files are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from qwlora.errors import SourceError
from qwlora.formats.model_source import fetch, source_path
from qwlora.recipe.grid_sections import Model
from qwlora.recipe.whole_recipe import Graphs, Recipe
from qwlora.targets.refusals import Subject, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qwlora.formats.checkpoint import Checkpoint

_PROBED = 8  # tensors of a float checkpoint that are tested for a grid: one layer is enough to tell


def check_source(recipe: Recipe) -> None:
    """Check that base.solver and reference fit the model."""
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


def exported_base(recipe: Recipe, packed: Mapping[str, Weight] | None = None) -> Subject:
    """The base and where it comes from. `packed` is what is packed, by name; by default, what the
    recipe asks for, or one tensor for each grid in the model's files."""
    keeps, weights = recipe.base.solver == "keep", {**recipe.base.grids(), **(packed or {})}
    if keeps and packed is None:
        first = {weight: name for name, weight in reversed(kept_weights(recipe)[1].items())}
        weights = {name: weight for weight, name in reversed(first.items())}
    graphs = recipe.export.graphs or Graphs()
    return Subject(
        weights=weights,
        source=source_path(recipe.model.source),
        keeps=keeps,
        input_bits=recipe.simulation.activation_bitwidth,
        layout=recipe.export.layout,
        graphs=[*product(graphs.tokens, graphs.context)],
        takes_tokens=recipe.simulation.inputs == "tokens",
    )


def with_model(recipe: Recipe, subject: Subject) -> Subject:
    """The same with the model, without weights, and its tokenizer, if an export layout asks."""
    from qwlora.formats.checkpoint import empty_model
    from qwlora.formats.model_source import load_config, load_tokenizer

    if recipe.export.layout is None:
        return subject
    source = recipe.model.source, recipe.model.trust_remote_code
    model = empty_model(load_config(*source), recipe.model.trust_remote_code)
    return replace(subject, model=model, tokenizer=load_tokenizer(*source))


def kept_weights(recipe: Recipe) -> tuple[PreTrainedModel, dict[str, Weight]]:
    """The model without weights, and each tensor that its files hold as integers, by name."""
    from qwlora.formats.checkpoint import LazyModel
    from qwlora.grid.encoding import QuantizedTensor
    from qwlora.targets.weights.weights_folder import kind_of

    lazy, weights = LazyModel(model_files(recipe.model)), dict[str, Weight]()
    for name, stored in lazy.stored.items():
        tensor = lazy.checkpoint.read(stored)
        if isinstance(tensor, QuantizedTensor):
            solver = None if tensor.encoding.fits_float16 else "keep"
            weights[name] = Weight(tensor.encoding.scheme, solver, kind_of(lazy.model, name))
    return lazy.model, weights


def model_files(model: Model) -> Checkpoint:
    """The model's files, with integer weights where the files hold integers."""
    from qwlora.formats.open_checkpoint import open_checkpoint

    keys = model.model_dump(include={"encodings", "keep_float", "block_order", "prefix"})
    return open_checkpoint(fetch(model.source).path, **keys)


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
    elif _lies_on_grid(recipe):
        problem = "holds weights that were rounded to integers before"
        remedy = "set base.solver: keep, and set model.source to the original GGUF file, or "
        remedy += "model.encodings to their encodings"
    else:
        return None
    return (
        f"{recipe.model.source} {problem}; base.solver: {solver} rounds its weights a second time, "
        f"to another grid. To avoid that, {remedy}"
    )


def _lies_on_grid(recipe: Recipe) -> bool:
    from qwlora.formats.checkpoint import LazyModel
    from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
    from qwlora.quantize.layer_rules import plan_layers
    from qwlora.quantize.quantize_tensor import is_on_grid

    if recipe.model.trust_remote_code:
        return False
    try:
        lazy = LazyModel(FolderCheckpoint(fetch(recipe.model.source).path))
    except SourceError:  # pickles: only loading the whole model would tell
        return False
    base = recipe.base
    plan = plan_layers(lazy.model, base.scheme, base.solver, base.layer_rules())
    names = list(plan)[:: max(1, len(plan) // _PROBED)]
    tensors: dict[str, Any] = {name: lazy.checkpoint.read(lazy.stored[name]) for name in names}
    return any(is_on_grid(t, plan[name].scheme.bitwidth) for name, t in tensors.items())
