"""Entry point of the command line. Imports neither torch nor transformers until a stage runs.

Exit codes:

    0      done
    1      verification failed; `adapters check` or `encodings` found a problem
    2      any other error: wrong input, a damaged file, no space, no memory, a bug
    128+n  stopped by signal n: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP

`main` turns every error into one message on standard error; `--debug`, anywhere on the command
line, prints the traceback before it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from qwlora.atomic import write_text
from qwlora.cli.adapter_commands import app as adapters_app
from qwlora.cli.base_commands import app as base_app
from qwlora.cli.dump_layers_command import dump_layers
from qwlora.cli.encodings_commands import app as encodings_app
from qwlora.cli.generate_commands import chat, generate
from qwlora.cli.inspect_command import inspect
from qwlora.cli.merge_commands import merge, merge_check
from qwlora.cli.plan_command import plan
from qwlora.cli.progress_bars import ProgressDisplay
from qwlora.cli.push_command import push
from qwlora.cli.report_command import report
from qwlora.cli.shared_arguments import AsJson, Changes, Quiet, RecipeFile
from qwlora.cli.simulate_command import simulate
from qwlora.cli.terminal import console, print_json, print_result, safe_streams
from qwlora.errors import (
    DirectoryError,
    QwloraError,
    VerificationError,
    described,
    file_being_read,
    is_out_of_memory,
    is_out_of_space,
)
from qwlora.messages import shortened
from qwlora.pipeline.stages import VERBS
from qwlora.system.cpu_threads import configure_threads
from qwlora.system.stop_signals import number_of, on_stop_signal, raise_stopped


class _Commands(typer.core.TyperGroup):
    """All commands; one that a signal interrupts ends with a single message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with on_stop_signal(raise_stopped):
                return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would exit without a message
            number = number_of(error)
            where = f", {error}" if str(error) else ""
            resumes = ctx.invoked_subcommand in ("run", *VERBS)
            remedy = "The same command resumes from here." if resumes else "Run the command again."
            _fail(f"interrupted by {signal.Signals(number).name}{where}. {remedy}", 128 + number)


app = typer.Typer(
    name="qwlora",
    cls=_Commands,
    help="Fine-tune LoRA adapters on the exact quantized weights you deploy: freeze a model to "
    "integers, train adapters on those integers, calibrate activations, export for a runtime, and "
    "verify the exported files.\n\nExit codes: 0 done; 1 verification failed, or a check found a "
    "problem; 2 any other error; 128 + n stopped by signal n (130: Ctrl-C).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Given = Annotated[
    Path | None,
    typer.Argument(
        metavar="RECIPE",
        help="The recipe, a YAML file. Default: the recipe.yaml in the job's directory.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", help="The job's directory: receives the base, adapters, exports and results.json."
    ),
]
TrustMtime = Annotated[
    bool,
    typer.Option(
        "--trust-mtime",
        help="Treat a model file as unchanged if its size and mtime are, without hashing its "
        "content (for models of terabytes). Default: hash the content, again whenever size, mtime, "
        "ctime or inode changes. Give this option to every run of the job.",
    ),
]
Replace = Annotated[
    bool,
    typer.Option(
        "--replace",
        help="Train adapters again that exist with other settings. The old one stays in place "
        "until the new one is finished.",
    ),
]

# Read by tqdm, huggingface_hub and datasets when they are imported; our bars are ours.
_PROGRESS_OF_OTHERS = (
    "TQDM_DISABLE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
)
_SUMMARY = {
    "run": "Run all stages of a recipe. Stages that are finished and up to date are skipped.",
    "quantize": "Step 1: freeze the model's weights to packed integers.",
    "calibrate-base": "Workflow qwa-lora: calibrate the base before training.",
    "train": "Step 2: train the adapters on the frozen base.",
    "calibrate": "Step 3: calibrate activations and adapters.",
    "export": "Step 4: write the files for the runtimes.",
    "verify": "Step 5: run the exported files and compare.\n\nWith what was trained. Runs "
    "every file; never skipped, even if nothing changed. With a folder of exported files as "
    "argument, such as out/export/hf, repeats its proof on any machine.",
    "evaluate": "Measure perplexity of all models, or score tasks.\n\nOf the float model, base, "
    "adapters and simulations. With --tasks, scores of lm-eval instead, also of exported files, in "
    "one table with standard errors; they are added to results.json and report.html.",
}


def _print_version(asked: bool) -> None:
    if asked:
        print(f"qwlora {version('qwlora')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Print the traceback of an error. Works with every command."),
    ] = False,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Declares --debug for --help; `main` has removed it from the arguments by now."""


def _add_job_command(name: str, verbs: Sequence[str]) -> None:
    def command(
        recipe: Given = None,
        out: Out = None,
        changes: Changes = None,
        as_json: AsJson = False,
        quiet: Quiet = False,
        replace: Replace = False,
        trust_mtime: TrustMtime = False,
    ) -> None:
        if name == "verify" and recipe is not None and _is_bundle(recipe):
            _verify_bundle(recipe, as_json, quiet)
        else:
            _run(name, verbs, recipe, out, changes, as_json, quiet, trust_mtime, replace)

    app.command(name, help=_SUMMARY[name])(command)


_add_job_command("run", VERBS)
for _verb in VERBS:
    if _verb != "evaluate":
        _add_job_command(_verb, (_verb,))


@app.command(help=_SUMMARY["evaluate"])
def evaluate(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE|DIR",
            help="The recipe; with --tasks, a job's directory. Default: the recipe.yaml in the "
            "job's directory.",
        ),
    ] = None,
    out: Out = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,TASK,...",
            help="Score the models of the job DIR on tasks of lm-eval: names, or YAML files with "
            "a dataset of your own.",
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL,MODEL,...",
            help="With --tasks: which models, for example base,first,simulated/first,onnx/first. "
            "Default: all that the job has and whose runtime is installed.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --tasks: documents of each task. Default: all.")
    ] = None,
    changes: Changes = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    trust_mtime: TrustMtime = False,
) -> None:
    """See `_SUMMARY`."""
    if tasks is None:
        if models is not None or limit is not None:
            raise typer.BadParameter("--models and --limit need --tasks; add it, or remove them")
        verbs = ("evaluate",)
        _run("evaluate", verbs, recipe, out, changes, as_json, quiet, trust_mtime, False)
        return
    if recipe is None or out is not None or changes:
        raise typer.BadParameter(
            "--tasks needs the job's directory as argument, without --out and --set: "
            "qwlora evaluate DIR --tasks TASK"
        )
    from qwlora.cli.evaluate_command import score_job

    score_job(recipe, tasks, models, limit, as_json, quiet)


def _is_bundle(path: Path) -> bool:
    from qwlora.export.proof.folder import is_bundle

    return path.is_dir() and is_bundle(path)


def _verify_bundle(folder: Path, as_json: bool, quiet: bool) -> None:
    from qwlora.export.proof.folder import verify_bundle
    from qwlora.export.proof.readme import proof_table
    from qwlora.pipeline.running.new_context import quiet_libraries

    quiet_libraries()
    with ProgressDisplay(quiet or as_json) as display:
        found = verify_bundle(folder, display.track)
    print_result(found, proof_table(found), as_json)
    if problems := [f"{name}: {p}" for name, proof in found.items() for p in proof["problems"]]:
        what = f"{str(folder)!r}: the files do not compute what was trained"
        raise VerificationError(what, problems, {})


@app.command()
def check(recipe: RecipeFile, changes: Changes = None) -> None:
    """Validate a recipe and print it with its defaults.

    Then which targets hold the grids of its base.
    """
    from qwlora.cli.tables import table
    from qwlora.pipeline.plan.target_table import second_rounding, target_table
    from qwlora.recipe import load_recipe
    from qwlora.recipe.yaml_core import dump_yaml

    checked = load_recipe(recipe, tuple(changes or ()))
    rows, notes = target_table(checked)
    print(dump_yaml(checked.model_dump(mode="json")), end="")
    print("\n# Targets that hold these grids exactly, or the scheme that they need instead")
    print("# (* in export.targets):\n#")
    if note := second_rounding(checked):
        notes.append(f"warning: {note}")
    for line in (*table(rows), *(["", *notes] if notes else [])):
        print(f"#   {line}".rstrip())


@app.command()
def data(
    recipe: RecipeFile,
    changes: Changes = None,
    sequence: Annotated[
        int, typer.Option(help="Number of the training sequence to show, counted from 0.")
    ] = 0,
    adapter: Annotated[
        str | None, typer.Option(help="Whose text. Default: the first adapter's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Summarize a recipe's data and show a training sequence.

    Loss tokens are marked.
    """
    from qwlora.pipeline.commands.data_preview import format_preview, preview
    from qwlora.recipe import load_recipe

    with ProgressDisplay(as_json) as display:
        chosen = load_recipe(recipe, tuple(changes or ()))
        found = preview(chosen, sequence, adapter, display.track)
    print_result(found, [format_preview(found)], as_json)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    full: Annotated[
        bool,
        typer.Option("--full", help="Write every key; those with a default are commented out."),
    ] = False,
) -> None:
    """Write a recipe to start from. Never overwrites a file."""
    from qwlora.recipe.starter import full_recipe, starter_recipe

    if path.exists():
        raise DirectoryError(f"{str(path)!r} exists and was not changed. Give another path")
    try:
        write_text(path, full_recipe() if full else starter_recipe())
    except OSError as error:
        raise DirectoryError(
            f"{str(path)!r} cannot be written: {error.strerror}. Give another path"
        ) from error
    print(
        f"wrote {path}; set model.source and data.source in it, then: qwlora run {path} --out out"
    )


def _run(
    name: str,
    verbs: Sequence[str],
    recipe_file: Path | None,
    out: Path | None,
    changes: list[str] | None,
    as_json: bool,
    quiet: bool,
    trust_mtime: bool,
    replace: bool,
) -> None:
    from qwlora.pipeline.job import journal
    from qwlora.pipeline.job.output_path import check_output
    from qwlora.pipeline.running.run_job import run
    from qwlora.recipe import load_recipe

    if out is None:
        others = {
            "verify": ", or a folder of exported files (with the folders base and proof)",
            "evaluate": ", or DIR and --tasks",
        }
        raise DirectoryError(f"{name} needs --out, the job's directory{others.get(name, '')}")
    check_output(out)  # first, so that a wrong --out is not reported as a missing recipe
    journal.finish(out)  # before the recipe in the job's directory is read
    path = recipe_file or out / "recipe.yaml"
    recipe = load_recipe(path, tuple(changes or ()))
    options = [
        str(path),
        "--out",
        str(out),
        *(part for change in changes or () for part in ("--set", change)),
        *(["--trust-mtime"] if trust_mtime else []),
    ]
    try:
        with ProgressDisplay(quiet or as_json) as display:
            results = run(
                recipe,
                out,
                tuple(verbs),
                track=display.track,
                say=display.say,
                command=lambda verb: shlex.join(["qwlora", verb, *options]),
                trust_mtime=trust_mtime,
                replace=replace,
                watch=None if quiet or as_json else display.watch,
            )
    except VerificationError as error:
        _print_results(error.results, out, as_json)
        raise
    _print_results(results, out, as_json)


def _print_results(results: dict[str, Any] | None, out: Path, as_json: bool) -> None:
    if not results:  # in a distributed run, only the first process reports
        return
    if as_json:
        print_json(results)
    else:
        from qwlora.pipeline.results.results_table import closing_lines, print_summary

        print_summary(results, console(width=120))
        with contextlib.suppress(DirectoryError):  # a job that cannot be written has no report
            print("", *closing_lines(out), sep="\n")


app.command("plan")(plan)
app.command("inspect")(inspect)
app.command("merge-check")(merge_check)
app.command("merge")(merge)
app.command("simulate")(simulate)
app.command("dump-layers")(dump_layers)
app.command("report")(report)
app.command("push")(push)
app.command("generate")(generate)
app.command("chat")(chat)
app.add_typer(adapters_app, name="adapters")
app.add_typer(base_app, name="base")
app.add_typer(encodings_app, name="encodings")


def main() -> None:
    """Run the command line; turn any error into one message and an exit code."""
    configure_threads()
    for name in _PROGRESS_OF_OTHERS:
        os.environ.setdefault(name, "1")
    warnings.formatwarning = _format_warning
    arguments, debug = _without_debug(sys.argv[1:])
    with safe_streams(arguments):
        try:
            sys.exit(app(arguments, prog_name="qwlora", standalone_mode=False))
        except Exception as error:
            if debug:
                traceback.print_exception(error)
            _fail(_message(error), 1 if isinstance(error, VerificationError) else 2)


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """QWLoRA's own warnings in one line; all others as usual, without the source line."""
    if category.__module__.startswith("qwlora."):
        return f"qwlora: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, and whether it was there. Arguments after `--` are kept."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return [*kept, *arguments[end:]], len(kept) < end


def _message(error: BaseException) -> str:
    if type(error).__name__ == "Abort" and error.__cause__ is not None:
        error = error.__cause__  # typer wraps EOFError, which a truncated file raises too
    if isinstance(error, QwloraError):
        return str(error)
    usage = getattr(error, "format_message", None)  # a usage error of click
    if usage is not None:
        return str(usage())
    file = file_being_read(error)
    where = f" while reading {file}" if file else ""
    if is_out_of_memory(error):
        return (
            f"out of memory{where} ({described(error)}). Free memory, or use less: a smaller "
            "model, smaller data.sequence_tokens or adapters.batch_sequences, or "
            "gradient_checkpointing: true"
        )
    if is_out_of_space(error):
        return f"no space left on the disk{where} ({described(error)}). Free some and run again"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{described(error)}{where}"
    remedy = "If the file is damaged, replace it. Otherwise run" if file else "Run"
    return (
        f"unexpected error{where}: {type(error).__name__}: {error}. {remedy} the command again "
        "with --debug and report the traceback"
    )


def _fail(message: str, code: int) -> NoReturn:
    print(f"qwlora: {shortened(message, 20_000)}", file=sys.stderr)
    sys.exit(code)
