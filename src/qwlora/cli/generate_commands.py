"""`qwlora generate` and `qwlora chat`: text from the models of a job; `qwlora score`: their scores.

The answer goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from qwlora.cli.shared_arguments import AsJson, Device, Job, Model, Models
from qwlora.cli.terminal import ProgressDisplay, print_json, print_result, score_lines
from qwlora.system.stop_signals import number_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwlora.pipeline.commands.open_job import JobModels, ModelName


Raw = Annotated[
    bool, typer.Option("--raw", help="Continue the text without the model's chat template.")
]
# Flushed, so that each token is seen when it comes.
_write = partial(print, end="", flush=True)
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1e4,
        help="0: the likeliest token; above 0: sample; 1: the model's distribution.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the samples.")]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="As evaluate and verify: models in PyTorch, exported files with float32 activations.",
    ),
]

Runtime = Annotated[
    str | None,
    typer.Option(
        metavar="RUNTIME",
        help="torch, or a target with exported files, such as gguf. Default: the fastest.",
    ),
]


def generate(
    job: Job,
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    models: Models = None,
    raw: Raw = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    runtime: Runtime = None,
    exact: Exact = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with a model of a job."""
    from qwlora.pipeline.commands.open_job import JobModels

    opened = JobModels(job, device=device)
    # Only torch has devices.
    runtime = "torch" if runtime is None and (exact or device) else runtime
    names = [opened.fastest(name, runtime) for name in opened.named(models)]
    for name in names:
        opened.check(name)
    # A wrong name is refused before the seconds that it takes to import torch.
    from qwlora.analysis.generate_text import Sampling, generate_text, prompt_ids

    sampling = Sampling(max_new_tokens, temperature, seed)
    answers = []
    # One model is in memory at a time, so each is deleted before the next one is loaded.
    for name in names:
        model, tokenizer = _open(opened, name, exact)
        is_raw = raw or not tokenizer.chat_template
        ids = prompt_ids(tokenizer, prompt if is_raw else [{"role": "user", "content": prompt}])
        if len(names) > 1 and not as_json:
            print(f"== {name}")
        write = (lambda text: None) if as_json else _write
        answer = generate_text(model, tokenizer, ids, sampling, write)
        answers.append({"model": str(name), **asdict(answer)})
        del model
        if not as_json:
            print("\n" if name != names[-1] else "", flush=True)
            rate, plural = answer.tokens_per_second, "" if answer.tokens == 1 else "s"
            # The time to the first token includes reading the prompt, so the rate leaves it out.
            then = "" if rate is None else f", then {rate:.1f} per second"
            first = f"{answer.first_token_seconds:.2f} s"
            _say(f"{answer.tokens} token{plural}: the first after {first}{then}")
    if as_json:
        print_json({"prompt": prompt, "answers": answers})


def chat(
    job: Job,
    model: Model = None,
    raw: Raw = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    runtime: Runtime = None,
    exact: Exact = False,
    device: Device = None,
) -> None:
    """Talk to a model of a job.

    /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer. Without a
    chat template, each message continues the text.
    """
    from qwlora.pipeline.commands.open_job import JobModels

    opened = JobModels(job, device=device)
    runtime = "torch" if runtime is None and (exact or device) else runtime
    name = opened.fastest(opened.one_named(model), runtime)
    opened.check(name)
    from qwlora.analysis.generate_text import Sampling, generate_text, prompt_ids

    loaded, tokenizer = _open(opened, name, exact)
    sampling = Sampling(max_new_tokens, temperature, seed)
    _say(f"{name}: /reset forgets the conversation, /exit ends it")
    is_raw = raw or not tokenizer.chat_template
    text, messages = "", list[dict[str, str]]()
    while (line := _read_line()) is not None and line != "/exit":
        if line == "/reset":
            text, messages = "", []
        elif line:
            text += f"\n{line}" if text else line
            messages.append({"role": "user", "content": line})
            ids, parts = prompt_ids(tokenizer, text if is_raw else messages), list[str]()

            def write(part: str, parts: list[str] = parts) -> None:
                parts.append(part)
                _write(part)

            # Ctrl-C ends the answer; what was written so far is part of the conversation.
            try:
                generate_text(loaded, tokenizer, ids, sampling, write)
            except KeyboardInterrupt as interrupt:
                if number_of(interrupt) != signal.SIGINT:
                    raise
            print(flush=True)
            text += "".join(parts)
            messages.append({"role": "assistant", "content": "".join(parts)})


def score(
    job: Job,
    tasks: Annotated[
        str,
        typer.Argument(
            metavar="TASK,TASK,...",
            help="Task names, or YAML files of your own tasks.",
        ),
    ],
    models: Models = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents per task. Default: all.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score the models and exported files of a job on lm-eval tasks.

    Adds the scores to results.json and report.html.
    """
    from qwlora.pipeline.commands.open_job import evaluate_tasks

    with ProgressDisplay(as_json) as display:
        scores = evaluate_tasks(job, tasks, models, limit, display.track, display.say, device)
    print_result(scores, score_lines(scores), as_json)


def _open(
    job: JobModels, name: ModelName, exact: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _say(f"loading {job.what_runs(name, exact)} ...")
    # Within a display, what libraries print goes to standard error, not into the answer.
    with ProgressDisplay(quiet=True):
        return job.open(name, exact), job.tokenizer(name)


def _read_line() -> str | None:
    # `input` gets line editing and a history from this module, if it is imported.
    if is_terminal := sys.stdin.isatty():
        import readline  # noqa: F401
    try:
        return input("> " if is_terminal else "").strip()
    except EOFError:
        return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
