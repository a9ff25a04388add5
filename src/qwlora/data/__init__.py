"""Documents from files, tables, modules and the hub, and the token sequences made from them.

    read_source        source -> documents of one kind: text, completions or conversations
    document           the kinds, and training and held-out documents without overlap
    tokenization       documents -> tokens, each with whether it counts in the loss
    sequences          tokens -> sequences of equal length
    prepared_data      all of it for one model's tokenizer, with the counts

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from qwlora.data.document import Completion as Completion
from qwlora.data.document import Conversation as Conversation
from qwlora.data.document import Document as Document
from qwlora.data.document import Documents as Documents
from qwlora.data.document import Text as Text
from qwlora.data.prepared_data import Cutting as Cutting
from qwlora.data.prepared_data import PreparedText as PreparedText
from qwlora.data.prepared_data import prepare as prepare
from qwlora.data.read_source import Reading as Reading
from qwlora.data.read_source import load_documents as load_documents
from qwlora.data.read_source import locate_documents as locate_documents
