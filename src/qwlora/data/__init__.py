"""Documents from files, tables, modules and the hub; and from documents the sequences that are trained on and evaluated on.

    read      a source to documents of one kind: running text, prompts with completions, or conversations
    split     training and held-out documents, with nothing of one in the other
    encode    documents to tokens, each with whether it is learnt
    cut       tokens to sequences of equal length
    prepare   all of it for one model's tokenizer, with the counts

Importing this imports neither torch nor transformers.
"""

from __future__ import annotations

from qwlora.data.document import Completion, Conversation, Document, Documents, Text
from qwlora.data.held_out_split import split_documents
from qwlora.data.prepared_data import Cutting, Prepared, prepare, sequences
from qwlora.data.read_source import Reading, locate_documents, read_documents
from qwlora.data.records import Columns

__all__ = [
    "Columns",
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
    "sequences",
]


def load_documents(
    source: str, held_out: float, seed: int, reading: Reading | None = None
) -> Documents:
    """Read and split `source`; the share `held_out` of its characters (at least one document) is kept from training.

    Raises:
        SourceError: nothing is there, a record is bad (file and line are named), or it is empty.
        MissingExtraError: what reads such a source is not installed.
    """
    reading = reading or Reading()
    documents, skipped = read_documents(source, reading)
    return split_documents(documents, held_out, seed, skipped)
