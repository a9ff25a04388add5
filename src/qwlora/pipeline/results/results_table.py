"""What the console shows of a job: the results table at the end of a run, and one adapter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qwlora.errors import DirectoryError, size, suggestion
from qwlora.pipeline.plan.stale_stages import run_line
from qwlora.pipeline.results.results import REPORT, read_job
from qwlora.report.verdict import verdict
from qwlora.targets.proof.checks import Check, shown

Row = tuple[str, str]

# The kinds of models that are measured, and their words in the table; all but the first two are of
# an adapter.
_KINDS = {
    "float": "float model",
    "base": "frozen base",
    "imported": "float model, imported",
    "reference": "float LoRA",
    "adapted": "after adapter",
    "simulated": "simulated, adapter",
}


def print_summary(results: dict[str, Any], console: Console) -> None:
    """Print perplexity, sizes, times and parity, as far as they were measured."""
    table = Table(
        title=results["recipe"], show_header=False, title_justify="left", box=None, pad_edge=False
    )
    for row in result_rows(results):
        table.add_row(*row)
    console.print()
    console.print(table)


def closing_lines(out: Path) -> list[str]:
    """The last lines of a run: the report's verdict, where the report is, and what to do next."""
    job = read_job(out)
    ruling = verdict(job)
    lines = [f"verdict  {ruling.kind.label}. {ruling.sentence}", f"report   {out / REPORT}"]
    if job.state == "incomplete":
        lines.append(f"next     {run_line(out)}")
    elif job.state == "finished":
        lines.append(f"next     {shlex.join(['qwlora', 'generate', str(out), 'a prompt'])}")
    return lines


def result_rows(results: dict[str, Any]) -> Iterator[Row]:
    """The rows of the table: what was measured, and its value."""
    perplexity = results.get("perplexity", {})
    if results.get("trust_remote_code"):
        yield "trust_remote_code", "true: Python code from the model's folder was run"
    for what, value in _by_model(perplexity):
        yield f"perplexity, {what}", f"{value:.3f}"
    for text, measured in perplexity.get("on", {}).items():
        models = {kind: measured[kind] for kind in ("float", "base") if kind in measured}
        values = (models | measured.get("adapted", {})).items()
        shown_values = ", ".join(f"{model} {value:.3f}" for model, value in values)
        yield f"perplexity on the text of {text}", shown_values
    yield from base_costs(results)
    reference = results.get("reference", {})
    for what, ratio in _by_model(reference.get("perplexity_ratio", {})):
        yield f"over float LoRA, {what}", _with_error(ratio["value"] - 1, ratio["stderr"], "+.1%")
    for origin, compared in (("float", results), ("float LoRA", reference)):
        agreements = dict(_by_model(compared.get("top1", {})))
        for what, kl in _by_model(compared.get("kl", {})):
            divergence = _with_error(kl["mean"], kl["stderr"], ".4f")
            share = _with_error(agreements[what]["share"], agreements[what]["stderr"], ".2%")
            yield f"KL from {origin}, {what}", f"{divergence}, same likeliest token {share}"
    if base := results.get("base"):
        yield (
            "base",
            f"{size(base['bytes'])} packed, {base['bits_per_weight']:.2f} bits per weight, "
            f"fingerprint {base['fingerprint'][:16]}",
        )
        if "float_weights" in base:
            yield (
                "",
                f"{base['weights']:,} weights packed, {base['float_weights']:,} left float "
                "(embeddings, norms, biases)",
            )
        if "second_rounding" in base:
            yield "warning", base["second_rounding"]
    for name, train in results.get("train", {}).items():
        yield from _training_rows(name, train, perplexity)
    for target, adapters in results.get("export", {}).items():
        for name, export in adapters.items():
            yield f"size, {target} {name}", size(export["bytes"])
    verdicts = list[Row]()
    for target, adapters in results.get("parity", {}).items():
        for name, parity in adapters.items():
            outcome = "PASS"
            if "not_run" in parity:
                outcome = f"written, not run: {parity['not_run']}"
            else:
                yield from _parity_rows(f"{target} {name}", parity)
                if problems := parity.get("problems"):
                    outcome = f"FAIL: {'; '.join(problems)}"
            verdicts.append((f"verdict, {target} {name}", outcome))
    yield from verdicts
    seconds = {verb: stage["seconds"] for verb, stage in results["stages"].items()}
    parts = ", ".join(f"{verb} {s:.0f}" for verb, s in seconds.items())
    yield "seconds", f"{parts}; total {sum(seconds.values()):.0f}"


def base_costs(results: dict[str, Any]) -> Iterator[Row]:
    """What the base costs on texts other than its own, such as that of an adapter added later: a
    base keeps the calibration that it has."""
    for text, ratio in results.get("perplexity_ratio", {}).get("on", {}).items():
        over = _with_error(ratio["base"]["value"] - 1, ratio["base"]["stderr"], "+.1%")
        kl = results["kl"]["on"][text]["base"]
        divergence = _with_error(kl["mean"], kl["stderr"], ".4f")
        yield f"base on the text of {text}", f"{over} perplexity over float, KL {divergence}"


def _by_model(figures: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What was measured of each model, with the model's words."""
    for kind, what in _KINDS.items():
        if kind in ("float", "base"):
            yield from [(what, figures[kind])] if kind in figures else []
        else:
            yield from ((f"{what} {name}", value) for name, value in figures.get(kind, {}).items())


def _with_error(value: float, error: float | None, written: str) -> str:
    return f"{value:{written}}" + ("" if error is None else f" ± {error:{written.lstrip('+')}}")


def _parity_rows(name: str, parity: dict[str, Any]) -> Iterator[Row]:
    """How closely a runtime agrees with the simulation or with the trained model."""
    yield (
        f"parity {name}",
        f"perplexity {shown(parity, 'perplexity', '.3f')} in the runtime, "
        f"{shown(parity, 'reference_perplexity', '.3f')} {parity['of']} "
        f"({parity['sequences']} sequences, {parity['tokens']:,} tokens)",
    )
    checks = [Check(**fields) for fields in parity["checks"]]
    closest = max(checks, key=lambda check: check.share_of_limit)
    yield "", f"{len(checks)} checks; closest to its limit: {closest.sentence}"
    if "shipped_top1_agreement" in parity:
        yield (
            "",
            f"with the runtime's own settings: perplexity "
            f"{shown(parity, 'shipped_perplexity', '.3f')}, same likeliest token "
            f"{parity['shipped_top1_agreement']:.2%}",
        )


def _training_rows(name: str, train: dict[str, Any], perplexity: dict[str, Any]) -> Iterator[Row]:
    """Steps, loss and costs of one adapter, its gain on held-out text, and warnings."""
    in_what = f" in {train['compute']}" if train["steps"] and "compute" in train else ""
    losses = train.get("losses") or []
    course, part = "", max(1, len(losses) // 5)
    if losses:
        start, end = (sum(p) / part for p in (losses[:part], losses[-part:]))
        course = f", loss {start:.3f} to {end:.3f}" + (f" (means of {part})" if part > 1 else "")
    yield f"training {name}", f"{train['steps']} steps{in_what}{course}"
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
            yield "warning", f"{name} is no better than the base on held-out text"
    if len(losses) > 1 and end >= start:
        yield (
            "warning",
            f"{name} did not learn: its loss went from {start:.3f} to {end:.3f} (means of {part} "
            "steps). Try a lower learning_rate, or more steps",
        )


def adapter_card(folder: Path, name: str) -> dict[str, Any]:
    """The parts of a job's results that concern an adapter, and the bytes of its weights."""
    job = read_job(folder)
    results, train = job.results, job.section("train")
    if name not in train:
        raise DirectoryError(
            f"{str(folder)!r} has no trained adapter {name!r}{suggestion(name, list(train))}"
        )
    perplexities = {kind: job.perplexity(kind, name) for kind in _KINDS}
    weights = folder / "adapters" / name / "adapter_model.safetensors"
    return {
        "name": name,
        "base": job.get("base", "fingerprint"),
        "train": train[name],
        "data": results.get("texts", {}).get(name, results.get("data")),
        "perplexity": {k: v for k, v in perplexities.items() if v is not None},
        "on": {
            text: measured["adapted"][name]
            for text, measured in job.section("perplexity", "on").items()
            if name in measured.get("adapted", {})
        },
        "bytes": weights.stat().st_size if weights.is_file() else None,
    }


def card_lines(card: dict[str, Any]) -> list[str]:
    """The card as text."""
    name, train, perplexity = card["name"], card["train"], card["perplexity"]
    rows: list[Row] = [("base", (card["base"] or "unknown")[:16])]
    rows += [
        (key, json.dumps(value) if isinstance(value, dict | list) else str(value))
        for key, value in train.get("settings", {}).items()
    ]
    if card["data"]:
        counts = card["data"]["train"]
        rows.append(
            ("text", f"{counts['documents']:,} documents, {counts['tokens']:,} tokens to train on")
        )
    rows += _training_rows(name, train, {})
    rows += [(f"perplexity, {kind}", f"{v:.3f}") for kind, v in perplexity.items()]
    rows += [(f"on the text of {text}", f"{value:.3f}") for text, value in card["on"].items()]
    rows += [] if card["bytes"] is None else [("size", size(card["bytes"]))]
    width = max(len(key) for key, _ in rows)
    return [name, *(f"  {key:{width}}  {value}" for key, value in rows)]
