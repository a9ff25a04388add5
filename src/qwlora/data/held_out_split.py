"""Training and held-out documents without overlap.

Documents are shuffled with the recipe's seed and split. Then held-out content is removed from the
training part: paragraphs longer than a line from running text; and records that equal a held-out
record, or contain a held-out answer longer than a line word for word. Spacing is ignored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from qwlora.data.document import Document, Documents, Text
from qwlora.errors import SourceError

_LINE = 80


def split_documents(
    documents: Sequence[Document], held_out: float, seed: int, skipped: int = 0
) -> Documents:
    """Hold out the share `held_out` of all characters, and at least one document.

    A single text is split by position, at the end of a paragraph if one is near.

    Raises:
        SourceError: there is a single record, or nothing is left to train on.
    """
    if len(documents) == 1:
        (only,) = documents
        if not isinstance(only, Text):
            raise SourceError(
                f"{only.where}: this is the only record. At least two are needed: one to train on, "
                "one to evaluate on"
            )
        text = only.text
        wanted_cut = int(len(text) * (1 - held_out))
        near = text.rfind("\n\n", wanted_cut - len(text) // 20, wanted_cut)
        cut = near + 2 if near >= 0 else wanted_cut
        return _without_overlap(
            (Text(text[:cut], only.where),), (Text(text[cut:], only.where),), skipped
        )
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    wanted, count, characters = (
        held_out * sum(d.characters for d in shuffled),
        1,
        shuffled[0].characters,
    )
    while characters < wanted and count < len(shuffled) - 1:
        characters += shuffled[count].characters
        count += 1
    return _without_overlap(tuple(shuffled[count:]), tuple(shuffled[:count]), skipped)


def _without_overlap(
    train: tuple[Document, ...], held_out: tuple[Document, ...], skipped: int
) -> Documents:
    paragraphs = {
        p
        for document in held_out
        if isinstance(document, Text)
        for p in map(_normal, document.text.split("\n\n"))
        if len(p) > _LINE
    }
    identities = {_normal(d.identity) for d in held_out if not isinstance(d, Text)}
    answers = {
        answer
        for document in held_out
        for answer in map(_normal, document.answers)
        if len(answer) > _LINE
    }
    kept: list[Document] = []
    removed_paragraphs = 0
    for document in train:
        if isinstance(document, Text):
            every = document.text.split("\n\n")
            others = [p for p in every if _normal(p) not in paragraphs]
            removed_paragraphs += len(every) - len(others)
            if (text := "\n\n".join(others)).strip():
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


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())
