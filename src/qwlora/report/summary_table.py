"""The tables at the end of a run: adapters, then key figures and checks of the report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from qwlora.errors import size
from qwlora.report.number_format import Format, perplexity, three_decimals
from qwlora.report.results_view import KINDS, REPORT, Job
from qwlora.report.sections.answers import answers_of
from qwlora.report.sections.key_figures import perplexity_tile, tiles
from qwlora.report.sections.training_course import course
from qwlora.report.verdict import Outcome, verdict

Row = tuple[str, str]


def print_summary(job: Job, out: Path, console: Console) -> None:
    """Print the tables of the job in `out`, then the verdict, the report's path and the next
    command."""
    rows = adapter_rows(job)
    plain: dict[str, Any] = {"box": None, "pad_edge": False}
    adapters = Table(*(rows or [{}])[0], title=job.title, title_justify="left", **plain)
    for row in rows:
        adapters.add_row(*row.values())
    table = Table(show_header=False, **plain)
    for pair in summary_rows(job):
        table.add_row(*pair)
    console.print("", adapters, "", table, sep="\n")
    ruling = verdict(job)
    lines = [f"verdict  {ruling.kind.label}. {ruling.sentence}", f"report   {out / REPORT}"]
    if job.state == "incomplete":
        lines.append(f"next     {shlex.join(['qwlora', 'run', str(out)])}")
    elif job.state == "finished":
        lines.append(f"next     {shlex.join(['qwlora', 'generate', str(out), 'a prompt'])}")
    print("", *lines, sep="\n")


def adapter_rows(job: Job) -> list[dict[str, str]]:
    """A row for each adapter, by column."""
    rows = []
    for name in job.adapters:
        run, kind = course(job, name), job.final_kind(name) or "adapted"
        losses = "" if run is None else _to(three_decimals, run.start, run.means[-1])
        kinds = ("float", "base", kind) if job.perplexity("float", name) else ("base", kind)
        ends = (job.perplexity(k, name) for k in kinds)
        exported = {target: job.number("export", target, name, "bytes") for target in job.targets}
        sizes = {"adapter": job.number("sizes", f"adapters/{name}"), **exported}
        rows.append(
            {
                "adapter": name,
                "training loss": job.origin(name) if run is None else losses,
                "perplexity": _to(perplexity, *ends),
                "change": _plain(perplexity_tile(job, name).note),
                "files": ", ".join(f"{what} {size(n)}" for what, n in sizes.items() if n),
            }
        )
    return rows


def _to(written: Format, *values: float | None) -> str:
    return " to ".join("?" if value is None else written(value) for value in values)


def summary_rows(job: Job) -> Iterator[Row]:
    """The rows of the second table, with the failed checks and the number of passed ones."""
    if job.get("trust_remote_code"):
        yield "trust_remote_code", "true: Python code from the model's folder was run"
    for tile in tiles(job):
        if tile.value is not None:
            figure = f"{_plain(tile.value)} {tile.unit}".strip()
            yield tile.label, "; ".join(filter(None, (figure, _plain(tile.note))))
    if base := job.section("base"):
        yield (
            "Packed base",
            f"{size(base['bytes'])}, {base['bits_per_weight']:.2f} bits per weight, "
            f"fingerprint {base['fingerprint'][:16]}",
        )
    for target, parts in job.section("export").items():
        for name, part in parts.items():
            if (bits := part.get("bits_per_weight")) is not None:
                yield f"{target}/{name}", f"{size(part['bytes'])}, {bits:.2f} bits per weight"
    for name, train in job.section("train").items():
        yield from _training_rows(job, name, train)
    for text, caution in job.data_cautions():
        yield "Data caution", f"{text}: {caution}" if text else caution
    evidence = verdict(job).evidence
    for item in evidence:
        if item.outcome is not Outcome.PASSED:
            limit = f" ({item.limit})" if item.limit else ""
            yield item.outcome.word, f"{_plain(item.what)}: {_plain(item.value)}{limit}"
    if passed := sum(item.count for item in evidence if item.outcome is Outcome.PASSED):
        yield "Passed", f"{passed} check{'s' * (passed > 1)}"
    seconds = {verb: stage["seconds"] for verb, stage in job.section("stages").items()}
    parts = ", ".join(f"{verb} {s:.0f}" for verb, s in seconds.items())
    yield "Seconds", f"{parts}; total {sum(seconds.values()):.0f}"


def answer_lines(job: Job, most: int = 2) -> Iterator[str]:
    """Held-out prompts, answered by the base and by each adapter."""
    for name in job.adapters:
        for prompt, answers in islice(answers_of(job, name).items(), most):
            yield f"\nprompt   {prompt}"
            for label, kind in (("base", "base"), (name, "adapted")):
                if (answer := answers.get(KINDS[kind])) is not None:
                    yield f"{label:8} {answer}"


def _plain(text: str | Markup) -> str:
    return text.striptags() if isinstance(text, Markup) else text


def base_costs(results: dict[str, Any]) -> Iterator[Row]:
    """The loss of the base on texts that it was not calibrated on."""
    # A base keeps its calibration when an adapter with other text is added.
    for text, ratio in results.get("perplexity_ratio", {}).get("on", {}).items():
        over = _with_error(ratio["base"]["value"] - 1, ratio["base"]["stderr"], "+.1%")
        kl = results["kl"]["on"][text]["base"]
        divergence = _with_error(kl["mean"], kl["stderr"], ".4f")
        yield f"base on the text of {text}", f"{over} perplexity over float, KL {divergence}"


def _with_error(value: float, error: float | None, written: str) -> str:
    return f"{value:{written}}" + ("" if error is None else f" ± {error:{written.lstrip('+')}}")


def _training_rows(job: Job, name: str, train: dict[str, Any]) -> Iterator[Row]:
    origin = job.origin(name)
    parameters = f"{train['trainable_parameters']:,} parameters"
    if origin == "trained":
        in_what = f" in {train['compute']}" if "compute" in train else ""
        in_what = (f" = {train['epochs']:.2g} epochs" if "epochs" in train else "") + in_what
        speed = f"{train['step_seconds']:.2f} s per step"
        memory = f"peak memory {size(train['peak_rss_bytes'])}"
        steps = f"{train['steps']} step{'s' * (train['steps'] != 1)}"
        if after := train.get("resumed_from_step"):
            steps += f" (resumed after {after})"
        parameters = f"{steps}{in_what}, {speed}, {memory}, {parameters}"
    title = "Training" if origin == "trained" else origin.capitalize()
    yield f"{title} {name}", parameters
    change = job.change("adapted", "base", name)
    if change is not None and change >= 0 and origin != "untrained":
        yield "Warning", f"{name} is no better than the base on held-out text"
