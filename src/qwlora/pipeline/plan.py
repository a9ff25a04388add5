"""Which stages a recipe has, in which order, and the key of each: a hash of what its result depends on.

Free of torch, so that a run in which nothing changed ends at once. A stage's key covers its section of the recipe, its text or model, the version of this
package, and the keys of the stages that it reads; so a change reruns that stage and what follows from it, and nothing else.
Model files count by their content, see `digests.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwlora.data import Documents
from qwlora.formats.model_source import fetch
from qwlora.grid.range_estimator import Estimator
from qwlora.pipeline.digests import Digests
from qwlora.quantize.solvers import SOLVERS
from qwlora.recipe import Recipe
from qwlora.revisions import revision
from qwlora.system.compute_precision import auto_compute, training_device

SHARED = "simulation/_shared"  # encodings that adapters share; no adapter has such a name
SIMULATION_FORMAT = (
    3  # of simulation/NAME; 2: the adapter lies in it; 3: says what calibration left float
)
TUNING_DEVICE = "cpu"  # where bases are made
VERBS = ("quantize", "calibrate-base", "train", "calibrate", "export", "verify", "evaluate")


@dataclass(frozen=True)
class Stage:
    """One step of the plan.

    Args:
        name: `verb` or `verb/what`, unique.
        adapter: the adapter it works on, if it works on one.
        artifact: the folder it makes, relative to the directory.
        needs: names of the stages whose results it reads.
        work_key: hash of what its unfinished work depends on, where that is less than its result does.
    """

    name: str
    key: str
    adapter: str | None = None
    artifact: str | None = None
    needs: tuple[str, ...] = ()
    work_key: str = ""

    @property
    def verb(self) -> str:
        return self.name.partition("/")[0]


def make_plan(recipe: Recipe, documents: Documents, digests: Digests | None = None) -> list[Stage]:
    """All stages in the order of a full run: an adapter's simulation is made once and used while it is in memory.

    Args:
        digests: of the model's files and of adapters to start from; give a job's own, so that files
            that did not change are not read again.
    """
    digests = digests or Digests()
    plan: dict[str, Stage] = {}

    def add(
        name: str,
        inputs: Any,
        needs: tuple[str, ...] = (),
        adapter: str | None = None,
        artifact: str | None = None,
        then: Any = None,
    ) -> None:
        """`then`: what the result depends on besides, once the work that can be taken up again is done."""
        before = [plan[n].key for n in needs]
        work_key = _hash([name, inputs, before])
        plan[name] = Stage(
            name,
            work_key if then is None else _hash([work_key, then]),
            adapter,
            artifact,
            needs,
            work_key,
        )

    model = [
        version("qwlora"),
        recipe.model.source,
        *_contents(fetch(recipe.model.source).files, digests),
    ]
    if recipe.model.trust_remote_code:
        model.append("trust_remote_code")
    template = recipe.data.read_template()
    text = [
        documents.digest,
        recipe.data.sequence_tokens,
        recipe.data.cutting().packing_of(documents.kind),
        recipe.data.turns,
        template,
    ]
    held_out = [*text, recipe.data.evaluation_sequences]
    if has_float_model(recipe):
        add("evaluate/float", [model, held_out])
    named = {recipe.base.solver, *(rule.solver for rule in recipe.base.rules)}
    solvers = [solver for name, solver in SOLVERS.items() if name in named]
    observed: list[Any] | None = None
    if any(solver.needs_calibration for solver in solvers) or needs_moments(recipe):
        observed = [text, recipe.seed, str(revision("quantize.layer_statistics"))]
    tuning = (
        [recipe.base.tuning.model_dump(), text, recipe.seed, str(revision("quantize.tune_scales"))]
        if recipe.base.tuning.steps
        else None
    )
    given = recipe.model
    encodings = (
        [
            hashlib.sha256(Path(given.encodings).read_bytes()).hexdigest(),
            given.keep_float,
            given.block_order,
        ]
        if given.encodings
        else None
    )
    solved = [
        model,
        encodings,
        recipe.base.model_dump(exclude={"tuning"}),
        observed,
        needs_moments(recipe) and str(revision("grid.second_moments")),
        *sorted({pair for solver in solvers for pair in solver.later_revisions}),
    ]
    add("quantize", solved, artifact="base", then=tuning)
    add("evaluate/base", held_out, ("quantize",))
    # momentum: of an observer that no longer exists; kept, so that stored calibrations stay valid
    ranges = [
        {**recipe.simulation.model_dump(), "momentum": 0.01},
        text,
        recipe.data.calibration_sequences,
    ]
    observers = {
        recipe.simulation.observer,
        *(rule.observer for rule in recipe.simulation.rules if rule.observer is not None),
    }
    if any(Estimator(observer).needs_sample for observer in observers):
        ranges.append(revision("grid.activation_observer"))
    through = ("calibrate-base",) if recipe.workflow == "qwa-lora" else ()
    if through:
        add("calibrate-base", ranges, ("quantize",), artifact="base_simulation")
    for adapter in recipe.adapters:
        idle = {
            "checkpoint_steps",
            "report_to",
            *(() if adapter.init != "zero" else ("init_share",)),
        }  # none of them changes the adapter
        trains = adapter.model_dump(exclude=idle)
        first = recipe.start_of(adapter)
        learns: list[Any] = [
            text,
            held_out if adapter.evaluation_steps else None,
            _start_contents(None if first else adapter.start, digests),
        ]
        if adapter.init != "zero":
            learns.append(revision("adapter.initialize"))
        needs = ("quantize", f"train/{first.name}") if first else ("quantize",)
        add(
            f"train/{adapter.name}",
            [trains, learns, recipe.seed],
            (*needs, *through),
            adapter.name,
            f"adapters/{adapter.name}",
        )
    shares = recipe.simulation.base_activations != "all"
    if shares:
        add(
            "calibrate",
            ranges,
            tuple(f"train/{adapter.name}" for adapter in recipe.adapters),
            artifact=SHARED,
        )
    for adapter in recipe.adapters:
        n = adapter.name
        add(f"evaluate/adapted/{n}", held_out, (f"train/{n}",), n)
        measures = [
            ranges,
            SIMULATION_FORMAT,
            held_out if shares else None,
        ]  # what sharing costs is measured on held-out text
        add(
            f"calibrate/{n}",
            measures,
            (f"train/{n}", "calibrate") if shares else (f"train/{n}",),
            n,
            f"simulation/{n}",
        )
        add(f"evaluate/simulated/{n}", held_out, (f"calibrate/{n}",), n)
        for target in recipe.export.targets:
            add(f"export/{target}/{n}", [], (f"calibrate/{n}",), n, f"export/{target}/{n}")
            add(
                f"verify/{target}/{n}",
                [recipe.verify.model_dump(), text],
                (f"export/{target}/{n}",),
                n,
            )
    return list(plan.values())


def resolve_compute(recipe: Recipe) -> Recipe:
    """`recipe` with `compute: auto` replaced by what it stands for on this machine.

    Results depend on it, so stage keys and the directory's own recipe hold the precision itself.
    """
    base, graph = recipe.base, recipe.workflow == "qwa-lora"  # which computes in float32 alone
    if base.tuning.steps and base.tuning.compute == "auto":
        compute = {"compute": auto_compute(TUNING_DEVICE)}
        base = base.model_copy(update={"tuning": base.tuning.model_copy(update=compute)})
    adapters = list(recipe.adapters)
    for i, adapter in enumerate(adapters):
        if adapter.compute == "auto":
            is_fixed = graph or not adapter.steps
            compute = {"compute": "float32" if is_fixed else auto_compute(training_device())}
            adapters[i] = adapter.model_copy(update=compute)
    return recipe.model_copy(update={"base": base, "adapters": adapters})


def needs_moments(recipe: Recipe) -> bool:
    """Whether an adapter's start follows what layers see."""
    return any(adapter.init == "qera" for adapter in recipe.adapters)


def has_float_model(recipe: Recipe) -> bool:
    """Whether there is a float model to compare with: not where the files hold only integers that transformers would need another library for."""
    return fetch(recipe.model.source).holds_floats


def dependents(plan: list[Stage], name: str) -> list[str]:
    """Names of the stages that read the result of `name`, or of one that does."""
    found = {name}
    for stage in plan:  # a stage comes after those that it needs
        if found & set(stage.needs):
            found.add(stage.name)
    return [stage.name for stage in plan if stage.name in found - {name}]


def _contents(files: Iterable[Path], digests: Digests) -> list[tuple[str, str | None]]:
    """Name and digest of each file."""
    return [(file.name, digests.identity(file)) for file in files]


def _start_contents(start: str | None, digests: Digests) -> list[tuple[str, str | None]]:
    """The same of an adapter to start from; one on the hub is known by its name."""
    folder = Path(start) if start else None
    if folder is None or not folder.is_dir():
        return []
    return _contents(sorted(p for p in folder.iterdir() if p.is_file()), digests)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
