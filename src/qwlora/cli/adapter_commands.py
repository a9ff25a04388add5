"""`qwlora adapters`: add, import, list, rename, remove, rebase and check the adapters of a job.

Only `rebase` loads a model.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qwlora.cli.shared_arguments import AsJson, Changes, Job, Name, Yes
from qwlora.cli.terminal import ProgressDisplay, print_json, print_result, table
from qwlora.pipeline.store import Store

app = typer.Typer(
    help="Add, import, list, rename, remove, rebase and check adapters.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A job, a folder of adapters, or one adapter."),
]


@app.command("list")
def list_adapters(folder: Folder, as_json: AsJson = False) -> None:
    """List each adapter's type, size and base.

    Marks adapters of another base. Exit code 2 if one cannot be read.
    """
    from qwlora.adapter.adapter_files import adapter_report, find_adapters, job_fingerprint
    from qwlora.errors import QwloraError, SourceError
    from qwlora.pipeline.job import OpenJob, command_line

    planned = list[str]()
    if (folder / "recipe.yaml").is_file():
        job = OpenJob(folder)
        _ = job.judge  # moves the folders of adapters that were renamed in the recipe
        places = (f"adapters/{adapter.name}" for adapter in job.recipe.adapters)
        planned = [place for place in places if not (folder / place).is_dir()]
    base, reports, unreadable = job_fingerprint(folder), [], list[str]()
    for adapter in find_adapters(folder, may_be_none=bool(planned)):
        try:
            reports.append(adapter_report(adapter, folder))
        except QwloraError as error:
            unreadable.append(str(error))
    rows = [("adapter", "kind", "rank", "alpha", "layers", "parameters", "base")]
    for report in reports:
        note = " (a different base)" if base not in (None, report.base) else ""
        trained_on = "unknown" if report.base is None else f"{report.base[:16]}{note}"
        sizes = (str(report.rank), str(report.alpha), str(report.modules))
        rows.append((report.name, report.kind, *sizes, f"{report.parameters:,}", trained_on))
    lines = [*table(rows), *([f"base {base[:16]}"] if base else [])] if reports else []
    lines += [f"{p}: not trained yet. Train it: {command_line('run', folder)}" for p in planned]
    record = {"base": base, "adapters": [asdict(report) for report in reports], "planned": planned}
    print_result(record, lines, as_json)
    if unreadable:
        raise SourceError("\n".join(unreadable))


@app.command()
def check(
    folder: Folder,
    needs_base: Annotated[
        bool,
        typer.Option("--needs-base", help="Also fail if an adapter does not record its base."),
    ] = False,
) -> None:
    """Check the files of every adapter and its base.

    Exit code 2 if a file was modified, 1 for any other problem.
    """
    from qwlora.adapter.adapter_files import CONFIG, FILE, find_adapters, job_fingerprint, problems
    from qwlora.formats import manifest
    from qwlora.pipeline.job import OpenJob, command_line

    base, store, missing = job_fingerprint(folder), Store(folder), list[str]()
    if (folder / "recipe.yaml").is_file():
        judge = OpenJob(folder).judge
        done = [stage for stage in judge.plan if stage.place in judge.store.records]
        read = {need for stage in done for need in stage.needs.values()}
        trained = [s.adapter for s in judge.plan if s.kind == "train" and s.name in read]
        missing = [n for n in trained if n and not (folder / "adapters" / n / CONFIG).is_file()]
    for name in missing:
        print(
            f"adapters/{name}: this job trained it, but the folder is missing. Train it again: "
            f"{command_line('train', folder)}"
        )
    code = 1 if missing else 0
    for adapter in find_adapters(folder, may_be_none=bool(missing)):
        reasons = problems(adapter, base, "refuse" if needs_base else "accept")
        name = str(adapter.relative_to(folder))
        written = store.records[name].files if name in store.records else ()
        if lost := [file for file in sorted(written) if not (adapter / file).is_file()]:
            reasons.append(f"{', '.join(lost)}: written by this job, but missing")
        if reasons:
            code = 2 if manifest.changed_files(adapter, FILE) else max(code, 1)
        good = "good"
        if not (adapter / FILE).exists():
            good += "; does not record its base"
        elif not base:
            good += "; no base here to compare with"
        if not manifest.has_digests(adapter, FILE):
            good += "; unverified (no digests of its files)"
        print(f"{name}: {'; '.join(reasons) or good}")
    if code:
        raise SystemExit(code)


Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a key, such as steps=100 or data.held_out=0.1.",
    ),
]


@app.command()
def add(
    folder: Job,
    name: Annotated[str, typer.Option(help="Its name.")],
    data: Annotated[str | None, typer.Option(help="Its text, as data.source in a recipe.")] = None,
    like: Annotated[
        str | None, typer.Option(help="Adapter to copy settings from. Default: the first.")
    ] = None,
    changes: Settings = None,
) -> None:
    """Add an adapter to a job; the job's next run trains it."""
    from qwlora.pipeline.commands.manage_adapters import add_adapter

    add_adapter(folder, name, data, like, tuple(changes or ()))
    _print_added(folder, name, "Train it")


@app.command("import")
def import_(
    folder: Job,
    source: Annotated[str, typer.Argument(help="A folder of PEFT or mlx-lm, or a hub id.")],
    name: Annotated[str, typer.Option(help="Its name here.")],
    data: Annotated[
        str | None, typer.Option(help="Its text. Default: the recipe's data.source.")
    ] = None,
    continues: Annotated[
        bool, typer.Option("--continue", help="Train it on this base. Default: use it as it is.")
    ] = False,
    changes: Settings = None,
) -> None:
    """Add an adapter that was trained by PEFT or mlx-lm."""
    from qwlora.pipeline.commands.manage_adapters import import_adapter

    import_adapter(folder, name, source, data, continues, tuple(changes or ()))
    _print_added(folder, name, "Use it")


def _print_added(folder: Path, name: str, what_next: str) -> None:
    from qwlora.pipeline.job import command_line, job_recipe
    from qwlora.recipe.yaml_core import dump_yaml

    print(f"added {name} to {folder / 'recipe.yaml'}. {what_next}: {command_line('run', folder)}")
    added = job_recipe(folder).model_dump(mode="json", exclude_unset=True)
    fixed = added.get("base", {}).get("calibrate_on")
    base = {"base": {"calibrate_on": fixed}} if fixed else {}
    keys = dump_yaml({**base, "adapters": added["adapters"][-1:]})
    print(f"\nIf you keep your own recipe file, add this to it:\n\n{keys}", end="")


@app.command()
def rebase(
    folder: Annotated[Path, typer.Argument(help="The old job, which is only read.")],
    out: Annotated[Path, typer.Option(help="The new job's directory.")],
    steps: Annotated[int, typer.Option(min=0, help="Steps of training on the new base.")] = 30,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Move the adapters of a job to another base, and show what they lose.

    If the text of an adapter is gone, it is trained on text generated by the old model.
    """
    from qwlora.pipeline.commands.rebase import rebase, verdict
    from qwlora.pipeline.job import command_line
    from qwlora.pipeline.run import run

    with ProgressDisplay(as_json) as display:
        shown = partial(
            run, track=display.track, say=display.say, show_training=display.show_training
        )
        rows = rebase(folder, out, steps, shown, tuple(changes or ()), display.track)
    if as_json:
        print_json(rows)
        return
    head = ("perplexity", *next(iter(rows.values())), "")
    cells = [(n, *(f"{v:.2f}" for v in row.values()), verdict(row)) for n, row in rows.items()]
    print(*table([tuple(key.replace("_", " ") for key in head), *cells]), sep="\n")
    print(f"Export and check the files: {command_line('run', out)}")


@app.command()
def rename(
    folder: Job, old: Name, new: Annotated[str, typer.Argument(help="The new name.")]
) -> None:
    """Rename an adapter of a job, with its files and results."""
    from qwlora.pipeline.commands.manage_adapters import rename_adapter

    rename_adapter(folder, old, new)
    print(f"renamed {old} to {new}")


@app.command()
def remove(folder: Job, name: Name, yes: Yes = False) -> None:
    """Remove an adapter from a job, with its files and results."""
    from qwlora.errors import DirectoryError
    from qwlora.pipeline.commands.manage_adapters import remove_adapter

    def confirm() -> None:
        if not sys.stdin.isatty():
            raise DirectoryError(f"removing {name} deletes its files; confirm with --yes")
        typer.confirm(f"Delete adapter {name}, its simulation and its exports?", abort=True)

    remove_adapter(folder, name, (lambda: None) if yes else confirm)
    print(f"removed {name}")
