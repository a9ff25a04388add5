"""The documents of a source, all of one kind.

    Text           every token counts in the loss
    Completion     a prompt, and a completion, which counts in the loss; a chat template may make
                   them a message of the user and one of the assistant
    Conversation   messages; those of the assistant count in the loss

Each knows its place (`file:line`, or `source row N`), so that later messages can name it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")


@dataclass(frozen=True)
class Text:
    """Running text."""

    text: str
    where: str = ""
    kind = "text"
    answers: ClassVar[tuple[str, ...]] = ()  # what counts in the loss, except running text

    @property
    def characters(self) -> int:
        return len(self.text)

    @property
    def identity(self) -> str:
        """Equal for two documents with equal content."""
        return self.text


@dataclass(frozen=True)
class Completion:
    """A prompt, and the text that should follow it.

    Args:
        user_message: the prompt as a user's message. Default: the prompt itself.
    """

    prompt: str
    completion: str
    where: str = ""
    user_message: str | None = None
    kind = "completions"

    @property
    def characters(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def identity(self) -> str:
        """Equal for two documents with equal content."""
        return json.dumps([self.prompt, self.completion])

    @property
    def answers(self) -> tuple[str, ...]:
        """What counts in the loss."""
        return (self.completion,)


@dataclass(frozen=True)
class Conversation:
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
    def identity(self) -> str:
        """Equal for two documents with equal content."""
        return json.dumps(
            [self.messages, self.tools] if self.tools else self.messages,
            sort_keys=True,
            default=str,
        )

    @property
    def answers(self) -> tuple[str, ...]:
        """What counts in the loss."""
        return tuple(m.get("content") or "" for m in self.messages if m["role"] == ASSISTANT)


def as_conversation(document: Completion) -> Conversation:
    """The prompt as a message of the user, and the completion as the assistant's."""
    asked = document.prompt if document.user_message is None else document.user_message
    return Conversation(
        (
            {"role": "user", "content": asked},
            {"role": ASSISTANT, "content": document.completion},
        ),
        document.where,
    )


Document = Text | Completion | Conversation


@dataclass(frozen=True)
class Documents:
    """The training and held-out documents of a source, all of one kind.

    Args:
        skipped_records: empty records that were skipped (`empty_records: skip`).
        overlapping_documents: training documents removed because they repeat held-out ones.
        overlapping_paragraphs: paragraphs removed from training texts for the same reason.
    """

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
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                digest.update(document.identity.encode() + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()
