"""Documents to tokens, each with whether it is learnt.

    Text           its tokens and the end-of-sequence token, all learnt; may be cut anywhere
    Completion     what the tokenizer puts before a text, the prompt, the completion, the end-of-sequence token; the last two are learnt
    Conversation   what the chat template says (see `chat`)

A completion is tokenized together with its prompt if the prompt's tokens are the same then, and apart otherwise: at inference the prompt stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwlora.data.chat import encode_conversation, turns_apart
from qwlora.data.document import Completion, Conversation, Document, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """A document's tokens.

    Args:
        ids, learnt: [tokens].
        divisible: running text, which may be cut; its sequences begin with what the tokenizer puts before a text.
    """

    ids: list[int]
    learnt: list[bool]
    divisible: bool = False


def encode_documents(documents: Sequence[Document | str], tokenizer: PreTrainedTokenizerBase, turns: str = "together") -> list[Tokens]:
    """Tokens of each document; of each turn, if `turns` is `apart`.

    Raises:
        SourceError: see `encode_conversation`.
    """
    encoded: list[Tokens] = []
    start = start_tokens(tokenizer)
    for document in documents:
        if isinstance(document, str | Text):
            text = document if isinstance(document, str) else document.text
            ids = [*_ids(text, tokenizer), *_end(tokenizer)]
            encoded.append(Tokens(ids, [True] * len(ids), divisible=True))
        elif isinstance(document, Completion):
            encoded.append(_encode_completion(document, tokenizer, start))
        else:
            apart = turns == "apart"
            encoded += [Tokens(*encode_conversation(c, tokenizer, last_only=apart)) for c in _conversations(document, apart)]
    return encoded


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text of its own accord."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at]
    return []


def _encode_completion(document: Completion, tokenizer: PreTrainedTokenizerBase, start: list[int]) -> Tokens:
    prompt = _ids(document.prompt, tokenizer)
    both = _ids(document.prompt + document.completion, tokenizer)
    completion = both[len(prompt) :] if both[: len(prompt)] == prompt else _ids(document.completion, tokenizer)
    if completion[-1:] != _end(tokenizer):
        completion = [*completion, *_end(tokenizer)]
    return Tokens([*start, *prompt, *completion], [False] * (len(start) + len(prompt)) + [True] * len(completion))


def _conversations(document: Conversation, apart: bool) -> list[Conversation]:
    return turns_apart(document) if apart else [document]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
