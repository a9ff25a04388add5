"""Documents from files, tables, modules and the hub, and the token sequences made from them.

    read_source        source -> documents of one kind: text, completions or conversations
    document           the kinds, and training and held-out documents without overlap
    tokenization       documents -> tokens, each with whether it counts in the loss
    sequences          tokens -> sequences of equal length
    prepared_data      all of it for one model's tokenizer, with the counts

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from qwlora.data.document import Completion, Conversation, Document, Documents, Text
from qwlora.data.prepared_data import Cutting, PreparedText, prepare
from qwlora.data.read_source import Reading, load_documents, locate_documents

__all__ = [
    "Completion",
    "Conversation",
    "Cutting",
    "Document",
    "Documents",
    "PreparedText",
    "Reading",
    "Text",
    "load_documents",
    "locate_documents",
    "prepare",
]
