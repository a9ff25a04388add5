"""Documents to tokens, each with whether it counts in the loss.

    Text           its tokens and the end-of-sequence token, all in the loss; may be cut anywhere
    Completion     what the tokenizer puts before a text, the prompt, the completion and the
                   end-of-sequence token; the last two are in the loss. With a chat template, a
                   conversation of two messages (`renders_pairs`)
    Conversation   what the chat template renders (see `chat`)

At inference the prompt is tokenized alone, so it is here. The tokens of the completion are the
first of these that leave the decoded text unchanged:

    1. what follows the prompt's tokens when both are tokenized together, if these begin with them
    2. the completion tokenized alone
    3. what follows a sentinel, tokenized with it and cut off again: `yes`, where the tokenizer
       would put a space before a text (`▁yes`, SentencePiece)

Otherwise both are tokenized together, and the loss begins at the first token that differs from the
prompt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwlora.data.chat import common_prefix_length, encode_conversation, split_turns
from qwlora.data.document import Completion, Document, Text
from qwlora.errors import SourceError
from qwlora.system.progress import Track, untracked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINELS = ("\n", ".", "a")


@dataclass(frozen=True)
class Tokens:
    """A document's tokens.

    Args:
        ids, in_loss: [tokens].
        divisible: running text, which may be cut; each piece begins with the start tokens.
        document: number of the document in its part of the source; turns of one conversation
            share it.
    """

    ids: list[int]
    in_loss: list[bool]
    divisible: bool = False
    document: int = 0


def encode_documents(
    documents: Sequence[Document | str],
    tokenizer: PreTrainedTokenizerBase,
    turns: str = "together",
    prompt_format: str = "auto",
    track: Track = untracked,
) -> list[Tokens]:
    """Tokens of each document, or of each turn if `turns` is `apart`.

    Args:
        prompt_format: of completions; see `renders_pairs`.

    Raises:
        SourceError: see `encode_conversation`.
    """
    encoded: list[Tokens] = []
    as_chat, start = renders_pairs(tokenizer, prompt_format), start_tokens(tokenizer)
    for number, document in enumerate(track(documents, "tokenizing", len(documents))):
        if isinstance(document, str | Text):
            text = document if isinstance(document, str) else document.text
            ids = [*_ids(text, tokenizer), *_end(tokenizer)]
            encoded.append(Tokens(ids, [True] * len(ids), divisible=True, document=number))
        elif isinstance(document, Completion) and as_chat:
            try:
                pair = encode_conversation(document.as_conversation(), tokenizer)
            except SourceError as error:
                raise SourceError(
                    f"{error}. To train on prompts and completions without the chat template, set "
                    "data.prompt_format: plain"
                ) from error
            encoded.append(Tokens(*pair, document=number))
        elif isinstance(document, Completion):
            prompt, completion = _prompt_and_completion(document, tokenizer)
            if completion[-1:] != (end := _end(tokenizer)):
                completion = [*completion, *end]
            in_loss = [False] * len(start + prompt) + [True] * len(completion)
            encoded.append(Tokens(start + prompt + completion, in_loss, document=number))
        else:
            apart = turns == "apart"
            encoded += [
                Tokens(*encode_conversation(c, tokenizer, last_only=apart), document=number)
                for c in (split_turns(document) if apart else [document])
            ]
    return encoded


def renders_pairs(tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> bool:
    """Whether completions are rendered with the chat template: `auto`, and there is one."""
    return prompt_format == "auto" and bool(tokenizer.chat_template)


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the tokenizer puts before every text, such as BOS."""
    bare = _ids("a", tokenizer)
    full: list[int] = tokenizer("a")["input_ids"]
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at]
    return []


def _prompt_and_completion(
    document: Completion, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    prompt = _ids(document.prompt, tokenizer)
    both = _ids(document.prompt + document.completion, tokenizer)
    if both[: len(prompt)] == prompt:
        return prompt, both[len(prompt) :]
    for sentinel in ("", *_SENTINELS):
        cut = len(_ids(sentinel, tokenizer)) if sentinel else 0
        completion = _ids(sentinel + document.completion, tokenizer)[cut:]
        if _decoded([*prompt, *completion], tokenizer) == _decoded(both, tokenizer):
            return prompt, completion
    same = common_prefix_length(prompt, both)
    return both[:same], both[same:]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
