"""`qwlora generate` and `qwlora chat`: text from the models of a job.

    qwlora generate DIR "prompt"                          the first adapter
    qwlora generate DIR "prompt" --compare base,NAME      several answers next to each other
    qwlora chat DIR --adapter NAME                        a conversation; /reset and /exit

The answer goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qwlora.cli.progress_bars import ProgressDisplay
from qwlora.cli.shared_arguments import AdapterName, AsJson, Job
from qwlora.cli.terminal import console, print_json
from qwlora.system.stop_signals import number_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwlora.analysis.generate_text import Answer, Sampling
    from qwlora.pipeline.commands.model_names import JobModels, ModelName


def _checked_temperature(value: float) -> float:
    if value != 0 and not 1e-4 <= value <= 1e4:  # float32 logits would overflow, or all be equal
        raise typer.BadParameter(
            f"{value:g} is out of range: 0 picks the likeliest token, and 0.0001 to 10000 sample"
        )
    return value


StageName = Annotated[
    str | None,
    typer.Option(
        "--stage",
        help="float, base, adapted, simulated, or an export target such as onnx, which runs the "
        "exported files. simulated and exported models run without a key-value cache: each token "
        "runs the whole text again. Default: adapted.",
    ),
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="Continue the text as it is, without the model's chat template, if any."
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        callback=_checked_temperature,
        help="0: always the likeliest token. Above 0: sample; 1 is the model's own distribution.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the samples.")]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Compute exactly as evaluation does. Default: products with packed weights may use "
        "bfloat16, which is several times as fast.",
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare",
        metavar="MODEL,MODEL,...",
        help="Answer with several models: float, base, an adapter's name, or STAGE/NAME, for "
        "example base,first,simulated/first.",
    ),
]


def generate(
    job: Job,
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    adapter: AdapterName = None,
    stage: StageName = None,
    compare: Compare = None,
    raw: Raw = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    exact: Exact = False,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with a model of a job."""
    if compare is not None and (adapter or stage):
        raise typer.BadParameter(
            "--compare names its models itself, for example base,simulated/first; remove "
            "--adapter and --stage"
        )
    from qwlora.pipeline.commands.model_names import JobModels, model_name

    models = JobModels(job)
    if compare is None:
        names = [models.name(stage or "adapted", adapter)]
    else:
        given = [part.strip() for part in compare.split(",") if part.strip()]
        if not given:
            raise typer.BadParameter("--compare needs the names of models, for example base,first")
        names = [model_name(text, models.adapters) for text in given]
    for name in names:
        models.check(name)
    from qwlora.analysis.generate_text import Sampling

    sampling = Sampling(max_new_tokens, temperature, seed)
    streams = compare is None and not as_json
    answers: list[tuple[ModelName, Answer]] = []
    for name in names:  # one model in memory at a time
        model, tokenizer = _open(models, name, exact)
        answers.append((name, _answer(model, tokenizer, prompt, raw, sampling, streams)))
        del model
    if as_json:
        content = [{"model": str(name), **_to_json(answer)} for name, answer in answers]
        print_json({"prompt": prompt, "answers": content})
    elif compare is not None:
        _print_side_by_side(answers)


def chat(
    job: Job,
    adapter: AdapterName = None,
    stage: StageName = None,
    raw: Raw = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    exact: Exact = False,
) -> None:
    """Talk to a model of a job.

    /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C ends an answer. Without a chat
    template, or with --raw, each message continues the text so far.
    """
    from qwlora.pipeline.commands.model_names import JobModels

    models = JobModels(job)
    name = models.name(stage or "adapted", adapter)
    models.check(name)
    from qwlora.analysis.generate_text import Sampling

    model, tokenizer = _open(models, name, exact)
    sampling = Sampling(max_new_tokens, temperature, seed)
    _say(f"{name}: /reset forgets the conversation, /exit ends it")
    conversation = _Conversation(is_raw=raw or not tokenizer.chat_template)
    while (line := _read_line()) is not None and line != "/exit":
        if line == "/reset":
            conversation.clear()
        elif line:
            conversation.ask(line)
            conversation.note(_reply(model, tokenizer, conversation.prompt, sampling))


class _Conversation:
    """Messages for the chat template, or the text so far if `is_raw`."""

    def __init__(self, is_raw: bool):
        self._is_raw = is_raw
        self.clear()

    def clear(self) -> None:
        self._text, self._messages = "", list[dict[str, Any]]()

    def ask(self, line: str) -> None:
        self._text += f"\n{line}" if self._text else line
        self._messages.append({"role": "user", "content": line})

    def note(self, answer: str) -> None:
        self._text += answer
        self._messages.append({"role": "assistant", "content": answer})

    @property
    def prompt(self) -> str | list[dict[str, Any]]:
        return self._text if self._is_raw else self._messages


def _open(
    models: JobModels, name: ModelName, exact: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _say(f"loading {name} ...")
    with ProgressDisplay(quiet=True):  # keeps what libraries print out of the answer
        return models.open(name, exact), models.tokenizer(name)


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    raw: bool,
    sampling: Sampling,
    streams: bool,
) -> Answer:
    from qwlora.analysis.generate_text import generate_text, prompt_ids

    is_raw = raw or not tokenizer.chat_template
    ids = prompt_ids(tokenizer, prompt if is_raw else [{"role": "user", "content": prompt}])
    answer = generate_text(
        model, tokenizer, ids, sampling, _write if streams else lambda text: None
    )
    if streams:
        print(flush=True)
        _say(_speed(answer))
    return answer


def _reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, Any]],
    sampling: Sampling,
) -> str:
    """Stream an answer; Ctrl-C ends it, and what was written so far counts."""
    from qwlora.analysis.generate_text import generate_text, prompt_ids

    parts: list[str] = []

    def write(text: str) -> None:
        parts.append(text)
        _write(text)

    try:
        generate_text(model, tokenizer, prompt_ids(tokenizer, prompt), sampling, write)
    except KeyboardInterrupt as interrupt:
        if number_of(interrupt) != signal.SIGINT:
            raise
    print(flush=True)
    return "".join(parts)


def _read_line() -> str | None:
    """The next message; None at the end of the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives `input` its line editing)

        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


def _print_side_by_side(answers: list[tuple[ModelName, Answer]]) -> None:
    """Columns on a terminal, otherwise one answer after the other."""
    if not sys.stdout.isatty():
        print("\n\n".join(f"== {name}\n{answer.text}" for name, answer in answers))
        return
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in answers:
        table.add_column(ratio=1)
    table.add_row(
        *(
            Panel(Text(answer.text), title=Text(str(name)), subtitle=Text(_speed(answer)))
            for name, answer in answers
        )
    )
    console().print(table)


def _speed(answer: Answer) -> str:
    tokens = "1 token" if answer.tokens == 1 else f"{answer.tokens} tokens"
    rate = answer.tokens_per_second
    rest = "" if rate is None else f", then {rate:.1f} per second"
    return f"{tokens}: the first after {answer.first_seconds:.2f} s{rest}"


def _to_json(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "first_token_seconds": answer.first_seconds,
        "tokens_per_second": answer.tokens_per_second,
    }


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
