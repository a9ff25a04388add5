"""How do I get this again? The command, what identifies the base, versions, the recipe."""

from __future__ import annotations

from markupsafe import Markup

from qwlora.errors import size
from qwlora.report.number_format import NOT_MEASURED
from qwlora.report.results_view import Job, without_folders
from qwlora.report.sections import View, section

NOT_RECORDED = Markup('<span class="nm">not recorded</span>')


@section("reproduce", "Reproduce", "How do I get this again?", position=110, of_job=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    text = without_folders(job.recipe_text)
    source, seed = job.setting("model", "source"), job.setting("seed")
    versions, machine = job.section("run", "versions"), job.section("run", "machine")
    cores, memory = machine.get("cores"), machine.get("memory_bytes")
    hardware = (
        machine.get("processor") or machine.get("architecture"),
        cores and f"{cores} cores",
        memory and f"{size(memory)} memory",
        machine.get("system"),
    )
    times = {key.capitalize(): str(job.get("run", key) or "") for key in ("started", "finished")}
    return {
        "command": without_folders(job.command),
        "codes": {
            "Base fingerprint": job.get("base", "fingerprint") or NOT_MEASURED,
            "Model": without_folders(str(source)) if source else "",
        },
        "facts": {
            "Seed": "" if seed is None else str(seed),
            "Versions": ", ".join(map(" ".join, versions.items())) or NOT_RECORDED,
            "Machine": ", ".join(str(part) for part in hardware if part) or NOT_RECORDED,
            **{k: t.replace("T", " ").replace("+00:00", " UTC") for k, t in times.items()},
        },
        "recipe": text,
        "lines": len(text.splitlines()),
    }
