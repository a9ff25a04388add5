"""Is the adapter active? Ask a running server for single tokens, and compare with canary.json.

    for row in qwlora.verify_server("out/export/gguf", "http://127.0.0.1:8080"):
        print(row["model"], row["verdict"])

A model of the job matches if the root mean square of the differences between its log-probabilities
and the server's is at most `LIMIT`. If the server returns none, the greedy tokens are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from qwlora.errors import SourceError, suggestion
from qwlora.system.parameter_names import BASE
from qwlora.system.progress import Track, untracked
from qwlora.targets.proof.canary import (
    Answer,
    Canary,
    halfway,
    likeliest,
    log_prob,
    read_canaries,
    telling,
)
from qwlora.targets.proof.server import ONE_ADAPTER, Reply, Server

MOST, LEAST = 16, 6  # requests to one model; fewer if there are many, to stay below
REQUESTS = 48
# Nats. Activations of 8 bits cause up to 0.17, another solver on the same floats 0.85 and more
# (docs/log/canaries.md).
LIMIT = 0.3
LIKELY = -4.0  # log-probability, below which the differences of a token are not compared
PART = "\ufffd"
OTHER_TOKENS = 0.1  # share of greedy tokens that may differ

AS_EXPECTED, ANOTHER, OTHER_NUMBERS, UNCLEAR, MISSING = VERDICTS = (
    "as expected",
    "another model",
    "other numbers",
    "cannot tell",
    "not served",
)


def verify_server(
    folder: str | Path,
    url: str,
    models: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    track: Track = untracked,
) -> list[dict[str, Any]]:
    """Check which exported model answers under each name of a server.

    Works with OpenAI's /v1/completions (vLLM, SGLang, llama-server, mlx_lm.server) and with
    llama-server's /completion. A key for the server is read from the environment variable
    QWLORA_SERVER_KEY.

    Args:
        folder: exported files of one target, with base/ and a folder for each adapter.
        url: address of the server, such as `http://127.0.0.1:8000`. Nothing else is contacted.
        models: the server's model name for `base` and for each adapter. An empty name is not sent.
            `lora:N` or `lora:none`: adapter N of llama-server alone, or none. Default: what the
            server lists.
        timeout: limit for all requests together, in seconds.

    Returns:
        A row for each model that was asked, and for each adapter that the server does not list:

        - `expected`, `model`: the name in the folder, or None if any will do; the server's
        - `verdict`: one of `VERDICTS`
        - `answers_as`: the name in the folder that matches, or None
        - `difference`: from the expected model, in nats; None without log-probabilities
        - `same_tokens`: share of the greedy tokens that are the expected ones
        - `requests`, `reason`: how many there were, and why a verdict is not clear

    Raises:
        SourceError: the folder has no canaries or no folder of that name, or nothing answers at the
            address.
        FingerprintError: a canary was changed, or is for another base.
    """
    canaries = read_canaries(Path(folder))
    for name in models or {}:
        if name not in canaries:
            raise SourceError(f"{str(folder)!r} has no {name!r}{suggestion(name, canaries)}")
    pieces = {token: text for canary in canaries.values() for token, text in canary.pieces.items()}
    server = Server(url, timeout, pieces)
    adapters = server.adapters()
    asked = [*models.items()] if models else _listed(server, canaries, adapters)
    count = max(LEAST, min(MOST, REQUESTS // len(asked)))
    rows = [_row(server, canaries, *pair, count) for pair in track(asked, "asking the server")]
    seen = {row["expected"] for row in rows} | {row["answers_as"] for row in rows}
    for name in () if models else sorted(canaries.keys() - seen - {BASE}):
        reason = "the server lists no model of this name"
        rows.append(_verdict(name, None, MISSING, reason=reason))
    return rows


def _listed(
    server: Server, canaries: Mapping[str, Canary], adapters: Mapping[int, str]
) -> list[tuple[str | None, str]]:
    """What to ask for: the name in the folder, or None if it is unknown, and the server's."""
    names = canaries.keys() - {BASE}
    if adapters:
        asked: list[tuple[str | None, str]] = [(None, ""), (BASE, f"{ONE_ADAPTER}none")]
        for number, path in adapters.items():
            parts = PurePath(path).with_suffix("").parts
            if name := next((part for part in reversed(parts) if part in names), None):
                asked.append((name, f"{ONE_ADAPTER}{number}"))
        return asked
    models = server.models()
    found = {name: model for name in names for model in models if model.split("/")[-1] == name}
    others = [model for model in models if model not in found.values()]
    asked = [*sorted(found.items())]
    if len(others) == 1:
        asked.insert(0, (BASE if found else None, others[0]))
    return asked or [(None, "")]


def _row(
    server: Server, canaries: Mapping[str, Canary], expected: str | None, model: str, count: int
) -> dict[str, Any]:
    """Ask one model, and judge its replies."""
    answers = {(name, 1.0): canary.answers for name, canary in canaries.items()}
    for name in canaries.keys() - {BASE}:
        pairs = zip(canaries[BASE].answers, canaries[name].answers, strict=True)
        answers[name, 0.5] = [halfway(*pair) for pair in pairs]
    contexts, replies = canaries[BASE].contexts, dict[int, Reply]()
    # llama-server returns no numbers with a token that is a part of a character.
    tops = ([c.pieces[likeliest(a)] for a in c.answers] for c in canaries.values())
    is_whole = [PART not in "".join(texts) for texts in zip(*tops, strict=True)]
    try:
        usable = server.usable(contexts, model)
        usable = [number for number in usable if is_whole[number]] or usable
        own, *others = (
            [theirs[number] for number in usable]
            for _, theirs in sorted(answers.items(), key=lambda item: item[0][0] != expected)
        )
        for place in telling(own, others, count):
            replies[usable[place]] = server.ask(contexts[usable[place]], model)
    except SourceError as error:
        return _verdict(expected, model, UNCLEAR, reason=str(error), requests=len(replies))
    return _judged(answers, replies, expected, model)


def _judged(
    answers: Mapping[tuple[str, float], Sequence[Answer]],
    replies: Mapping[int, Reply],
    expected: str | None,
    model: str,
) -> dict[str, Any]:
    figures: dict[str, Any] = {"requests": len(replies)}
    known = {number: reply for number, reply in replies.items() if reply.log_probs}
    has_numbers = len(known) >= LEAST // 2
    replies = known if has_numbers else replies
    tokens = {key: _other_tokens(theirs, replies) for key, theirs in answers.items()}
    distances, limit = tokens, OTHER_TOKENS
    if has_numbers:
        distances = {key: _difference(theirs, replies) for key, theirs in answers.items()}
        limit = LIMIT
    nearest = min(distances, key=distances.__getitem__)
    # A server that rounds little tells models apart that are closer than the limit.
    alike = min(limit, 2 * distances[nearest]) if has_numbers else limit
    matching = [key for key, distance in distances.items() if distance <= alike]
    subject = (expected or nearest[0], 1.0)
    figures["same_tokens"] = 1 - tokens[subject]
    figures["difference"] = distances[subject] if has_numbers else None
    if distances[nearest] > limit or (len(matching) == 1 and nearest[1] != 1):
        return _verdict(expected, model, OTHER_NUMBERS, **figures)
    if len(matching) > 1:
        names = " and ".join(sorted({name for name, _ in matching}))
        reason = f"{names} answer alike in the {len(replies)} contexts that differ most"
        return _verdict(expected, model, UNCLEAR, reason=reason, **figures)
    verdict = AS_EXPECTED if expected in (None, nearest[0]) else ANOTHER
    return _verdict(expected, model, verdict, answers_as=nearest[0], **figures)


def row_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each row of `verify_server`."""
    return [f"{_subject(row)}: {_sentence(row)}" for row in rows]


def _subject(row: Mapping[str, Any]) -> str:
    served = f"the server's {row['model']}" if row["model"] else "the server"
    return f"{row['expected']} ({served})" if row["expected"] else served


def _sentence(row: Mapping[str, Any]) -> str:
    name, verdict = row["answers_as"], row["verdict"]
    is_, off = "the base" if name == BASE else f"adapter {name}", row["difference"]
    if verdict == AS_EXPECTED:
        said = "active" if row["expected"] not in (None, BASE) else f"answers as {is_}"
    elif verdict == ANOTHER:
        said = f"answers as {is_}" + ("; the adapter is not active" if name == BASE else "")
    elif verdict == OTHER_NUMBERS:
        said = "matches no model of this job: the integers, the adapter or alpha differ"
    else:
        said = f"{verdict}: {row['reason']}"
    if off is not None:
        return f"{said}. Log-probabilities differ by {off:.2f} (limit {LIMIT})"
    same = row["same_tokens"]
    return said if same is None else f"{said}. {same:.0%} of the greedy tokens are the same"


def _verdict(expected: str | None, model: str | None, verdict: str, **known: Any) -> dict[str, Any]:
    absent = dict.fromkeys(("answers_as", "difference", "same_tokens", "reason"))
    return (
        {"expected": expected, "model": model, "verdict": verdict, "requests": 0} | absent | known
    )


def _difference(answers: Sequence[Answer], replies: Mapping[int, Reply]) -> float:
    """Root mean square over the likeliest tokens, and over likely ones that both list."""
    squares = list[float]()
    for number, reply in replies.items():
        answer, given = answers[number], reply.log_probs
        tops = {likeliest(answer), likeliest(given)}
        both = {token for token in answer.keys() & given.keys() if answer[token] > LIKELY}
        squares += [(log_prob(answer, t) - log_prob(given, t)) ** 2 for t in tops | both]
    return math.sqrt(sum(squares) / len(squares))


def _other_tokens(answers: Sequence[Answer], replies: Mapping[int, Reply]) -> float:
    same = [reply.token == likeliest(answers[number]) for number, reply in replies.items()]
    return 1 - sum(same) / len(same)
