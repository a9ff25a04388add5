"""The table at the end of a run: the key figures and checks of the report, which judges them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from qwlora.errors import size
from qwlora.report.key_figures import tiles
from qwlora.report.results_view import REPORT, Job
from qwlora.report.verdict import Outcome, verdict

Row = tuple[str, str]


def print_summary(job: Job, out: Path, console: Console) -> None:
    """Print the table of the job in `out`; then the verdict, where the report is, and what to do
    next."""
    table = Table(
        title=job.title, show_header=False, title_justify="left", box=None, pad_edge=False
    )
    for row in summary_rows(job):
        table.add_row(*row)
    console.print()
    console.print(table)
    ruling = verdict(job)
    lines = [f"verdict  {ruling.kind.label}. {ruling.sentence}", f"report   {out / REPORT}"]
    if job.state == "incomplete":
        lines.append(f"next     {shlex.join(['qwlora', 'run', str(out)])}")
    elif job.state == "finished":
        lines.append(f"next     {shlex.join(['qwlora', 'generate', str(out), 'a prompt'])}")
    print("", *lines, sep="\n")


def summary_rows(job: Job) -> Iterator[Row]:
    """The rows of the table; of the checks those that did not pass, and how many did."""
    if job.get("trust_remote_code"):
        yield "trust_remote_code", "true: Python code from the model's folder was run"
    for tile in tiles(job):
        if tile.value is not None:
            figure = f"{_plain(tile.value)} {tile.unit}".strip()
            yield tile.label, "; ".join(filter(None, (figure, _plain(tile.note))))
    if base := job.section("base"):
        yield (
            "Base",
            f"{size(base['bytes'])} packed, {base['bits_per_weight']:.2f} bits per weight, "
            f"fingerprint {base['fingerprint'][:16]}",
        )
        if "second_rounding" in base:
            yield "Warning", base["second_rounding"]
    for target, parts in job.section("export").items():
        for name, part in parts.items():
            if (bits := part.get("bits_per_weight")) is not None:
                yield f"{target}/{name}", f"{size(part['bytes'])}, {bits:.2f} bits per weight"
    for name, train in job.section("train").items():
        yield from _training_rows(name, train, job.section("perplexity"))
    for text, caution in job.data_cautions():
        yield "Missing data", f"{text}: {caution}" if text else caution
    evidence = verdict(job).evidence
    for item in evidence:
        if item.outcome is not Outcome.PASSED:
            limit = f" ({item.limit})" if item.limit else ""
            yield item.outcome.word, f"{_plain(item.what)}: {_plain(item.value)}{limit}"
    if passed := sum(item.outcome is Outcome.PASSED for item in evidence):
        yield "Passed", f"{passed} check{'s' * (passed > 1)}"
    seconds = {verb: stage["seconds"] for verb, stage in job.section("stages").items()}
    parts = ", ".join(f"{verb} {s:.0f}" for verb, s in seconds.items())
    yield "Seconds", f"{parts}; total {sum(seconds.values()):.0f}"


def answer_lines(job: Job, most: int = 2) -> Iterator[str]:
    """Held-out prompts, answered by the base and by each adapter."""
    for name, answers in job.section("answers", "adapted").items():
        of_base = job.get("answers", *job.path("base", name)[1:])
        for with_adapter, without in list(zip(answers, of_base or answers, strict=False))[:most]:
            yield f"\nprompt   {with_adapter['prompt']}"
            yield f"base     {without['answer']}" if of_base else ""
            yield f"{name}   {with_adapter['answer']}"


def _plain(text: str | Markup) -> str:
    return text.striptags() if isinstance(text, Markup) else text


def base_costs(results: dict[str, Any]) -> Iterator[Row]:
    """What the base costs on texts other than its own."""
    # A base keeps its calibration when an adapter with other text is added.
    for text, ratio in results.get("perplexity_ratio", {}).get("on", {}).items():
        over = _with_error(ratio["base"]["value"] - 1, ratio["base"]["stderr"], "+.1%")
        kl = results["kl"]["on"][text]["base"]
        divergence = _with_error(kl["mean"], kl["stderr"], ".4f")
        yield f"base on the text of {text}", f"{over} perplexity over float, KL {divergence}"


def _with_error(value: float, error: float | None, written: str) -> str:
    return f"{value:{written}}" + ("" if error is None else f" ± {error:{written.lstrip('+')}}")


def _training_rows(name: str, train: dict[str, Any], perplexity: dict[str, Any]) -> Iterator[Row]:
    in_what = f" in {train['compute']}" if train["steps"] and "compute" in train else ""
    losses = train.get("losses") or []
    course, part = "", max(1, len(losses) // 5)
    if losses:
        start, end = (sum(p) / part for p in (losses[:part], losses[-part:]))
        course = f"{start:.3f} to {end:.3f}" + (f" (means of {part} steps)" if part > 1 else "")
    loss = f", loss {course}" if losses else ""
    yield f"Training {name}", f"{train['steps']} steps{in_what}{loss}"
    yield (
        "",
        f"{train['step_seconds']:.2f} s per step, peak memory {size(train['peak_rss_bytes'])}, "
        f"{train['trainable_parameters']:,} parameters",
    )
    after = perplexity.get("adapted", {}).get(name)
    before = perplexity.get("on", {}).get(train.get("text"), perplexity).get("base")
    if after is not None and before is not None:
        change = after / before - 1
        yield "", f"held-out perplexity {before:.3f} to {after:.3f} ({change:+.1%})"
        if change >= 0:
            yield "Warning", f"{name} is no better than the base on held-out text"
    # The losses of two single steps say nothing.
    if part > 1 and end >= start:
        yield "Warning", f"{name} did not learn: loss {course}. Lower learning_rate, or raise steps"
