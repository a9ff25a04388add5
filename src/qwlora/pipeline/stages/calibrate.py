"""`calibrate` measures activation ranges: of each adapter, the zero adapter, or use cases."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from safetensors import SafetensorError, safe_open

from qwlora.errors import SourceError
from qwlora.formats.model_source import source_path
from qwlora.pipeline.stage import (
    ACTIVATIONS,
    CASES,
    SHARED,
    USE_CASES,
    ZERO,
    ZERO_ADAPTER,
    Planner,
)
from qwlora.recipe import Adapter
from qwlora.recipe.implied import is_foreign

_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"  # of PEFT, or else of mlx-lm
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:[AB]\.weight|[ab])")
_IN_BLOCK = re.compile(r".+\.\d+\..+")


def add_shared(plan: Planner) -> None:
    """The encodings that adapters share."""
    trained = [f"train/{adapter.name}" for adapter in plan.recipe.adapters]
    ranges = plan.ranges(plan.recipe.texts().values())
    plan.add("calibrate", ranges, *trained, kind="calibrate/shared", artifact=SHARED)


def add(plan: Planner, adapter: Adapter) -> None:
    """The encodings of an adapter."""
    name, data = adapter.name, plan.recipe.data_of(adapter)
    inputs = plan.ranges([data])
    # If encodings are shared, the cost of sharing is measured on held-out text.
    inputs |= {"held_out": plan.measured(data)} if plan.shares else {}
    more = {"adapter": name, "artifact": f"simulation/{name}"}
    needs = [f"train/{name}", *(["calibrate"] if plan.shares else [])]
    plan.add(f"calibrate/{name}", inputs, *needs, kind="calibrate", **more)


def add_zero_adapter(plan: Planner) -> None:
    """What a runtime that switches adapters computes without one."""
    recipe = plan.recipe
    first, *others = recipe.adapters
    new = [a.target_modules for a in recipe.adapters if not (a.continue_from or a.layers)]
    # The zero adapter has the shape of the first adapter, and covers the layers of all: another one
    # of the same layers changes nothing. The recipe does not list the layers of an imported one,
    # but its files may.
    counted = [first] + [
        a for a in others if not (is_foreign(recipe, a) and is_covered(str(a.continue_from), new))
    ]
    layers = {a.model_dump_json(include={"target_modules", "layers"}) for a in counted}
    needs = ["quantize", *(f"train/{a.name}" for a in counted if is_foreign(recipe, a))]
    needs += [ACTIVATIONS] if recipe.workflow == "qwa-lora" else []
    needs += ["calibrate"] if plan.shares else []
    shape = first.model_dump(include={"rank", "rank_pattern"})
    zero = {"adapter": shape, "layers": sorted(layers), "seed": recipe.seed}
    labels = {"adapter": f"adapters.{first.name}", "layers": "adapters[].target_modules, layers"}
    inputs = plan.ranges(recipe.base_texts(), plan.base_text) | zero
    plan.add(ZERO, inputs, *needs, artifact=ZERO_ADAPTER, labels=labels)


def add_use_cases(plan: Planner) -> None:
    """The encodings of every use case."""
    # Only here are names inputs: files of use cases have the names of adapters in them.
    names = [adapter.name for adapter in plan.recipe.adapters]
    ranges = plan.ranges(plan.recipe.texts().values())
    inputs = {**ranges, "use_cases": plan.recipe.use_cases(), "adapters": names}
    needs = [f"calibrate/{name}" for name in names]
    labels = {"use_cases": "export.use_cases"}
    plan.add(CASES, inputs, *needs, artifact=USE_CASES, labels=labels)


def is_covered(source: str, new: Iterable[str | list[str]]) -> bool:
    """Whether the `target_modules` of one new adapter match all layers of the adapter in a folder.

    Returns:
        False also if it is on the hub, cannot be read, or holds more than factors of linear layers.
    """
    try:
        folder = source_path(source)
        config = json.loads((folder / "adapter_config.json").read_text())
        weights, *_ = (folder / name for name in _WEIGHTS if (folder / name).is_file())
        with safe_open(weights, "np") as file:
            sizes = {n: len(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
        # Factors of convolutions have more than two axes; an embedding's have other names.
        factors = [size == 2 and _FACTOR.fullmatch(name) for name, size in sizes.items()]
        layers = {match[1] for match in factors if match}
        if not layers or not all(factors) or config.get("target_parameters"):
            return False
    except (SourceError, OSError, ValueError, AttributeError, RecursionError, SafetensorError):
        return False

    # As PEFT matches: names are the ends of paths, and `all-linear` is every linear layer inside a
    # numbered block. A regular expression is never tried: it could take forever.
    def matches(modules: str | list[str], layer: str) -> bool:
        if isinstance(modules, list):
            return any(f".{layer}".endswith(f".{name}") for name in modules)
        return modules.lower() == "all-linear" and _IN_BLOCK.fullmatch(layer) is not None

    return any(all(matches(modules, layer) for layer in layers) for modules in new)
