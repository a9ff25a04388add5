"""Documents from files, tables, modules and the hub, and the token sequences made from them.

    read_source        source -> documents of one kind: text, completions or conversations
    document           the kinds, and training and held-out documents without overlap
    tokenization       documents -> tokens, each with whether it counts in the loss
    sequence_packing   tokens -> sequences of equal length
    prepared_data      all of it for one model's tokenizer, with the counts

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from qwlora.data.document import (
    Completion,
    Conversation,
    Document,
    Documents,
    Text,
    split_documents,
)
from qwlora.data.prepared_data import Cutting, Prepared, prepare
from qwlora.data.read_source import Reading, locate_documents, read_documents

__all__ = [
    "Completion",
    "Conversation",
    "Cutting",
    "Document",
    "Documents",
    "Prepared",
    "Reading",
    "Text",
    "load_documents",
    "locate_documents",
    "prepare",
]


def load_documents(
    source: str, held_out: float, seed: int, reading: Reading | None = None
) -> Documents:
    """Read and split `source`.

    Args:
        held_out: share of the characters to hold out of training; at least one document.

    Raises:
        SourceError: the source is missing or empty, or a record is bad (file and line are named).
        MissingExtraError: the package that reads this kind of source is not installed.
    """
    documents, skipped = read_documents(source, reading or Reading())
    return split_documents(documents, held_out, seed, skipped)
