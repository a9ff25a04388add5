"""How do I get this again? The command, what identifies base and adapter, versions, the recipe."""

from __future__ import annotations

from markupsafe import Markup

from qwlora.report.number_format import size
from qwlora.report.results_view import NOT_MEASURED, Job, without_folders
from qwlora.report.section import Section, View


def view(job: Job, adapter: str | None) -> View | None:
    """What the template draws."""
    text = without_folders(job.recipe_text)
    return {
        "command": without_folders(job.command),
        "facts": _facts(job),
        "recipe": text,
        "lines": len(text.splitlines()),
    }


def _facts(job: Job) -> list[tuple[str, Markup | str, bool]]:
    """Label, value, and whether it is in the typeface of code."""
    facts: list[tuple[str, Markup | str, bool]] = []
    facts.append(("Base fingerprint", str(job.get("base", "fingerprint") or NOT_MEASURED), True))
    facts += [
        (f"Adapter {name}", str(fingerprint), True)
        for name in job.adapters
        if (fingerprint := job.get("train", name, "fingerprint"))
    ]
    if source := job.setting("model", "source"):
        facts.append(("Model", without_folders(str(source)), True))
    if (seed := job.setting("seed")) is not None:
        facts.append(("Seed", str(seed), False))
    versions = job.section("run", "versions")
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    recorded = Markup('<span class="nm">not recorded</span>')
    facts.append(("Versions", words or recorded, False))
    machine = job.section("run", "machine")
    memory = machine.get("memory_bytes")
    parts = [
        str(machine.get("processor") or machine.get("architecture") or ""),
        f"{machine['cores']} cores" if machine.get("cores") else "",
        f"{size(memory)} memory" if memory else "",
        str(machine.get("system") or ""),
    ]
    facts.append(("Machine", ", ".join(p for p in parts if p) or recorded, False))
    for key, label in (("started", "Started"), ("finished", "Finished")):
        if time := job.get("run", key):
            facts.append((label, str(time).replace("T", " ").replace("+00:00", " UTC"), False))
    return facts


SECTION = Section("reproduce", "Reproduce", "How do I get this again?", "reproduction.html", view)
