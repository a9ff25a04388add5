"""The documents of a source, all of one kind, and their split into training and held out.

    Text           every token counts in the loss
    Completion     a prompt, and a completion, which counts in the loss; a chat template may make
                   them a message of the user and one of the assistant
    Conversation   messages; those of the assistant count in the loss

Each knows its place (`file:line`, or `source row N`), so that later messages can name it. After the
split, held-out content is removed from the training part.
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
    answers: ClassVar[tuple[str, ...]] = ()

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
    def answers(self) -> tuple[str, ...]:
        return (self.completion,)

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
    def answers(self) -> tuple[str, ...]:
        return tuple(m.get("content") or "" for m in self.messages if m["role"] == ASSISTANT)


Document = Text | Completion | Conversation
"""`characters` is the length of all its text; `answers` are the texts that count in the loss, none
for running text, where all of it does."""


@dataclass(frozen=True)
class Documents:
    """The training and held-out documents of a source, all of one kind; how many empty records were
    skipped, and what was removed from the training part because it repeats held-out content."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    skipped_records: int = 0
    overlapping_documents: int = 0
    overlapping_paragraphs: int = 0

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


def split_documents(
    documents: Sequence[Document], held_out: float, seed: int, skipped: int = 0
) -> Documents:
    """Hold out the share `held_out` of all characters: at least one document, and none with more
    than both that share and half of all. SourceError if nothing is left to train on."""
    if len(documents) == 1:
        (only,) = documents
        if not isinstance(only, Text):
            raise SourceError(
                f"{only.where}: this is the only record. At least two are needed: one to train on, "
                "one to evaluate on"
            )
        # Split by position, at the end of a paragraph if one is near.
        text = only.text
        cut = int(len(text) * (1 - held_out))
        near = text.rfind("\n\n", cut - len(text) // 20, cut)
        cut = near + 2 if near >= 0 else cut
        parts = Text(text[:cut], only.where), Text(text[cut:], only.where)
        return _without_overlap(parts[:1], parts[1:], skipped)
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
    return _without_overlap(tuple(shuffled[count:]), tuple(shuffled[:count]), skipped)


def _without_overlap(
    train: tuple[Document, ...], held_out: tuple[Document, ...], skipped: int
) -> Documents:
    # Documentation repeats itself: 37 % of the held-out characters of `pydoc_data.topics` were also
    # in training topics, which made the adapter look better than it is (docs/log/data.md).
    texts = [d.text for d in held_out if isinstance(d, Text)]
    paragraphs = {_normal(paragraph) for text in texts for paragraph in text.split("\n\n")}
    answers = {_normal(answer) for document in held_out for answer in document.answers}
    # Shorter ones, such as a heading or `yes`, are equal without being repeated.
    paragraphs, answers = ({t for t in part if len(t) > _LINE} for part in (paragraphs, answers))
    identities = {_normal(d.identity) for d in held_out}
    kept: list[Document] = []
    removed_paragraphs = 0
    for document in train:
        if isinstance(document, Text):
            every = document.text.split("\n\n")
            kept_paragraphs = [p for p in every if _normal(p) not in paragraphs]
            removed_paragraphs += len(every) - len(kept_paragraphs)
            if (text := "\n\n".join(kept_paragraphs)).strip():
                kept.append(Text(text, document.where))
        elif _normal(document.identity) not in identities and answers.isdisjoint(
            map(_normal, document.answers)
        ):
            kept.append(document)
    if not kept and any(d.characters for d in train):
        raise SourceError(
            "all training documents also occur in the held-out part, so nothing is left to train "
            "on. The source repeats itself: remove duplicates or add documents"
        )
    return Documents(tuple(kept), held_out, skipped, len(train) - len(kept), removed_paragraphs)


def _normal(text: str) -> str:
    return " ".join(text.split())
