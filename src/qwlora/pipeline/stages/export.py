"""`export/TARGET` writes the base for a runtime, `export/TARGET/NAME` an adapter.

`verify/TARGET/NAME` runs the files; `verify/TARGET` those of the zero adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwlora.pipeline.stage import CASES, Planner, revisions
from qwlora.recipe import Adapter, Data
from qwlora.system.parameter_names import BASE
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import PROOF


def files(plan: Planner, target: str) -> dict[str, Any]:
    """What exported files depend on besides the tensors in them."""
    export, graphs = plan.recipe.export, plan.recipe.export.graphs_of(target)
    keys = {"encodings_version", "opset"} if TARGETS[target].opsets else set[str]()
    written = export.model_dump(include=keys)
    written["embedding_bits"] = export.embedding_bits_of(target)
    written |= {} if graphs is None else {"graphs": graphs.model_dump()}
    written |= {"layout": layout} if (layout := export.layout_of(target)) else {}
    # Golden inputs are the text of the proof.
    shipped = plan.shipped() if TARGETS[target].has_golden else {}
    written |= {"canary": plan.recipe.export.canary} if TARGETS[target].has_canary else {}
    canary = _canary_inputs(plan) if TARGETS[target].has_canary else {}
    return {**shipped, **canary, "export": {**written, **shipped.get("export", {})}}


def _canary_inputs(plan: Planner) -> dict[str, Any]:
    """What the contexts of canary.json come from. A new adapter is asked what its base was."""
    recipe, kind = plan.recipe, plan.recipe.export.canary
    if kind == "none":
        return {}
    first = recipe.data_of(recipe.adapters[0])
    text = {"seed": recipe.seed} if kind == "generated" else {"data": plan.text(first)}
    return {**text, **revisions("canary")}


def add_base(plan: Planner, target: str, source: str) -> None:
    """The base, made from stage `source`."""
    artifact = f"export/{target}/{BASE}"
    plan.add(f"export/{target}", files(plan, target), source, artifact=artifact)


def add(plan: Planner, target: str, adapter: Adapter) -> None:
    """An adapter."""
    known = plan.targets[target]
    *base, stage = known.stages(target, adapter.name)
    needs = [*base, f"{'calibrate' if known.is_simulated else 'train'}/{adapter.name}"]
    more = {"adapter": adapter.name, "artifact": stage, "kind": f"export/{target}/adapter"}
    shapes, keys = list[Any](), {"target_modules", "layers", "rank", "rank_pattern"}
    for root in map(plan.recipe.root, plan.recipe.adapters) if known.has_one_shape else ():
        source = root.continue_from
        shapes.append(plan.sources.adapter(source) if source else root.model_dump(include=keys))
    inputs = files(plan, target) | ({"adapters": shapes} if shapes else {})
    plan.add(stage, inputs, *needs, **more)


def add_use_cases(plan: Planner, target: str) -> None:
    """All use cases in one folder."""
    known, more = plan.targets[target], dict[str, Any](artifact=f"export/{target}")
    more |= {"missing": known.missing} if known.compilers else {}
    plan.add(f"export/{target}", files(plan, target), CASES, **more)


def add_check(plan: Planner, target: str, name: str, texts: Iterable[Data]) -> None:
    """The check of an adapter or use case."""
    # Whether the runtime is installed is no input: a proof is of files, and another machine that
    # lacks it keeps the proof.
    known, recipe = plan.targets[target], plan.recipe
    inputs: dict[str, Any] = {"verify": recipe.verify.model_dump(mode="json")}
    inputs["texts"] = [plan.text(text) for text in texts]
    inputs |= plan.shipped() if known.has_proof else {}
    inputs |= {"use_case": name} if known.has_cases else {}
    more: dict[str, Any] = {"case" if known.has_cases else "adapter": name}
    if known.has_proof:
        more |= {"artifact": f"export/{target}/{PROOF}/{name}", "missing": known.missing}
    needs, kind = known.stages(target, name), f"verify/{target}/adapter"
    plan.add(f"verify/{target}/{name}", inputs, *needs, kind=kind, **more)


def add_check_of_zero_adapter(plan: Planner, target: str) -> None:
    """The base as the zero adapter."""
    text = plan.text(plan.recipe.data_of(plan.recipe.adapters[0]))
    inputs = {"verify": plan.recipe.verify.model_dump(mode="json"), "texts": [text]}
    plan.add(f"verify/{target}", inputs, f"export/{target}")
