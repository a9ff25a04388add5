"""The six figures below the verdict."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from qwlora.report.number_format import (
    count,
    fixed,
    percent,
    perplexity,
    precise_percent,
    seconds,
    significant,
    size,
)
from qwlora.report.results_view import FILES, NOT_MEASURED, Job, code, runtime, tagged, valued

KL = (
    "KL divergence: how far the next-token probabilities moved from the float model, in nats. "
    "0 means identical."
)
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Tile:
    """One key figure: `value` with its unit, a definition behind the question mark, a note."""

    label: str
    tip: str
    value: Markup | str
    small: str = ""
    note: Markup | str = ""


def tiles(job: Job) -> list[Tile]:
    """The key figures of a job, as far as it got."""
    if job.state not in ("finished", "failed") or not job.adapters:
        return _of_unfinished(job)
    if len(job.adapters) != 1:
        return _of_several(job)
    adapter = job.adapters[0]
    return [
        _perplexity(job, adapter),
        packing(job, adapter),
        _shipping(job, adapter),
        divergence(job, adapter),
        _same_token(job, adapter),
        _file_size(job, adapter),
    ]


def _perplexity(job: Job, adapter: str) -> Tile:
    kind = job.best_kind(adapter)
    label = "Perplexity, simulated" if kind != "adapted" else "Perplexity, with adapter"
    tip = (
        "Perplexity: how surprised the model is by held-out text, on average. 1 is perfect. "
        "Lower is better."
    )
    value = job.perplexity(kind or "simulated", adapter)
    reference = job.perplexity("float", adapter)
    change = job.change(kind or "simulated", "float", adapter)
    return Tile(
        label,
        tip,
        tagged(perplexity(value or 0), value, job.path(kind or "simulated", adapter)),
        f"float {perplexity(reference)}" if reference else "",
        f"{percent(change, sign=True)} against the float model"
        if change is not None
        else "there is no float model to compare with"
        if value
        else _add(job, "evaluate"),
    )


def _add(job: Job, verb: str) -> Markup:
    if job.state == "running":
        return Markup("not yet")
    return Markup("add it: {}").format(code(job.verb_command(verb)))


def packing(job: Job, adapter: str | None) -> Tile:
    """How much worse the packed base is than the float model."""
    change = job.change("base", "float", adapter)
    bits = job.number("base", "bits_per_weight")
    tip = (
        "How much worse the model got when its weights became integers"
        f"{f' of {bits:.2f} bits each' if bits else ''}, before any training."
    )
    if change is None:
        why = "the model's files hold only integers" if job.perplexity("base", adapter) else ""
        return Tile("Cost of packing", tip, NOT_MEASURED, "", why or _add(job, "evaluate"))
    before, after = (job.perplexity(kind, adapter) or 0.0 for kind in ("float", "base"))
    return Tile(
        "Cost of packing",
        tip,
        valued(percent(change, sign=True), change),
        "",
        f"{perplexity(before)} to {perplexity(after)}, before training",
    )


def _furthest_target(job: Job, adapter: str) -> str:
    """The target whose files are furthest from what is expected; empty if none was measured."""
    drifts = {
        target: abs(drift)
        for target in job.targets
        if (target, adapter) not in job.stale and (drift := job.drift(target, adapter)) is not None
    }
    return max(drifts, key=lambda target: drifts[target], default="")


def shipping_cost(job: Job, adapter: str) -> float | None:
    """Relative perplexity between the trained adapter and the exported file."""
    target = _furthest_target(job, adapter)
    drift = job.drift(target, adapter)
    if job.compared_with(target, adapter) == "adapted":
        return drift  # the files hold no activations
    simulation = job.change("simulated", "adapted", adapter)
    return None if simulation is None or drift is None else (1 + simulation) * (1 + drift) - 1


def _shipping(job: Job, adapter: str) -> Tile:
    tip = (
        "What you lose between the trained adapter and the exported file: integer activations, "
        "then the runtime."
    )
    cost = shipping_cost(job, adapter)
    if cost is None:
        return Tile("Cost of shipping", tip, NOT_MEASURED, "", _add(job, "verify"))
    target = _furthest_target(job, adapter)
    export = f"export {precise_percent(job.drift(target, adapter) or 0.0, True)}"
    if job.compared_with(target, adapter) == "simulated":
        simulation = job.change("simulated", "adapted", adapter) or 0.0
        export = f"simulation {precise_percent(simulation, True)}, {export}"
    return Tile(
        "Cost of shipping",
        tip,
        valued(percent(cost, sign=True), cost),
        "",
        export,
    )


def divergence(job: Job, adapter: str) -> Tile:
    """KL divergence of the last model from the float model."""
    for kind, word in (("simulated", "simulated"), ("adapted", "with adapter"), ("base", "base")):
        path = (*job.path(kind, adapter, "kl"), "mean")
        if (value := job.number(*path)) is not None:
            stderr = job.number(*path[:-1], "stderr")
            error = f" ± {significant(stderr, 2)}" if stderr is not None else ""
            return Tile(
                "KL to float, mean",
                KL,
                tagged(significant(value), value, path),
                "nats",
                f"{word}{error}",
            )
    return Tile("KL to float, mean", KL, NOT_MEASURED, "", _add(job, "evaluate"))


def _same_token(job: Job, adapter: str) -> Tile:
    tip = (
        "Same likeliest token: how often two models would pick the same next word. Here: exported "
        "file against simulation."
    )
    value, path = job.worst_proof(adapter, "top1_agreement", is_least=True)
    floor = job.number(*path[:-1], "floor_top1_agreement")
    if value is None:
        return Tile("Same likeliest token", tip, NOT_MEASURED, "", _add(job, "verify"))
    note = f"noise floor {precise_percent(floor)}" if floor is not None else runtime(path[1])
    return Tile("Same likeliest token", tip, tagged(precise_percent(value), value, path), "", note)


def float_bytes(job: Job) -> float | None:
    """Size of the model in float32."""
    packed, floats = job.number("base", "weights"), job.number("base", "float_weights")
    return None if packed is None or floats is None else FLOAT_BYTES * (packed + floats)


def _file_size(job: Job, adapter: str) -> Tile:
    target = job.targets[0] if job.targets else ""
    name = FILES.get(target, f"files for {target}" if target else "exported file")
    path = ("export", target, adapter, "bytes")
    value, whole = job.number(*path), float_bytes(job)
    packed = job.number("base", "bytes")
    base = job.number("export", target, "base", "bytes")
    if base is not None:  # the base once, and adapters beside it
        tip = "What each further adapter costs. Graph and weights are in the base."
    else:
        tip = "Graph and weights."
        if packed:
            tip += f" Packed layers take {size(packed)}; what stayed float takes the rest."
    if value is None:
        return Tile(f"Size of the {name}", tip, NOT_MEASURED, "", _add(job, "export"))
    number, unit = size(value).split(" ")
    note = f"{value / whole:.0%} of {size(whole)} in float32" if whole else ""
    if base is not None:
        note = f"the adapter; the base has {size(base)}"
    return Tile(f"Size of the {name}", tip, tagged(number, value, path), unit, note)


def _of_several(job: Job) -> list[Tile]:
    """The same figures for several adapters: always the worst of them, by name."""
    names = job.adapters
    changes = {
        name: change
        for name in names
        if (kind := job.best_kind(name)) and (change := job.change(kind, "float", name)) is not None
    }
    better = [name for name, change in changes.items() if change < 0]
    first = Tile(
        "Better than the float model",
        "Adapters with a lower perplexity than the float model, each on its own held-out text.",
        Markup("{} <small>of {}</small>").format(len(better), len(names))
        if changes
        else NOT_MEASURED,
        "",
        f"weakest: {max(changes, key=lambda n: changes[n])}, "
        f"{percent(max(changes.values()), sign=True)}"
        if changes
        else _add(job, "evaluate"),
    )
    costs = {n: cost for n in names if (cost := shipping_cost(job, n)) is not None}
    shipping = _shipping(job, max(costs, key=lambda n: costs[n]) if costs else names[0])
    target = job.targets[0] if job.targets else ""
    shares = {
        n: share
        for n in names
        if (share := job.worst_proof(n, "top1_agreement", is_least=True)[0]) is not None
    }
    kls = {
        n: kl
        for n in names
        if (kl := job.number(*job.path("simulated", n, "kl"), "mean")) is not None
    }
    sizes = [b for n in names if (b := job.number("export", target, n, "bytes")) is not None]
    base = job.number("export", target, "base", "bytes") if sizes else None
    total = sum(sizes) + (base or 0.0)
    bits = packing(job, names[0])
    return [
        first,
        bits,
        _worst(shipping, costs),
        _worst(divergence(job, max(kls, key=lambda n: kls[n]) if kls else names[0]), kls),
        _worst(
            _same_token(job, min(shares, key=lambda n: shares[n]) if shares else names[0]),
            shares,
            False,
        ),
        Tile(
            "Size of all files",
            "Exported files of all adapters, and of their base.",
            valued(size(total).split(" ")[0], total) if sizes else NOT_MEASURED,
            size(total).split(" ")[1] if sizes else "",
            f"{len(sizes)} of {len(names)} adapters exported" if sizes else _add(job, "export"),
        ),
    ]


def _worst(tile: Tile, values: dict[str, float], largest: bool = True) -> Tile:
    if not values:
        return tile
    name = (max if largest else min)(values, key=lambda n: values[n])
    return Tile(
        tile.label,
        tile.tip,
        tile.value,
        tile.small,
        Markup("worst: {}, {}").format(name, tile.note),
    )


def _of_unfinished(job: Job) -> list[Tile]:
    training = job.section("run", "training")
    adapter = str(training.get("adapter") or (job.adapters or [""])[0])
    done, plan = job.finished_stages, job.planned_stages
    stages = f"{len(done)} of {len(plan)} stages done" if plan else f"{len(done)} stages done"
    step, steps = training.get("step") or 0, training.get("steps") or 0
    per_step = job.number("run", "training", "step_seconds")
    left = per_step * (steps - step) if per_step is not None and steps else None
    losses = training.get("losses") or []
    last = losses[-8:]
    mean = sum(last) / len(last) if last else None
    memory = job.number("run", "peak_rss_bytes")
    return [
        Tile(
            "Time so far",
            "Time of all stages so far, also of those that an earlier run finished.",
            valued(seconds(job.seconds_so_far), job.seconds_so_far),
            "",
            stages,
        ),
        Tile(
            "Left in training",
            "Remaining steps times the mean time of a step.",
            valued(f"about {seconds(left)}", left) if left is not None else NOT_MEASURED,
            "",
            f"{count(steps - step)} steps at {seconds(per_step)}"
            if per_step is not None and left is not None
            else "no adapter is being trained",
        ),
        Tile(
            "Training loss",
            "Average surprise per token on the training text. Lower is better.",
            valued(fixed(mean), mean) if mean is not None else NOT_MEASURED,
            "nats" if mean is not None else "",
            f"mean of {len(last)} steps; it began at {fixed(losses[0])}" if last else "",
        ),
        packing(job, adapter),
        Tile(
            "Peak memory",
            "Largest memory of the process since the stage started.",
            tagged(size(memory or 0), memory, ("run", "peak_rss_bytes")),
            "",
            str(job.get("run", "stage") or ""),
        ),
        divergence(job, adapter),
    ]
