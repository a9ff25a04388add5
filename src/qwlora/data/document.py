"""The documents of a source, all of one kind, and their split into training and held out.

    Text           every token counts in the loss
    Completion     a prompt, and a completion, which counts in the loss; a chat template may make
                   them a message of the user and one of the assistant
    Conversation   messages; those of the assistant count in the loss

Each knows its place (`file:line`, or `source row N`), so that later messages can name it.

Documents are shuffled with the recipe's seed and split, unless `data.evaluation` names the held-out
ones. Then no content is in both parts, unless `data.repeated` is `keep`. A held-out record is
removed if the training part has its prompt with its answer. For a conversation, that is each of its
answers after the same messages. Paragraphs longer than a line are removed from training text if
they are held out. Equal answers to different prompts (labels, canned replies) stay. Spacing is
ignored.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qwlora.errors import SourceError

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
_LINE = 80  # characters


class _Document:
    kind: ClassVar[str]

    @property
    def identity(self) -> str:
        # Two documents with equal content are equal, wherever they are.
        content = {name: value for name, value in vars(self).items() if name != "where"}
        return json.dumps(content, sort_keys=True, default=str)


@dataclass(frozen=True)
class Text(_Document):
    """Running text."""

    text: str
    where: str = ""
    kind = "text"
    exchanges: ClassVar[frozenset[str]] = frozenset()

    @property
    def characters(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Completion(_Document):
    """A prompt, also as a user's message if that is another text, and what should follow it."""

    prompt: str
    completion: str
    where: str = ""
    user_message: str | None = None
    kind = "completions"

    @property
    def characters(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def exchanges(self) -> frozenset[str]:
        return frozenset([json.dumps([_normal(self.prompt), _normal(self.completion)])])

    def as_conversation(self) -> Conversation:
        """The prompt as a message of the user, and the completion as the assistant's."""
        asked = self.prompt if self.user_message is None else self.user_message
        contents = {"user": asked, ASSISTANT: self.completion}
        messages = ({"role": role, "content": content} for role, content in contents.items())
        where = f"{self.where} (data.prompt_format: plain needs no chat template)"
        return Conversation(tuple(messages), where)


@dataclass(frozen=True)
class Conversation(_Document):
    """Messages for a chat template: mappings with `role`, `content`, and what else it supports.

    Args:
        tools: JSON schemas of the functions that may be called; rendered, but not in the loss.
    """

    messages: tuple[Mapping[str, Any], ...]
    where: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    kind = "conversations"

    @property
    def characters(self) -> int:
        return sum(len(m.get("content") or "") for m in self.messages)

    @property
    def exchanges(self) -> frozenset[str]:
        # Digests of all messages so far: lists of them would take the square of their number.
        so_far, found = hashlib.sha256(), set[str]()
        for message in self.messages:
            same = {**message, "content": _normal(message.get("content") or "")}
            so_far.update(json.dumps(same, sort_keys=True, default=str).encode())
            if message["role"] == ASSISTANT:
                found.add(so_far.hexdigest())
        return frozenset(found)


Document = Text | Completion | Conversation
"""`characters` is the length of all its text; `exchanges` are its answers, each with all that comes
before it; running text has none."""
Parts = tuple[tuple[Document, ...], tuple[Document, ...]]


@dataclass(frozen=True)
class Documents:
    """The training and held-out documents of a source, all of one kind.

    Args:
        skipped_records: empty records that were skipped (`empty_records: skip`).
        repeated_documents: held-out records removed because the training part has them.
        repeated_paragraphs: paragraphs removed from training text because they are held out.
        repeated_shares: the shares of the characters of both parts that were removed.
        unused_columns: columns with text that no document contains.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    skipped_records: int = 0
    repeated_documents: int = 0
    repeated_paragraphs: int = 0
    repeated_shares: tuple[float, float] = (0.0, 0.0)
    unused_columns: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.held_out[0].kind

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the content of all documents, in order."""
        # The marks between documents and parts: another split is other data.
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                digest.update(document.identity.encode() + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()


def split_documents(documents: Sequence[Document], held_out: float, seed: int) -> Parts:
    """Hold out the share `held_out` of all characters: at least one document, and none with more
    than both that share and half of all.

    A single text is split by position, at the end of a paragraph if one is near.

    Raises:
        SourceError: there is a single record.
    """
    if len(documents) > 1:
        return _shuffled(documents, held_out, seed)
    (only,) = documents
    if not isinstance(only, Text):
        raise SourceError(
            f"{only.where}: this is the only record. At least two are needed: one to train on, "
            "one to evaluate on"
        )
    text = only.text
    cut = int(len(text) * (1 - held_out))
    near = text.rfind("\n\n", cut - len(text) // 20, cut)
    cut = near + 2 if near >= 0 else cut
    return (Text(text[:cut], only.where),), (Text(text[cut:], only.where),)


def _shuffled(documents: Sequence[Document], held_out: float, seed: int) -> Parts:
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    total = sum(d.characters for d in shuffled)
    wanted = held_out * total
    # A document with most of the text comes last, so that it is trained on: held out by chance, it
    # would leave only the rest.
    shuffled.sort(key=lambda d: d.characters > max(wanted, total / 2))
    count, characters = 1, shuffled[0].characters
    while characters < wanted and count < len(shuffled) - 1:
        characters += shuffled[count].characters
        count += 1
    return tuple(shuffled[count:]), tuple(shuffled[:count])


def without_repeated(
    train: tuple[Document, ...], held_out: tuple[Document, ...], skipped: int = 0
) -> Documents:
    """Both parts without the content of one that is in the other.

    Args:
        skipped: number of empty records, for `Documents`.

    Raises:
        SourceError: nothing is left of a part.
    """
    # Documentation repeats itself: 37 % of the held-out characters of `pydoc_data.topics` were also
    # in training topics, which made the adapter look better than it is (docs/log/data.md).
    texts = [d.text for d in held_out if isinstance(d, Text)]
    paragraphs = {_normal(paragraph) for text in texts for paragraph in text.split("\n\n")}
    # Shorter ones, such as a heading, are equal without being repeated.
    paragraphs = {paragraph for paragraph in paragraphs if len(paragraph) > _LINE}
    kept, removed = list[Document](), 0
    for document in train:
        if isinstance(document, Text):
            every = document.text.split("\n\n")
            others = [p for p in every if _normal(p) not in paragraphs]
            removed += len(every) - len(others)
            if not (text := "\n\n".join(others)).strip():
                continue
            document = Text(text, document.where)
        kept.append(document)
    trained = frozenset[str]().union(*(d.exchanges for d in kept))
    new = tuple(d for d in held_out if not d.exchanges or not d.exchanges <= trained)
    for part, name in ((kept, "training"), (new, "held-out")):
        if not part and any(d.characters for d in train):
            raise SourceError(
                f"the {name} part is empty: all of its text also occurs in the other part. Remove "
                "duplicates, add documents, or set data.repeated: keep"
            )
    shares = _lost(train, kept), _lost(held_out, new)
    return Documents(tuple(kept), new, skipped, len(held_out) - len(new), removed, shares)


def _lost(before: Sequence[Document], after: Sequence[Document]) -> float:
    """The share of all characters that is gone."""
    characters = [sum(document.characters for document in part) for part in (before, after)]
    return 1 - characters[1] / max(1, characters[0])


def _normal(text: str) -> str:
    return " ".join(text.split())
