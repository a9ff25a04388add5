"""Commands on a recipe before anything runs: `init`, `check`, `data` and `plan`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwlora.cli.shared_arguments import RECIPE, AsJson, Changes, Out, RecipeFile, recipe_and_job
from qwlora.cli.terminal import ProgressDisplay, print_result, table
from qwlora.errors import DirectoryError, GridError, SourceError, duration, foreign_as, size
from qwlora.system.atomic import write_text
from qwlora.system.progress import one_step

if TYPE_CHECKING:
    from qwlora.pipeline.forecast import Estimates


def check(
    recipe: RecipeFile = RECIPE,
    changes: Changes = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print every key, including defaults.")
    ] = False,
) -> None:
    """Validate a recipe and print what differs from the defaults.

    Also checks that its targets support its grids.
    """
    from qwlora.data.prepared_data import caution_lines
    from qwlora.pipeline.sources import Sources
    from qwlora.pipeline.stages import new_context
    from qwlora.recipe import load_recipe
    from qwlora.recipe.model_files import check_source, exported_base, second_rounding, with_model
    from qwlora.recipe.yaml_core import dump_yaml, flow
    from qwlora.system.quiet import quiet_libraries
    from qwlora.targets import refusals
    from qwlora.targets.registry import TARGETS

    checked = load_recipe(recipe, tuple(changes or ()))
    quiet_libraries()
    # All refusals come before the first line of output, so that an error is all that is printed.
    check_source(checked)
    chosen, base = checked.export.targets, exported_base(checked)
    refusals.refuse(chosen, whole := with_model(checked, base), GridError)
    with ProgressDisplay() as display:
        context = new_context(checked, Sources(checked, track=display.track), Path(), display.track)
        for line in caution_lines(context.all_texts()):
            display.say(line)
    notes = refusals.notes(base, chosen)
    notes += map("warning: {}".format, refusals.genie_notes(whole))
    if note := second_rounding(checked):
        notes.append(f"warning: {note}")
    if full:
        print(dump_yaml(checked.model_dump(mode="json")), end="")
    else:
        for key, value in checked.model_dump(mode="json", exclude_defaults=True).items():
            print(f"{key}: {flow(value)}")
        print("# every other key has its default; --full prints it")
    for name in chosen:
        if missing := TARGETS[name].missing(to_write=True):
            notes.append(f"warning: export.targets: {name}: {missing}")
    held = [
        f"{name} holds {', '.join(grids)}"
        for name in chosen
        if (grids := [*refusals.held_grids(TARGETS[name], base)])
    ]
    for line in ("", *held, *notes):
        print(f"# {line}".rstrip(" #"))


def data(
    recipe: RecipeFile = RECIPE,
    changes: Changes = None,
    sequence: Annotated[int, typer.Option(help="Number of the sequence, from 0.")] = 0,
    adapter: Annotated[str | None, typer.Option(help="The adapter. Default: the first.")] = None,
    as_json: AsJson = False,
) -> None:
    """Summarize a recipe's data and show a training sequence."""
    from qwlora.data.prepared_data import caution_lines, summary
    from qwlora.pipeline.sources import Sources
    from qwlora.pipeline.stages import new_context
    from qwlora.recipe import load_recipe

    with ProgressDisplay(as_json) as display:
        chosen = load_recipe(recipe, tuple(changes or ()))
        names = {a.name: a for a in chosen.adapters}
        if adapter is not None and adapter not in names:
            raise SourceError(f"there is no adapter {adapter!r}; the recipe has {', '.join(names)}")
        sources = Sources(chosen, track=display.track)
        context = new_context(chosen, sources, Path(), display.track)
        whose = names[adapter] if adapter else chosen.adapters[0]
        text = context.text(whose.name)
        documents = text.training_runs(sequence, context.tokenizer)
        for line in caution_lines({whose.name: text}):
            display.say(line)
    counts = text.describe()
    length = whose.length(len(text.train))
    lines = [summary(counts), f"{whose.name}: {length}", ""]
    lines += [f"training sequence {sequence}; loss tokens are in ⟦ ⟧"]
    for runs in documents:
        lines += ["-" * 40, "".join(f"⟦{r['text']}⟧" if r["in_loss"] else r["text"] for r in runs)]
    print_result({"data": counts, "sequence": sequence, "documents": documents}, lines, as_json)


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = RECIPE,
    full: Annotated[
        bool,
        typer.Option("--full", help="Write every key, defaults commented out."),
    ] = False,
    example: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Write a recipe that is ready to run: first, demo, npu, local, ..."
        ),
    ] = None,
) -> None:
    """Write a recipe to start from. Never overwrites a file."""
    from qwlora.recipe.reference import example_path, full_recipe, starter_recipe

    text = full_recipe() if full else starter_recipe()
    if example is not None:
        text = example_path(example).read_text(encoding="utf-8")
    if path.exists():
        raise DirectoryError(f"{str(path)!r} already exists and was not changed. Give another path")
    with foreign_as(DirectoryError, f"{str(path)!r} cannot be written", "give another path"):
        write_text(path, text)
    run = "qwlora run" if path == RECIPE else f"qwlora run {path}"
    sources = "" if example else "; set model.source and data.source in it"
    print(f"wrote {path}{sources}, then: {run}")


def plan(
    recipe: RecipeFile = RECIPE,
    changes: Changes = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Estimate memory, disk and time of the next run, and whether it fits this machine."""
    from qwlora.recipe import load_recipe

    recipe, job = recipe_and_job(recipe, out)
    content = load_recipe(recipe, tuple(changes or ()))
    from qwlora.system.quiet import quiet_libraries

    # Some libraries print when they are imported, so they are silenced first.
    quiet_libraries()
    from qwlora.pipeline.forecast import plan_job
    from qwlora.recipe.model_files import second_rounding

    with ProgressDisplay(as_json) as display, one_step(display.track, "estimating"):
        estimates = plan_job(content, job)
    note = second_rounding(content)
    lines = [f"warning: {note}\n"] if note else []
    print_result(estimates.to_json(), [*lines, *_estimate_lines(estimates)], as_json)


def _estimate_lines(estimates: Estimates) -> Iterator[str]:
    if not estimates.stages:
        yield "Every stage is up to date: a run has nothing to do."
        return
    rows = [("stage", "peak memory", "disk", "most of the memory")]
    for stage in estimates.stages:
        most = stage.largest_part
        disk = size(stage.disk) if stage.disk else ""
        largest_part = f"{most}, {size(stage.memory[most])}"
        rows.append((stage.stage, size(stage.peak), disk, largest_part))
    yield from table(rows)
    limit, largest = estimates.memory_limit, estimates.largest
    of_limit = "" if limit is None else f" of {size(limit)}"
    yield f"\nmemory  {size(largest.peak)}{of_limit}, in {largest.stage}"
    yield f"disk    {size(estimates.disk)} of {size(estimates.disk_free)} free"
    seconds = estimates.seconds
    unknown = "unknown; `qwlora run` estimates it after the first minute of training"
    yield f"time    {unknown if seconds is None else f'about {duration(seconds)}'}\n"
    yield from (f"Does not fit: {problem}" for problem in estimates.problems)
    if not estimates.problems:
        yield "Everything fits."
