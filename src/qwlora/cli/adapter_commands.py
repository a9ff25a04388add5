"""`qwlora adapters`: list adapters, and check their files and the base they were trained on.

No model is loaded.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qwlora import strict_json

if TYPE_CHECKING:
    from qwlora.adapter.adapter_check import AdapterReport

app = typer.Typer(
    help="List and check adapters, of a job or from PEFT.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="A job's directory, a folder of adapters, or the folder of one adapter.",
        show_default=False,
    ),
]


@app.command("list")
def list_adapters(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """List each adapter's type, size and base. Exit code 2 if one cannot be read."""
    from qwlora.adapter.adapter_check import (
        AdapterReport,
        adapter_report,
        find_adapters,
        job_fingerprint,
    )
    from qwlora.errors import QwloraError, SourceError

    base, found, unreadable = job_fingerprint(folder), list[AdapterReport](), list[str]()
    for adapter in find_adapters(folder):
        try:
            found.append(adapter_report(adapter, folder))
        except QwloraError as error:
            unreadable.append(str(error))
    if as_json:
        print(strict_json.dumps({"base": base, "adapters": [asdict(f) for f in found]}, indent=1))
    elif found:
        _print(found, base)
    if unreadable:
        raise SourceError("\n".join(unreadable))


def _print(found: list[AdapterReport], base: str | None) -> None:
    table = Table(
        "adapter", "kind", "rank", "alpha", "layers", "parameters", "base", box=None, pad_edge=False
    )
    for f in found:
        other = " (a different base)" if base not in (None, f.base) else ""
        whose = "unknown" if f.base is None else f"{f.base[:16]}{other}"
        table.add_row(
            f.name, f.kind, str(f.rank), str(f.alpha), str(f.modules), f"{f.parameters:,}", whose
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    if base is not None:
        print(f"base {base[:16]}")


@app.command()
def check(
    folder: Folder,
    needs_base: Annotated[
        bool,
        typer.Option(
            "--needs-base", help="Also fail (exit code 1) if an adapter does not record its base."
        ),
    ] = False,
) -> None:
    """Check the files of every adapter and its base.

    Every adapter must be present, unmodified, finite, and trained on this base.

    Exit code 2 if a file was modified after it was saved, 1 for any other problem.
    An adapter that does not record its base passes, unless --needs-base is given.
    """
    from qwlora.adapter.adapter_check import (
        changed_files,
        find_adapters,
        is_verifiable,
        job_fingerprint,
        problems,
        records_base,
    )
    from qwlora.errors import SourceError
    from qwlora.pipeline.directory import Directory
    from qwlora.pipeline.run_job import command_line

    base, missing = job_fingerprint(folder), Directory.read(folder).missing_adapters()
    wrong, changed = len(missing), 0
    for name in missing:
        print(
            f"adapters/{name}: this job trained it, but the folder is missing. Train it again: "
            f"{command_line('train', folder)}"
        )
    try:
        adapters = find_adapters(folder)
    except SourceError:
        if not missing:
            raise
        adapters = []
    for adapter in adapters:
        found = problems(adapter, base, "refuse" if needs_base else "accept")
        wrong += bool(found)
        changed += bool(changed_files(adapter))
        good = "good"
        if not records_base(adapter):
            good += "; does not record its base"
        elif not base:
            good += "; no base here to compare with"
        if not is_verifiable(adapter):
            good += "; unverified (no digests of its files)"
        print(f"{adapter.relative_to(folder)}: {'; '.join(found) or good}")
    if changed:
        raise SystemExit(2)
    if wrong:
        raise SystemExit(1)
