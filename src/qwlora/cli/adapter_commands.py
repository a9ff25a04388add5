"""`qwlora adapters`: what adapters are in a folder, and whether they are whole and belong to the base beside them. No model is loaded."""

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
    help="List and check the adapters of a job, or any PEFT adapters.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="A job's directory, a folder of adapters, or one adapter.",
        show_default=False,
    ),
]


@app.command("list")
def list_adapters(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Show each adapter's kind, size and base; exit 2 when one cannot be read."""
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
        whose = (
            "does not say"
            if f.base is None
            else f.base[:16] + ("" if base in (None, f.base) else " (another)")
        )
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
            "--needs-base", help="Exit 1 too when one does not say which base it was trained on."
        ),
    ] = False,
) -> None:
    """Check that each adapter is there, unchanged since it was saved, finite, and trained on the
    base next to it (if it says on which). Exit 2 when a file was changed, 1 on other problems."""
    from qwlora.adapter.adapter_check import (
        changed_files,
        find_adapters,
        is_verifiable,
        job_fingerprint,
        problems,
        says_base,
    )
    from qwlora.errors import SourceError
    from qwlora.pipeline.directory import Directory
    from qwlora.pipeline.run_job import command_line

    base, missing = job_fingerprint(folder), Directory.read(folder).missing_adapters()
    wrong, changed = len(missing), 0
    for name in missing:
        print(
            f"adapters/{name}: missing, and was trained here; train it again: {command_line('train', folder)}"
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
        good = (
            "good; says no base"
            if not says_base(adapter)
            else "good"
            if base
            else "good; no base is here to compare with"
        )
        if not is_verifiable(adapter):
            good += "; unverified (no digests of its files)"
        print(f"{adapter.relative_to(folder)}: {'; '.join(found) or good}")
    if changed:
        raise SystemExit(2)
    if wrong:
        raise SystemExit(1)
