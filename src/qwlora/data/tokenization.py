"""Documents to tokens, each with whether it counts in the loss.

    Text           its tokens and the end-of-sequence token, all in the loss; may be cut anywhere
    Completion     what the tokenizer puts before a text, the prompt, the completion and the
                   end-of-sequence token; the last two are in the loss. With a chat template, a
                   conversation of two messages (`renders_pairs`)
    Conversation   what the chat template renders; see below

The tokenizer's own chat template renders a conversation. Which tokens are the assistant's:

    template has {% generation %} markers   what is between them (return_assistant_tokens_mask)
    template has none                       for the assistant's message i, what
                                            `render(messages[:i + 1])` adds to
                                            `render(messages[:i], add_generation_prompt=True)`

The second method needs each of these renderings to be a prefix of the whole text, which is checked
for every message. With `turns: apart`, each turn is rendered as the last, as at inference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qwlora.data.document import ASSISTANT, Completion, Conversation, Document, Text
from qwlora.errors import SourceError, foreign_as, listed
from qwlora.system.progress import Track, untracked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINELS = ("\n", ".", "a")
Messages = Sequence[Mapping[str, Any]]
# Characters that a template may add, such as system prompts and headers.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
    """Tokens of each document, or of each turn if `turns` is `apart`; see `renders_pairs` and
    `encode_conversation`."""
    encoded: list[Tokens] = []
    as_chat, start = renders_pairs(tokenizer, prompt_format), start_tokens(tokenizer)
    for number, document in enumerate(track(documents, "tokenizing", len(documents))):
        if isinstance(document, str | Text):
            text = document if isinstance(document, str) else document.text
            ids = [*_ids(text, tokenizer), *_end(tokenizer)]
            encoded.append(Tokens(ids, [True] * len(ids), divisible=True, document=number))
        elif isinstance(document, Completion) and as_chat:
            pair = encode_conversation(document.as_conversation(), tokenizer)
            encoded.append(Tokens(*pair, document=number))
        elif isinstance(document, Completion):
            prompt, completion = _prompt_and_completion(document, tokenizer)
            if completion[-1:] != (end := _end(tokenizer)):
                completion = [*completion, *end]
            in_loss = [False] * len(start + prompt) + [True] * len(completion)
            encoded.append(Tokens(start + prompt + completion, in_loss, document=number))
        else:
            apart, messages = turns == "apart", document.messages
            ends = [i for i, m in enumerate(messages, 1) if m["role"] == ASSISTANT]
            for stop in ends if apart else [len(messages)]:
                turn = replace(document, messages=messages[:stop])
                pair = encode_conversation(turn, tokenizer, last_only=apart)
                encoded.append(Tokens(*pair, document=number))
    return encoded


def renders_pairs(tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> bool:
    """Whether completions are rendered with the chat template: `auto`, and there is one."""
    return prompt_format == "auto" and bool(tokenizer.chat_template)


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the tokenizer puts before every text, such as BOS."""
    # A tokenizer may have a BOS and not put it before a text, or put other tokens there.
    bare = _ids("a", tokenizer)
    full: list[int] = tokenizer("a")["input_ids"]
    places = range(len(full) - len(bare) + 1)
    return next((full[:at] for at in places if full[at : at + len(bare)] == bare), [])


def _prompt_and_completion(
    document: Completion, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    # At inference, the prompt is tokenized alone, so it is here. The tokens of the completion are
    # the first below that leave the decoded text unchanged.
    prompt = _ids(document.prompt, tokenizer)
    both = _ids(document.prompt + document.completion, tokenizer)
    if both[: len(prompt)] == prompt:
        return prompt, both[len(prompt) :]
    # SentencePiece puts a space before a text (`▁yes`). After a sentinel it does not, and the
    # sentinel's tokens are cut off again.
    for sentinel in ("", *_SENTINELS):
        cut = len(_ids(sentinel, tokenizer)) if sentinel else 0
        completion = _ids(sentinel + document.completion, tokenizer)[cut:]
        if _decoded([*prompt, *completion], tokenizer) == _decoded(both, tokenizer):
            return prompt, completion
    same = common_prefix_length(prompt, both)
    return both[:same], both[same:]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Verbose, transformers warns of each text that is longer than the model's positions.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    # Cleaning up removes spaces before punctuation, so that other tokens give the same text.
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []


def encode_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, last_only: bool = False
) -> tuple[list[int], list[bool]]:
    """(ids, whether each counts in the loss), both [tokens]; with `last_only`, only the assistant's
    last message does.

    Raises:
        SourceError: there is no chat template; it refuses the conversation or leaves out its
            tools; or it does not show which tokens are the assistant's.
    """
    if not tokenizer.chat_template:
        raise SourceError(
            "the model's tokenizer has no chat template, so messages cannot be rendered. Name a "
            "file with one in data.chat_template, or use prompt and completion columns"
        )
    if not tokenizer.is_fast:
        raise SourceError(
            f"the tokenizer ({type(tokenizer).__name__}) does not report the positions of its "
            "tokens in the text. Conversations need a fast tokenizer"
        )
    messages, tools, where = conversation.messages, conversation.tools, conversation.where
    rendered = partial(render, tokenizer=tokenizer, where=where, tools=tools)
    # Also for a template with markers: the error of a refused conversation names its roles.
    text = rendered(messages)
    without_tools = None
    if tools:
        # The template may require tools.
        with suppress(SourceError):
            without_tools = rendered(messages, tools=())
    if text == without_tools:
        raise SourceError(
            f"{where}: the model's chat template ignores tools, so their definitions would be "
            "lost. Name a file with a template that renders them in data.chat_template, or remove "
            "the field 'tools' from the records"
        )
    plain_tools: Any = [dict(tool) for tool in tools] or None
    if _GENERATION.search(tokenizer.get_chat_template(tools=plain_tools)):
        # Markers around nothing at the start of a text make some releases of transformers fail.
        with foreign_as(SourceError, f"{where}: the model's chat template refuses these messages"):
            encoded: Any = tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=plain_tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
        in_loss = [bool(flag) for flag in encoded["assistant_masks"]]
        if last_only:
            end = max((i for i, flag in enumerate(in_loss) if flag), default=-1) + 1
            start = next((i + 1 for i in range(end - 1, -1, -1) if not in_loss[i]), 0)
            in_loss = [flag and start <= i for i, flag in enumerate(in_loss)]
    else:
        # `all_special_tokens` has those with a role. A template may end a turn with another one.
        ends_of_turn = {
            *tokenizer.all_special_tokens,
            *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special),
        }
        speaking = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        spans = [
            _span(messages, i, text, rendered, tuple(ends_of_turn), f"{where}: message {i + 1}")
            for i in speaking[-1 if last_only else 0 :]
        ]
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        # A token belongs to the message with its first character. transformers' mask has those that
        # overlap, which differ: SmolLM2 has one token for the newline of a header and the space of
        # the answer (docs/log/data.md).
        in_loss = [
            any(start <= first < end for start, end in spans)
            for first, _ in encoded["offset_mapping"]
        ]
    if not any(in_loss):
        raise SourceError(
            f"{where}: the chat template renders no token of the {ASSISTANT}'s messages, so there "
            "is nothing to train on"
        )
    return encoded["input_ids"], in_loss


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of equal elements at the start of both."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def render(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    tools: Sequence[Mapping[str, Any]] = (),
    prompt: bool = False,
) -> str:
    """The text of `messages`, rendered with the tokenizer's chat template. With `prompt`, it ends
    with the header of the assistant's next message.

    Raises:
        SourceError: the template refuses the messages; `where` is named.
    """
    roles = listed(m["role"] for m in messages)
    refusal = f"{where}: the model's chat template refuses these messages ({roles})"
    with foreign_as(SourceError, refusal):
        return str(
            tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        )


def _span(
    messages: Messages,
    i: int,
    text: str,
    rendered: Callable[..., str],
    ends_of_turn: tuple[str, ...],
    where: str,
) -> tuple[int, int]:
    """(start, end), in characters of `text`, of the assistant's message number i."""
    after = rendered(messages[: i + 1])
    if i:
        before = rendered(messages[:i], prompt=True)
        start: int | None = len(before)
        if not after.startswith(before):
            start = None
        # A template without a generation prompt puts its header into the difference, too.
        elif before == rendered(messages[:i]):
            start = _content_start(messages[i], after, len(before), where)
    else:
        # transformers renders no empty conversation, so there is nothing before this message.
        start = _start_of_greeting(messages[0], after, rendered, where)
    # Some templates drop the reasoning of earlier turns.
    if start is None or not text.startswith(after):
        raise SourceError(
            f"{where}: the chat template renders this message differently when another follows, so "
            f"the {ASSISTANT}'s tokens cannot be located. Set data.turns: apart, or use a template "
            "with {% generation %} markers (data.chat_template)"
        )
    # Generation stops at the turn's end token, so white space after it is not in the loss.
    spoken = after[start:].rstrip()
    return start, start + len(spoken) if spoken.endswith(ends_of_turn) else len(after)


def _start_of_greeting(
    greeting: Mapping[str, Any], text: str, rendered: Callable[..., str], where: str
) -> int | None:
    """Start of a first message: after the last generation prompt in its header, if any."""
    # The header is what does not depend on the message's content.
    content = greeting.get("content") or ""
    # The other content begins with another character, so that what is equal ends before it.
    different = next(c for c in "abc" if c not in (content[:1], content.strip()[:1]))
    header = text[: common_prefix_length(text, rendered([{**greeting, "content": different}]))]
    question = [{"role": "user", "content": "a"}]
    unasked, asked = (rendered(question, prompt=prompt) for prompt in (False, True))
    if unasked == asked:
        return _content_start(greeting, text, 0, where, earliest=len(header))
    prompt = asked[common_prefix_length(unasked, asked) :].lstrip()
    return header.rfind(prompt) + len(prompt) if prompt in header else None


def _content_start(
    message: Mapping[str, Any], text: str, start: int, where: str, earliest: int = 0
) -> int:
    """Start of the content and of the spaces before it; `start` without a header (`[/INST] Hi`)."""
    content = (message.get("content") or "").strip()
    at = text.find(content, max(start, earliest)) if content else -1
    if at < 0:
        raise SourceError(
            f"{where}: the chat template has no generation prompt and changes the content, so the "
            f"{ASSISTANT}'s tokens cannot be located. Use a template with "
            "{% generation %} markers (data.chat_template)"
        )
    # SentencePiece has one token for a space and a word.
    header = text[start:at]
    return start + len(header.rstrip(" ")) if header.strip() else start
