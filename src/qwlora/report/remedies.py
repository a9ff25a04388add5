"""What to do about a failed job."""

from __future__ import annotations

from markupsafe import Markup

from qwlora.report.number_format import count, significant
from qwlora.report.results_view import BASE, Job, code, is_of_perplexity, without_folders


def remedies(job: Job) -> list[str | Markup]:
    """What to do about a failed job, most likely first."""
    found: list[str | Markup] = []
    for target in job.targets:
        for name in (*job.adapters, BASE):
            parity = job.section("parity", target, name)
            if parity.get("passed") is not False:
                continue
            sequences = job.number("parity", target, name, "sequences")
            row = job.perplexity_row(target, name)
            is_close = row is not None and _is_close(job, target, name)
            if row is not None and is_close and sequences is not None and sequences < 8:
                found.append(
                    Markup(
                        "<b>Test on more text.</b> {} sequences are few for a limit of {}. Set {} "
                        "to 8 and run the same command. Finished stages are skipped."
                    ).format(
                        count(sequences),
                        row.shown_limit,
                        code("verify.sequences"),
                    )
                )
            if (steps := job.number("parity", target, name, "worst_layer_steps")) is not None:
                found.append(
                    Markup(
                        "<b>Look at the worst layer</b> under Runtimes: {}, {} steps off. A broken "
                        "layer shows as many steps, not as a small drift."
                    ).format(code(str(parity.get("worst_layer") or "unknown")), significant(steps))
                )
            found.append(
                Markup("<b>Do not use</b> the files in {} until the check has passed.").format(
                    code(f"export/{target}/{name}")
                )
            )
    if not found:
        recorded = job.get("error", "remedy")
        listed_ = recorded if isinstance(recorded, list) else [recorded] if recorded else []
        found += [without_folders(str(line)) for line in listed_]
    return found


def remedy_command(job: Job) -> str:
    """The command to run after a failure."""
    close = [
        (target, name)
        for target in job.targets
        for name in (*job.adapters, BASE)
        if job.get("parity", target, name, "passed") is False
        and _is_close(job, target, name)
        and (job.number("parity", target, name, "sequences") or 8) < 8
    ]
    return f"{job.command} --set verify.sequences=8" if close else job.command


def _is_close(job: Job, target: str, adapter: str) -> bool:
    """Whether only the perplexity is off, which a small sample explains."""
    failed = [row for row in job.proof_rows(target, adapter) if not row.passed]
    return bool(failed) and all(is_of_perplexity(row) for row in failed)
