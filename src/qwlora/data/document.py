"""What a source is made of: documents of one kind.

    Text           everything in it is learnt
    Completion     a prompt, and the completion that is learnt
    Conversation   messages, of which the assistant's are learnt

Each knows where it stands (`file:line`, or `source row N`), so that whatever is found wrong with it later can be found by a reader too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")


@dataclass(frozen=True)
class Text:
    """Running text."""

    text: str
    where: str = ""
    kind = "text"

    @property
    def characters(self) -> int:
        return len(self.text)

    @property
    def identity(self) -> str:
        """The same for two documents that say the same."""
        return self.text

    @property
    def answers(self) -> tuple[str, ...]:
        """Parts that are learnt, apart from running text."""
        return ()


@dataclass(frozen=True)
class Completion:
    """What is given, and what should follow."""

    prompt: str
    completion: str
    where: str = ""
    kind = "completions"

    @property
    def characters(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def identity(self) -> str:
        """The same for two documents that say the same."""
        return json.dumps([self.prompt, self.completion])

    @property
    def answers(self) -> tuple[str, ...]:
        """Parts that are learnt."""
        return (self.completion,)


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them: mappings with `role`, `content`, and whatever else the template knows.

    Args:
        tools: definitions of the functions that may be called, JSON schemas; they are rendered, and not learnt.
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
        """The same for two documents that say the same."""
        return json.dumps(
            [self.messages, self.tools] if self.tools else self.messages,
            sort_keys=True,
            default=str,
        )

    @property
    def answers(self) -> tuple[str, ...]:
        """Parts that are learnt."""
        return tuple(m.get("content") or "" for m in self.messages if m["role"] == ASSISTANT)


Document = Text | Completion | Conversation


@dataclass(frozen=True)
class Documents:
    """Both parts of a source, all of one kind.

    Args:
        skipped_records: empty records that the recipe let pass.
        overlapping_documents: training documents taken out, since what they teach is held out.
        overlapping_paragraphs: paragraphs taken out of training texts for the same reason.
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
        """Hex digest of all that is said, in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                digest.update(document.identity.encode() + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()
