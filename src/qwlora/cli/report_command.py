"""`qwlora report`: rebuild the reports of jobs, and compare jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwlora.errors import DirectoryError

Jobs = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Job directories.")]
Page = Annotated[
    Path,
    typer.Option(
        "--out", help="The page that compares several jobs. It replaces an older one of qwlora."
    ),
]


def report(jobs: Jobs, out: Page = Path("comparison.html")) -> None:
    """Rebuild report.html of jobs; compare several.

    `qwlora run` keeps report.html up to date by itself. Rebuild it after files or the recipe
    changed: results that no longer belong to them are left out. For several jobs, also writes a
    page that shows them side by side.
    """
    from qwlora.pipeline.results.job_report import PAGE_MARK, rebuild_reports

    if len(jobs) > 1 and out.exists() and PAGE_MARK not in _beginning(out):
        raise DirectoryError(f"{str(out)!r} exists and is not a page of qwlora. Give another --out")
    for path in rebuild_reports(jobs, out if len(jobs) > 1 else None):
        print(path)


def _beginning(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(2000)
    except OSError:
        return ""
