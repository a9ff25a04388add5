"""What did each stage cost? A waterfall of perplexities on a logarithmic axis, and its table."""

from __future__ import annotations

import math

from markupsafe import Markup

from qwlora.report import number_format as form
from qwlora.report.drawing import Row, chart, figure
from qwlora.report.number_format import TIMES, percent, perplexity, precise_percent, three_decimals
from qwlora.report.results_view import REFERENCES, Job, runtime
from qwlora.report.sections import Cell, Table, View, section


@section("stages", "Cost by stage", "What did each stage cost?", position=50, of_adapter=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    rows = _rows(job, adapter)
    if sum(not row.hatched for row in rows) < 2:
        return None
    packing, training = job.change("base", "float", adapter), job.change("adapted", "base", adapter)
    # Changes multiply, so the share that training won back is computed on logarithms.
    won_back = packing and training and -math.log1p(training) / math.log1p(packing)
    kind = job.reference("adapted", adapter)
    start = job.perplexity(kind, adapter)
    line = None if start is None else (start, REFERENCES[kind].removeprefix("the "))
    return {
        "figure": figure(lambda width: chart("Perplexity by stage", rows, width, line=line)),
        "packing": packing,
        "training": training,
        "won_back": won_back,
        "table": _table(job, adapter),
    }


def _rows(job: Job, adapter: str) -> list[Row]:
    bits, activation_bits = job.bitwidth, job.setting("simulation", "activation_bitwidth")
    steps = job.number("train", adapter, "steps")
    trained = f"{form.count(steps)} steps" if steps else job.origin(adapter)
    details = {
        "float": "as loaded",
        "base": f"{bits}-bit, {job.setting('base', 'solver')}" if bits else "integers",
        "adapted": ", ".join(filter(None, (adapter, trained))),
        "simulated": f"{activation_bits or 'integer'}{'-bit' * bool(activation_bits)} activations",
    }
    missing = "waiting" if job.state == "running" else "not measured"
    rows: list[Row] = []

    def add(
        name: str, detail: str, before: float | None, after: float | None, shown: str = ""
    ) -> None:
        if after is None:
            rows.append(Row(name, missing, hatched=f"{name}: not measured", detail=detail))
        elif before is None:
            dot = (after, "k-float", f"{name}: {after:.3f}")
            rows.append(Row(name, perplexity(after), dots=[dot], detail=detail))
        else:
            change = after / before - 1
            words = (precise_percent if abs(change) < 0.01 else percent)(change, True)
            title = f"{name}: {before:.3f} to {after:.3f}, {words}"
            color = "k-loss" if change > 0 else "k-gain"
            part = (min(before, after), max(before, after), color, title)
            value = f"{shown or perplexity(after)}, {words}"
            rows.append(Row(name, value, [part], detail=detail))

    before: float | None = None
    for kind, title in job.kinds.items():
        after = job.perplexity(kind, adapter)
        # If the model's files hold only integers, there is no float model to measure.
        if kind == "float" and after is None and job.perplexity("base", adapter) is not None:
            continue
        add(title, details[kind], before, after)
        before = after or before
    for target in job.targets:
        drift = job.drift(target, adapter)
        start = job.perplexity(job.compared_with(target, adapter), adapter)
        end = start * (1 + drift) if start and drift is not None else None
        add("Exported file", runtime(target), start, end, f"{TIMES} {1 + (drift or 0.0):.4f}")
    return rows


def _table(job: Job, adapter: str) -> Table:
    rows: list[dict[str, Cell]] = []
    has_reference = job.reference("adapted", adapter) == "reference"
    kinds = {"reference": "Float LoRA", **job.kinds} if has_reference else job.kinds
    for kind, title in kinds.items():
        kl, stderr = (job.path(kind, adapter, key) for key in ("kl", "perplexity_stderr"))
        value = job.shown(three_decimals, *job.path(kind, adapter))
        change = job.change(kind, job.reference(kind, adapter), adapter)
        against = None if change is None else form.tagged(precise_percent(change, True), change)
        row: dict[str, Cell] = {
            "Stage": title,
            "Perplexity": value,
            "Against float": against,
            "KL, mean": job.shown(form.significant, *kl, "mean"),
            "KL, 99.9%": job.shown(form.significant, *kl, "p999"),
            "Same token": job.shown(precise_percent, *job.path(kind, adapter, "top1"), "share"),
            "Standard error": job.shown(lambda v: f"± {three_decimals(v)}", *stderr),
        }
        if kind in REFERENCES and value:
            row |= {"Against float": "reference", "KL, mean": "0", "KL, 99.9%": "0"}
            row["Same token"] = "100%"
        rows.append(row)
    note = Markup(
        '<span class="nm">hatched</span> not measured. Add KL, agreement and standard errors '
        "with {}."
    ).format(job.verb_command("evaluate"))
    sequences = job.setting("data", "evaluation_sequences")
    words = f"the same {sequences} held-out sequences" if sequences else "the same held-out text"
    of_trained = ", with adapter against float LoRA (the same adapter, trained on it)"
    return Table(
        f"Every stage on {words}. Changes, KL divergence (nats) and top-1 agreement are "
        f"against the float model{of_trained * has_reference}; the standard error is that of the "
        "perplexity.",
        rows,
        marked=(len(rows) - 1,) if job.perplexity("simulated", adapter) is not None else (),
        note=note if any(None in row.values() for row in rows) else "",
    )
