"""Token ids of whole documents, one after the other, as the benchmarks read them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwlora.data import Document
from qwlora.data.sequence_packing import joined_ids
from qwlora.data.tokenization import encode_documents, start_tokens


def concatenated_ids(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, tokens: int, part: str
) -> Tensor:
    """Token ids [count, tokens] of the concatenated documents; `part` names them in errors."""
    return joined_ids(encode_documents(documents, tokenizer), tokens, start_tokens(tokenizer), part)
