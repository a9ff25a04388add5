"""The six figures below the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from markupsafe import Markup

from qwlora.report import number_format as form
from qwlora.report.number_format import Format, percent, precise_percent, size, tagged
from qwlora.report.results_view import FILES, Job, runtime
from qwlora.report.sections.training_course import SMOOTHED

PERPLEXITY = (
    "Perplexity: how surprised the model is by held-out text, on average. 1 is perfect. Lower is "
    "better."
)
KL = (
    "KL divergence: how far the next-token probabilities moved from the float model, in nats. "
    "0 means identical."
)
SHIPPING = (
    "What you lose between the trained adapter and the exported file: integer activations, then "
    "the runtime."
)
SAME_TOKEN = (
    "Same likeliest token: how often two models would pick the same next word. Here: exported file "
    "against simulation."
)


@dataclass(frozen=True)
class Tile:
    """One key figure: `value` with its unit, a definition behind the question mark, a note.

    Args:
        badness: of several adapters, the one with the largest is shown; None if not measured.
    """

    label: str
    tip: str
    value: Markup | None
    note: Markup | str = ""
    unit: str = ""
    badness: float | None = None


def tiles(job: Job) -> list[Tile]:
    """The key figures of a job, as far as it got; of several adapters always the worst."""
    if job.state not in ("finished", "failed") or not job.adapters:
        return _of_unfinished(job)
    kinds = (_perplexity, _packing, _shipping, _divergence, _same_token, _file_size)
    return [_worst(job, kind) for kind in kinds]


def _worst(job: Job, tile_of: Callable[[Job, str], Tile]) -> Tile:
    """The tile of the adapter with the largest badness; of several it says which."""
    named = {name: tile_of(job, name) for name in job.adapters}
    measured = [name for name, tile in named.items() if tile.badness is not None]
    name = max(measured, key=lambda n: named[n].badness or 0.0, default=job.adapters[0])
    if len(named) == 1 or not measured:
        return named[name]
    return replace(named[name], note=Markup("worst: {}, {}").format(name, named[name].note))


def _add(job: Job, verb: str) -> Markup:
    """How to measure what was not measured."""
    if job.state == "running":
        return Markup("not yet")
    return Markup("add it: {}").format(job.verb_command(verb))


def _value(value: float | None, written: Format) -> Markup | None:
    return None if value is None else tagged(written(value), value)


def _change(value: float | None) -> Markup | None:
    return _value(value, lambda change: percent(change, sign=True))


def _perplexity(job: Job, adapter: str) -> Tile:
    kind = job.final_kind(adapter) or "simulated"
    label = "Perplexity, simulated" if kind == "simulated" else "Perplexity, with adapter"
    value = job.shown(form.perplexity, *job.path(kind, adapter))
    reference, change = job.perplexity("float", adapter), job.gains().get(adapter)
    note: Markup | str = "there is no float model to compare with"
    if change is not None:
        note = f"{percent(change, sign=True)} against the float model"
    elif value is None:
        note = _add(job, "evaluate")
    unit = f"float {form.perplexity(reference)}" if reference else ""
    return Tile(label, PERPLEXITY, value, note, unit, badness=change)


def _packing(job: Job, adapter: str) -> Tile:
    """How much worse the packed base is than the float model."""
    bits = job.number("base", "bits_per_weight")
    tip = (
        "How much worse the model got when its weights became integers"
        f"{f' of {bits:.2f} bits each' if bits else ''}, before any training."
    )
    before, after = (job.perplexity(kind, adapter) for kind in ("float", "base"))
    note: Markup | str = _add(job, "evaluate")
    if before and after:
        note = f"{form.perplexity(before)} to {form.perplexity(after)}, before training"
    elif after:
        note = "the model's files hold only integers"
    change = job.change("base", "float", adapter)
    return Tile("Cost of packing", tip, _change(change), note, badness=change)


def _shipping(job: Job, adapter: str) -> Tile:
    """Relative perplexity between the trained adapter and the exported file that is furthest from
    what is expected; and its parts in words."""
    drifts = {t: drift for t in job.targets if (drift := job.drift(t, adapter)) is not None}
    target = max(drifts, key=lambda t: abs(drifts[t]), default="")
    export, simulation, note = drifts.get(target), 0.0, ""
    if job.compared_with(target, adapter) == "simulated":  # else files hold no activations
        change = job.change("simulated", "adapted", adapter)
        export, simulation = (None, 0.0) if change is None else (export, change)
        note = f"simulation {precise_percent(simulation, True)}, "
    if export is None:
        return Tile("Cost of shipping", SHIPPING, None, _add(job, "verify"))
    cost = (1 + simulation) * (1 + export) - 1 if simulation else export
    note += f"export {precise_percent(export, True)}"
    return Tile("Cost of shipping", SHIPPING, _change(cost), note, badness=cost)


def _divergence(job: Job, adapter: str) -> Tile:
    """KL divergence of the last model from the float model."""
    label = "KL to float, mean"
    for kind, word in (("simulated", "simulated"), ("adapted", "with adapter"), ("base", "base")):
        path = job.path(kind, adapter, "kl")
        if (value := job.shown(form.significant, *path, "mean")) is not None:
            stderr = job.number(*path, "stderr")
            error = f" ± {form.significant(stderr, 2)}" if stderr is not None else ""
            return Tile(label, KL, value, f"{word}{error}", "nats", job.number(*path, "mean"))
    return Tile(label, KL, None, _add(job, "evaluate"))


def _same_token(job: Job, adapter: str) -> Tile:
    path = job.worst_proof(adapter, "top1_agreement", min)
    if not path:
        return Tile("Same likeliest token", SAME_TOKEN, None, _add(job, "verify"))
    floor = job.number(*path[:-1], "floor_top1_agreement")
    note = f"noise floor {precise_percent(floor)}" if floor is not None else runtime(path[1])
    value, share = job.shown(precise_percent, *path), job.number(*path) or 0.0
    return Tile("Same likeliest token", SAME_TOKEN, value, note, badness=-share)


def _file_size(job: Job, adapter: str) -> Tile:
    target = job.targets[0] if job.targets else ""
    name = FILES.get(target, f"files for {target}" if target else "exported file")
    path, tip, note = ("export", target, adapter, "bytes"), "Graph and weights.", ""
    value, packed, whole = job.number(*path), job.number("base", "bytes"), job.float_bytes
    if (base := job.number("export", target, "base", "bytes")) is not None:
        tip = "What each further adapter costs. Graph and weights are in the base."
        note = f"the adapter; the base has {size(base)}"
    elif packed:
        tip += f" Packed layers take {size(packed)}; what stayed float takes the rest."
    if value is None:
        return Tile(f"Size of the {name}", tip, None, _add(job, "export"))
    if whole and not note:
        note = f"{value / whole:.0%} of {size(whole)} in float32"
    number, unit = size(value).split(" ")
    shown = tagged(number, value, path)
    return Tile(f"Size of the {name}", tip, shown, note, unit, badness=value)


def _of_unfinished(job: Job) -> list[Tile]:
    training, plan = job.section("run", "training"), len(job.planned_stages)
    adapter = str(training.get("adapter") or (job.adapters or [""])[0])
    losses = training.get("losses") or []
    last = losses[-SMOOTHED:]
    return [
        Tile(
            "Time so far",
            "Time of all stages so far, also of those that an earlier run finished.",
            _value(job.seconds_so_far, form.seconds),
            f"{len(job.finished_stages)}{f' of {plan}' if plan else ''} stages done",
        ),
        Tile(
            "Time per step",
            "Mean time of a training step.",
            job.shown(form.seconds, "run", "training", "step_seconds"),
            "" if training else "no adapter is being trained",
        ),
        Tile(
            "Training loss",
            "Average surprise per token on the training text. Lower is better.",
            _value(sum(last) / len(last) if last else None, form.fixed),
            f"mean of {len(last)} steps; it began at {form.fixed(losses[0])}" if last else "",
            "nats" if last else "",
        ),
        _packing(job, adapter),
        Tile(
            "Peak memory",
            "Largest memory of the process since the stage started.",
            job.shown(size, "run", "peak_rss_bytes"),
            str(job.get("run", "stage") or ""),
        ),
        _divergence(job, adapter),
    ]
