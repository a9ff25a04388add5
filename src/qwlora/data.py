"""Text to equal sequences of tokens.

A source is a list of documents:

    ./file.txt                 one document
    ./folder                   one document for each .txt and .md file below it
    python:MODULE:ATTRIBUTE    strings in an installed Python module (a mapping's values, a sequence, or one string)

Documents are shuffled with the recipe's seed and split: no document is both trained on and evaluated on, and paragraphs of the held-out part that stand in a
training document too are taken out of that document. A source with a single document is split by position instead, at a paragraph's end if one is near. Within
each part the documents are joined, each followed by the tokenizer's end-of-sequence token, and cut into sequences of equal length, each beginning with what the
tokenizer puts before a text (a BOS token, or nothing); what is left over at the end is dropped.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.errors import SourceError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".md")
_LINE = 80


@dataclass(frozen=True)
class Documents:
    """The text of both parts."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Hex digest of all text, in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                digest.update(document.encode() + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()


def load_documents(source: str, held_out: float, seed: int) -> Documents:
    """Read and split `source`; the share `held_out` of its characters (at least one document) is kept from training.

    Raises:
        SourceError: nothing is there, it is not text, or it is empty.
    """
    documents = [d for d in _read(source) if d.strip()]
    if not documents:
        raise SourceError(f"data source {source!r} holds no text: every document in it is empty")
    if len(documents) == 1:
        text = documents[0]
        wanted_cut = int(len(text) * (1 - held_out))
        near = text.rfind("\n\n", wanted_cut - len(text) // 20, wanted_cut)
        cut = near + 2 if near >= 0 else wanted_cut
        return _without_overlap((text[:cut],), (text[cut:],))
    random.Random(seed).shuffle(documents)
    wanted, count = held_out * sum(map(len, documents)), 1
    while sum(map(len, documents[:count])) < wanted and count < len(documents) - 1:
        count += 1
    return _without_overlap(tuple(documents[count:]), tuple(documents[:count]))


def _without_overlap(train: tuple[str, ...], held_out: tuple[str, ...]) -> Documents:
    """Take out of `train` each paragraph of more than a line that stands in `held_out`; spacing does not count."""
    kept_back = {p for document in held_out for p in map(_normal, document.split("\n\n")) if len(p) > _LINE}
    cleaned = ("\n\n".join(p for p in document.split("\n\n") if _normal(p) not in kept_back) for document in train)
    return Documents(tuple(d for d in cleaned if d.strip()), held_out)


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())


def locate_documents(source: str) -> None:
    """See that `source` exists, without reading it.

    Raises:
        SourceError: it does not.
    """
    if source.startswith("python:"):
        module_name, _, attribute = source.removeprefix("python:").partition(":")
        try:
            found = bool(attribute) and importlib.util.find_spec(module_name) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            raise SourceError(f"data source {source!r} is not python:MODULE:ATTRIBUTE of an installed module")
    elif not Path(source).expanduser().exists():
        raise SourceError(f"data source {source!r} does not exist. Give a text file, a folder of text files, or python:MODULE:ATTRIBUTE")


def _read(source: str) -> list[str]:
    if source.startswith("python:"):
        return _read_attribute(source)
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise SourceError(f"data folder {source!r} holds no {' or '.join(SUFFIXES)} file")
        return [_read_file(file) for file in files]
    return [_read_file(path)]


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"data source {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"data source {str(path)!r} is not UTF-8 text: byte {error.start} cannot be decoded") from error


def _read_attribute(source: str) -> list[str]:
    module_name, _, attribute = source.removeprefix("python:").partition(":")
    try:
        value = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SourceError(f"data source {source!r} is not python:MODULE:ATTRIBUTE of an installed module: {error}") from error
    if isinstance(value, str):
        return [value]
    documents = list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, Sequence) else None
    if documents is None or not all(isinstance(d, str) for d in documents):
        raise SourceError(f"data source {source!r} is a {type(value).__name__}, not a string or a mapping or sequence of strings")
    return documents


def sequences(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_tokens: int, part: str) -> Tensor:
    """Token ids [count, sequence_tokens], int64.

    Args:
        part: what the documents are for, as an error should call it.

    Raises:
        SourceError: the documents are shorter than one sequence.
    """
    import torch

    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = [i for document in documents for i in [*tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"], *end]]
    start = _start_tokens(tokenizer)
    fresh = sequence_tokens - len(start)
    count = len(ids) // fresh
    if not count:
        raise SourceError(
            f"the {part} text has {len(ids)} tokens, but one sequence needs {fresh}: give more text, lower data.sequence_tokens, or change data.held_out"
        )
    rows = torch.tensor(ids[: count * fresh], dtype=torch.int64).view(count, fresh)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, len(start)), rows], dim=1)


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text of its own accord."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at]
    return []
