"""What to do about a failed job."""

from __future__ import annotations

from markupsafe import Markup

from qwlora.report.checks import Outcome, proof_checks
from qwlora.report.job import BASE, Job, code, without_folders
from qwlora.report.written_numbers import count, precise_percent, significant


def remedies(job: Job) -> list[str | Markup]:
    """What to do about a failed job, most likely first."""
    found: list[str | Markup] = []
    for target in job.targets:
        for name in (*job.adapters, BASE):
            parity = job.section("parity", target, name)
            if parity.get("passed") is not False:
                continue
            sequences = job.number("parity", target, name, "sequences")
            if _is_close(job, target, name) and sequences is not None and sequences < 8:
                found.append(
                    Markup(
                        "<b>Test on more text.</b> {} sequences are few for a limit of {}. Set {} "
                        "to 8 and run the same command. Finished stages are skipped."
                    ).format(
                        count(sequences),
                        precise_percent(job.limit(target, name, "perplexity_difference") or 0),
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
    checks = list(proof_checks(job, target, adapter))
    failed = [str(c.what) for c in checks if c.outcome is Outcome.FAILED]
    return bool(failed) and all("Perplexity" in what for what in failed)
