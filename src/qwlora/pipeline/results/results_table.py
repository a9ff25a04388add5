"""The results table that is printed at the end of a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qwlora.export.proof.checks import Check, shown
from qwlora.messages import size


def print_summary(results: dict[str, Any], console: Console) -> None:
    """Print perplexity, sizes, times and parity, as far as they were measured."""
    table = Table(
        title=f"{results['recipe']}",
        show_header=False,
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for row in _rows(results):
        table.add_row(*row)
    console.print()
    console.print(table)


def closing_lines(out: Path) -> list[str]:
    """The last lines of a run: the report's verdict, where the report is, and what to do next."""
    from qwlora.pipeline.results.job_files import REPORT
    from qwlora.pipeline.results.job_report import read_job
    from qwlora.report.verdict import verdict

    job = read_job(out)
    found = verdict(job)
    lines = [f"verdict  {found.kind.label}. {found.sentence}", f"report   {out / REPORT}"]
    if job.state == "incomplete":
        command = ["qwlora", "run", str(out / "recipe.yaml"), "--out", str(out)]
        lines.append(f"next     {shlex.join(command)}")
    elif job.state == "finished":
        lines.append(f"next     {shlex.join(['qwlora', 'generate', str(out), 'a prompt'])}")
    return lines


Row = tuple[str, str]

# The kinds of models that adapters are measured on, and their words in the table.
_KINDS = (
    ("imported", "float model, imported"),
    ("adapted", "after adapter"),
    ("simulated", "simulated, adapter"),
)


def _rows(results: dict[str, Any]) -> list[Row]:
    perplexity = results.get("perplexity", {})
    rows: list[Row] = []
    if results.get("trust_remote_code"):
        rows.append(("trust_remote_code", "true: Python code from the model's folder was run"))
    rows += _perplexity_rows(perplexity)
    rows += _divergence_rows(results)
    if "base" in results:
        rows += _base_rows(results["base"])
    for name, train in results.get("train", {}).items():
        rows += _training_rows(name, train, perplexity)
    for target, adapters in results.get("export", {}).items():
        rows += [
            (f"size, {target} {name}", size(export["bytes"])) for name, export in adapters.items()
        ]
    parity = [
        (f"{target} {name}", found)
        for target, adapters in results.get("parity", {}).items()
        for name, found in adapters.items()
    ]
    for name, found in parity:
        rows += _parity_rows(name, found) if "not_run" not in found else []
    rows += [(f"verdict, {name}", _verdict(found)) for name, found in parity]
    seconds = {verb: stage["seconds"] for verb, stage in results["stages"].items()}
    each = ", ".join(f"{verb} {s:.0f}" for verb, s in seconds.items())
    rows.append(("seconds", f"{each}; total {sum(seconds.values()):.0f}"))
    return rows


def _perplexity_rows(perplexity: dict[str, Any]) -> list[Row]:
    rows = [
        (f"perplexity, {what}", f"{perplexity[kind]:.3f}")
        for kind, what in (("float", "float model"), ("base", "frozen base"))
        if kind in perplexity
    ]
    for kind, what in _KINDS:
        rows += [
            (f"perplexity, {what} {name}", f"{value:.3f}")
            for name, value in perplexity.get(kind, {}).items()
        ]
    for text, measured in perplexity.get("on", {}).items():
        models = {
            **{kind: measured[kind] for kind in ("float", "base") if kind in measured},
            **measured.get("adapted", {}),
        }
        found = ", ".join(f"{model} {value:.3f}" for model, value in models.items())
        rows.append((f"perplexity on the text of {text}", found))
    return rows


def _base_rows(base: dict[str, Any]) -> list[Row]:
    rows = [
        (
            "base",
            f"{size(base['bytes'])} packed, {base['bits_per_weight']:.2f} bits per weight, "
            f"fingerprint {base['fingerprint'][:16]}",
        )
    ]
    if "float_weights" in base:
        rows.append(
            (
                "",
                f"{base['weights']:,} weights packed, {base['float_weights']:,} left float "
                "(embeddings, norms, biases)",
            )
        )
    if "second_rounding" in base:
        rows.append(("warning", base["second_rounding"]))
    return rows


def _verdict(parity: dict[str, Any]) -> str:
    if "not_run" in parity:
        return f"written, not run: {parity['not_run']}"
    problems = parity.get("problems", [])
    return f"FAIL: {'; '.join(problems)}" if problems else "PASS"


def _parity_rows(name: str, parity: dict[str, Any]) -> list[Row]:
    """How closely a runtime agrees with the simulation or with the trained model."""
    row = (
        f"perplexity {shown(parity, 'perplexity', '.3f')} in the runtime, "
        f"{shown(parity, 'reference_perplexity', '.3f')} {parity['of']} "
        f"({parity['sequences']} sequences, {parity['tokens']:,} tokens)"
    )
    rows = [(f"parity {name}", row)]
    checks = [Check(**fields) for fields in parity["checks"]]
    closest = max(checks, key=lambda check: check.share_of_limit)
    rows.append(("", f"{len(checks)} checks; closest to its limit: {closest.sentence}"))
    if "shipped_top1_agreement" in parity:
        rows.append(
            (
                "",
                f"with the runtime's own settings: perplexity "
                f"{shown(parity, 'shipped_perplexity', '.3f')}, same likeliest token "
                f"{parity['shipped_top1_agreement']:.2%}",
            )
        )
    return rows


def _divergence_rows(results: dict[str, Any]) -> list[Row]:
    """How far each model's next-token distribution is from the float model's."""
    divergences, agreements = results.get("kl", {}), results.get("top1", {})
    models = [("frozen base", divergences, agreements, "base")] if "base" in divergences else []
    for kind, what in _KINDS:
        models += [
            (f"{what} {name}", divergences[kind], agreements[kind], name)
            for name in divergences.get(kind, {})
        ]
    rows = []
    for what, kl, top1, key in models:
        divergence = _with_error(kl[key]["mean"], kl[key]["stderr"], ".4f")
        share = _with_error(top1[key]["share"], top1[key]["stderr"], ".2%")
        rows.append((f"KL from float, {what}", f"{divergence}, same likeliest token {share}"))
    return rows


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form}}"


def _training_rows(name: str, train: dict[str, Any], perplexity: dict[str, Any]) -> list[Row]:
    """Steps, loss and costs of one adapter, its gain on held-out text, and warnings."""
    in_what = f" in {train['compute']}" if train["steps"] and "compute" in train else ""
    losses = train.get("losses") or []
    course, part = "", max(1, len(losses) // 5)
    if losses:
        start, end = (sum(p) / part for p in (losses[:part], losses[-part:]))
        course = f", loss {start:.3f} to {end:.3f}" + (f" (means of {part})" if part > 1 else "")
    rows = [
        (f"training {name}", f"{train['steps']} steps{in_what}{course}"),
        (
            "",
            f"{train['step_seconds']:.2f} s per step, peak memory "
            f"{size(train['peak_rss_bytes'])}, {train['trainable_parameters']:,} parameters",
        ),
    ]
    after = perplexity.get("adapted", {}).get(name)
    own = perplexity.get("on", {}).get(train.get("text"), perplexity)
    before = own.get("base")
    if after is not None and before is not None:
        change = after / before - 1
        rows.append(("", f"held-out perplexity {before:.3f} to {after:.3f} ({change:+.1%})"))
        if change >= 0:
            rows.append(("warning", f"{name} is no better than the base on held-out text"))
    if len(losses) > 1 and end >= start:
        rows.append(
            (
                "warning",
                f"{name} did not learn: its loss went from {start:.3f} to {end:.3f} (means of "
                f"{part} steps). Try a lower learning_rate, or more steps",
            )
        )
    return rows
