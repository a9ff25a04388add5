"""What did it cost? Six figures, each for the worst adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from markupsafe import Markup

from qwlora.errors import size
from qwlora.report import number_format as form
from qwlora.report.number_format import percent, precise_percent, tagged
from qwlora.report.results_view import FILES, REFERENCES, Job, runtime
from qwlora.report.sections import View, section
from qwlora.system.parameter_names import BASE

PERPLEXITY = (
    "Perplexity: how surprised the model is by held-out text, on average. 1 is perfect. Lower is "
    "better."
)
KL = (
    "KL divergence: how far the next-token probabilities moved from the float model, or from float "
    "LoRA (the same adapter trained on it), in nats. 0 means identical."
)
SHIPPING = (
    "What you lose between the trained adapter and the exported file: integer activations, then "
    "the runtime."
)
PACKING = "How much worse the model got when its weights became integers, before any training."
SIZE = "Graph and weights; where the base has files of its own, what each further adapter costs."
SAME_TOKEN = (
    "Top-1 agreement: how often two models would pick the same next token. Here: exported file "
    "against the model it was exported from."
)

_SHORT = {"float": "float", "reference": "float LoRA"}


@dataclass(frozen=True)
class Tile:
    """One key figure: `value` with its unit, and `tip`, its definition. Several adapters: the
    one with the largest badness."""

    label: str
    tip: str
    value: Markup | None
    note: Markup | str = ""
    unit: str = ""
    badness: float | None = None


@section("figures", "Key figures", "What did the integers cost?", position=40, of_job=True)
def view(job: Job, adapter: str) -> View:
    """What the template draws."""
    return {"tiles": tiles(job)}


def tiles(job: Job) -> list[Tile]:
    """The key figures of a job so far; each for the worst adapter."""
    kinds = (perplexity_tile, _packing, _shipping, _divergence, _same_token, _file_size)
    return [_worst(job, kind) for kind in kinds]


def _worst(job: Job, tile_of: Callable[[Job, str], Tile]) -> Tile:
    named = {name: tile_of(job, name) for name in job.adapters or [""]}
    name = max(named, key=lambda n: -math.inf if (b := named[n].badness) is None else b)
    if len(named) == 1 or named[name].badness is None:
        return named[name]
    return replace(named[name], note=Markup("worst: {}, {}").format(name, named[name].note))


def _add(job: Job, verb: str) -> Markup:
    if job.state == "running":
        return Markup("not yet")
    return Markup("add it: {}").format(job.verb_command(verb))


def _change(value: float | None) -> Markup | None:
    return None if value is None else tagged(percent(value, sign=True), value)


def perplexity_tile(job: Job, adapter: str) -> Tile:
    """The perplexity of the last model that was evaluated, and its change."""
    kind = job.final_kind(adapter) or [*job.kinds][-1]
    label = "Perplexity, simulated" if kind == "simulated" else "Perplexity, with adapter"
    value = job.shown(form.perplexity, *job.path(kind, adapter))
    against = job.reference(kind, adapter)
    reference, change = job.perplexity(against, adapter), job.gains(against).get(adapter)
    note: Markup | str = "there is no float model to compare with"
    if change is not None:
        note = f"{percent(change, sign=True)} against {REFERENCES[against]}"
    elif value is None:
        note = _add(job, "evaluate")
    unit = f"{_SHORT[against]} {form.perplexity(reference)}" if reference else ""
    return Tile(label, PERPLEXITY, value, note, unit, badness=change)


def _packing(job: Job, adapter: str) -> Tile:
    before, after = (job.perplexity(kind, adapter) for kind in ("float", "base"))
    note: Markup | str = _add(job, "evaluate")
    if before and after:
        note = f"{form.perplexity(before)} to {form.perplexity(after)}, before training"
    elif after:
        note = "the model's files hold only integers"
    change = job.change("base", "float", adapter)
    return Tile("Cost of packing", PACKING, _change(change), note, badness=change)


def _shipping(job: Job, adapter: str) -> Tile:
    drifts = {t: drift for t in job.targets if (drift := job.drift(t, adapter)) is not None}
    target = max(drifts, key=lambda t: abs(drifts[t]), default="")
    export, simulation, note = drifts.get(target), 0.0, ""
    # Files without activations were compared with the adapter, so the simulation costs nothing.
    if job.compared_with(target, adapter) == "simulated":
        change = job.change("simulated", "adapted", adapter)
        export, simulation = (None, 0.0) if change is None else (export, change)
        note = f"simulation {precise_percent(simulation, True)}, "
    if export is None:
        return Tile("Cost of shipping", SHIPPING, None, _add(job, "verify"))
    cost = (1 + simulation) * (1 + export) - 1 if simulation else export
    note += f"export {precise_percent(export, True)}"
    return Tile("Cost of shipping", SHIPPING, _change(cost), note, badness=cost)


def _divergence(job: Job, adapter: str) -> Tile:
    # The last model that was evaluated.
    label = "KL to float, mean"
    for kind, word in (("simulated", "simulated"), ("adapted", "with adapter"), ("base", "base")):
        path = job.path(kind, adapter, "kl")
        label = f"KL to {_SHORT[job.reference(kind, adapter)]}, mean"
        if (value := job.shown(form.significant, *path, "mean")) is not None:
            stderr = job.number(*path, "stderr")
            error = f" ± {form.significant(stderr, 2)}" if stderr is not None else ""
            return Tile(label, KL, value, f"{word}{error}", "nats", job.number(*path, "mean"))
    return Tile(label, KL, None, _add(job, "evaluate"))


def _same_token(job: Job, adapter: str) -> Tile:
    path = job.worst_proof(adapter, "top1_agreement", min)
    if not path:
        return Tile("Top-1 agreement", SAME_TOKEN, None, _add(job, "verify"))
    floor = job.number(*path[:-1], "floor_top1_agreement")
    note = f"noise floor {precise_percent(floor)}" if floor is not None else runtime(path[1])
    if (shipped := job.number(*path[:-1], "shipped_top1_agreement")) is not None:
        note = f"{runtime(path[1])} in float32; as shipped {precise_percent(shipped)}"
    # In float32 most files agree on every token, so the shipped figure decides which is worst.
    shares = [share for share in (job.number(*path), shipped) if share is not None]
    value = job.shown(precise_percent, *path)
    return Tile("Top-1 agreement", SAME_TOKEN, value, note, badness=-min(shares, default=0.0))


def _file_size(job: Job, adapter: str) -> Tile:
    target = job.targets[0] if job.targets else ""
    files = FILES.get(target, f"{target} file" if target else "Exported file")
    label, path, note = f"{files} size", ("export", target, adapter, "bytes"), ""
    value, whole = job.number(*path), job.float_bytes
    if value is None:
        return Tile(label, SIZE, None, _add(job, "export"))
    if (base := job.number("export", target, BASE, "bytes")) is not None:
        note = f"adapter only; the base has {size(base)}"
    elif whole:
        note = f"{value / whole:.0%} of {size(whole)} in float32"
    number, unit = size(value).split(" ")
    return Tile(label, SIZE, tagged(number, value, path), note, unit, badness=value)
