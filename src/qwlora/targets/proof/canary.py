"""canary.json of an exported base or adapter: what it answers to a few short contexts.

`server_check.py` asks a running server the same and compares. All folders of a job have the same
contexts, which depend on the model and the seed only: a new adapter changes no other file.
docs/canary.md describes the format for other tools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.errors import FingerprintError, SourceError, foreign_as
from qwlora.formats import manifest
from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.system.parameter_names import BASE
from qwlora.targets.proof.contents import CANARY, RECORD

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
TEXTS, CHATS, TOKENS = 16, 8, 24  # generated texts, those sent as a user's message, tokens of each
FIRST, STEP = 6, 2  # the length of the first context in a text, and from one to the next
TOP = 4  # tokens of an answer

Answer = Mapping[int, float]  # log-probabilities of the likeliest tokens in nats, likeliest first


@dataclass(frozen=True)
class Context:
    """Tokens before the one that a model is asked for, with those that begin every text. Without
    `text`, a server must take token ids."""

    tokens: tuple[int, ...]
    text: str | None


@dataclass(frozen=True)
class Canary:
    """What one model answers.

    Args:
        contexts: the same in all files of a job.
        answers: one for each context.
        pieces: texts of the tokens in `answers`, for servers that return no token ids.
    """

    contexts: Sequence[Context]
    answers: Sequence[Answer]
    pieces: Mapping[int, str]


def contexts_of(
    texts: Iterable[Sequence[int]],
    chats: Iterable[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Context]:
    """Beginnings of `texts`, and `chats` as they are, from their token ids."""
    beginnings = [text[:end] for text in texts for end in range(FIRST, len(text) + 1, STEP)]
    return [_context(tuple(tokens), tokenizer) for tokens in (*beginnings, *chats)]


def _context(tokens: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> Context:
    # A server puts the first tokens of every text, such as BOS, before a text by itself.
    for start in range(len(tokens)):
        text = str(tokenizer.decode([*tokens[start:]]))
        if tuple(tokenizer(text)["input_ids"]) == tokens:
            return Context(tokens, text)
    return Context(tokens, None)


def make_canary(
    logits: Callable[[Tensor], Tensor],
    contexts: Sequence[Context],
    tokenizer: PreTrainedTokenizerBase,
) -> Canary:
    """Ask a causal language model.

    Args:
        logits: of token ids [1, tokens]: [1, tokens, vocabulary].
    """
    import torch

    answers, scores = list[Answer](), torch.empty(0)
    longest: tuple[int, ...] = ()
    # Backwards, since a longer context also has the answers of its beginnings.
    for context in reversed(contexts):
        count = len(context.tokens)
        if longest[:count] != context.tokens:
            longest = context.tokens
            with torch.no_grad():
                scores = logits(torch.tensor([longest]))[0].float().log_softmax(-1).cpu()
        top = scores[count - 1].topk(TOP)
        values = [round(value, 5) for value in top.values.tolist()]
        answers.insert(0, dict(zip(top.indices.tolist(), values, strict=True)))
    pieces = {token: str(tokenizer.decode([token])) for answer in answers for token in answer}
    return Canary(contexts, answers, pieces)


def write_canary(folder: Path, canary: Canary, base_fingerprint: str) -> None:
    """Write canary.json; docs/canary.md has its format."""
    rows = [
        {"tokens": context.tokens, "text": context.text, "answer": [*answer.items()]}
        for context, answer in zip(canary.contexts, canary.answers, strict=True)
    ]
    content = {
        "format": FORMAT,
        "base_fingerprint": base_fingerprint,
        "contexts": rows,
        "pieces": canary.pieces,
    }
    write_text(folder / CANARY, strict_json.dumps(content) + "\n")


def canary_folder(path: Path) -> Path:
    """`path`, or the first folder of exported files with canaries if it is a job's directory."""
    return next((p.parents[1] for p in sorted(path.glob(f"export/*/{BASE}/{CANARY}"))), path)


def read_canary(folder: Path) -> tuple[str, Canary]:
    """The fingerprint of the base and the canary; see `read_canaries`."""
    manifest.check(folder, RECORD, repr(str(folder)), "export it again", only=[CANARY])
    content = strict_json.read_object(folder / CANARY)
    with foreign_as(SourceError, f"{str(folder / CANARY)!r} is no canary", "export it again"):
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, not {FORMAT}")
        rows = content["contexts"]
        contexts = [Context(tuple(map(int, row["tokens"])), row["text"]) for row in rows]
        answers = [{int(token): float(value) for token, value in row["answer"]} for row in rows]
        if not all(len(answer) >= 2 for answer in answers):
            raise ValueError("an answer has fewer than two tokens")
        pieces = {int(token): str(text) for token, text in content["pieces"].items()}
        return str(content["base_fingerprint"]), Canary(contexts, answers, pieces)


def read_canaries(bundle: Path) -> dict[str, Canary]:
    """The canaries of the base and of all adapters in a folder of exported files, by name.

    Raises:
        FingerprintError: one changed after it was written, or is for another base.
        SourceError: there are none, or one cannot be read.
    """
    canaries, bases = dict[str, Canary](), dict[str, str]()
    for path in sorted(bundle.glob(f"*/{CANARY}")):
        name = path.parent.name
        bases[name], canaries[name] = read_canary(path.parent)
    if BASE not in canaries:
        raise SourceError(
            f"{str(bundle)!r} has no {BASE}/{CANARY}. Give a folder of exported files that a "
            "server loads, such as out/export/gguf, of a job with export.canary: generated"
        )
    for name, canary in canaries.items():
        if bases[name] != bases[BASE] or canary.contexts != canaries[BASE].contexts:
            raise FingerprintError(
                f"{str(bundle / name)!r} was exported for another base than {BASE}/ next to it; "
                "copy both from one job"
            )
    return canaries


def likeliest(answer: Answer) -> int:
    """The token that greedy decoding takes."""
    return max(answer, key=answer.__getitem__)


def margin(answer: Answer) -> float:
    """Nats from the likeliest token to the second."""
    first, second = sorted(answer.values(), reverse=True)[:2]
    return first - second


def log_prob(answer: Answer, token: int) -> float:
    """The log-probability of a token. An unlisted token gets the lowest listed value."""
    return answer.get(token, min(answer.values()))


def halfway(first: Answer, second: Answer) -> Answer:
    """About what an adapter at half its strength answers, from the base's answer and its own."""
    tokens = first.keys() | second.keys()
    return {token: (log_prob(first, token) + log_prob(second, token)) / 2 for token in tokens}


def telling(answers: Sequence[Answer], others: Iterable[Sequence[Answer]], count: int) -> list[int]:
    """The `count` contexts where a model's answers differ most clearly from those of `others`."""
    clear = [
        [_difference(mine, other) for mine, other in zip(answers, theirs, strict=True)]
        for theirs in others
    ]
    chosen, reached = list[int](), [0.0] * len(clear)
    for _ in range(min(count, len(answers))):
        # The next context is the best for the model that differs least so far.
        left = [number for number in range(len(answers)) if number not in chosen]
        sums = {
            n: sorted(sum_ + row[n] for sum_, row in zip(reached, clear, strict=True)) for n in left
        }
        best = max(left, key=sums.__getitem__)
        chosen.append(best)
        reached = [sum_ + row[best] for sum_, row in zip(reached, clear, strict=True)]
    return chosen


def _difference(first: Answer, second: Answer) -> float:
    tops = likeliest(first), likeliest(second)
    apart = sum(abs(log_prob(first, top) - log_prob(second, top)) for top in tops)
    # Where greedy tokens are all that a server returns, they must differ and rounding keep them.
    clear = min(margin(first), margin(second)) if tops[0] != tops[1] else 0.0
    return min(apart, 4.0) / 4 + min(clear, 2.0)
