"""A conversation to tokens, with the assistant's marked.

The text is what the tokenizer's own chat template renders. Which of its tokens are the assistant's:

    the template has {% generation %} markers    what is between them, as transformers finds it
    it has none                                  for the assistant's message i, what `render(messages[:i + 1])` adds to
                                                 `render(messages[:i], add_generation_prompt=True)`

The second holds if each of these renderings is the beginning of the whole one. That is checked for every message. A template that renders a past message
otherwise than a present one (some leave the reasoning of earlier turns out) is refused: with `turns: apart` each turn is rendered as the last, as it is at
inference. A template that takes no notice of `add_generation_prompt` writes its header into that difference; then the message begins where its content does,
with the spaces before it, and without a header (`[/INST] Hi`) at the difference's begin: SentencePiece has one token for a word and the space before it.

transformers renders no empty conversation: an assistant that speaks first begins after the generation prompt (a lone question's) in what two renderings of its
message share, one of them with another content.

Tools are rendered with the messages, and not learnt. A template that leaves them out is refused.

White space after the special token that ends a turn is not learnt: generation stops before it. A token belongs to the message in which its first character is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwlora.data.document import ASSISTANT, Conversation
from qwlora.errors import SourceError, foreign_as
from qwlora.system.time_limit import SECONDS, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, last_only: bool = False
) -> tuple[list[int], list[bool]]:
    """(ids, whether each is learnt), both [tokens].

    Args:
        last_only: learn the assistant's last message only.

    Raises:
        SourceError: there is no chat template, it refuses the conversation or leaves out its tools, or it does not show which tokens are the assistant's.
    """
    if not tokenizer.chat_template:
        raise SourceError(
            "the model's tokenizer has no chat template, so messages cannot be rendered: name a file with one in data.chat_template, "
            "or give prompt and completion"
        )
    if not tokenizer.is_fast:
        raise SourceError(
            f"the tokenizer ({type(tokenizer).__name__}) does not say where its tokens stand in a text; conversations need a fast tokenizer"
        )
    _check_tools_are_rendered(conversation, tokenizer)
    if _GENERATION.search(tokenizer.get_chat_template(tools=_tools(conversation))):
        ids, learnt = _encode_marked(conversation, tokenizer)
        if last_only:
            end = max((i for i, flag in enumerate(learnt) if flag), default=-1) + 1
            start = next((i + 1 for i in range(end - 1, -1, -1) if not learnt[i]), 0)
            learnt = [flag and start <= i for i, flag in enumerate(learnt)]
    else:
        text = _render(conversation.messages, conversation, tokenizer)
        spans = _assistant_spans(conversation, text, tokenizer, last_only)
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        learnt = [any(start <= first < end for start, end in spans) for first, _ in offsets]
    if not any(learnt):
        raise SourceError(
            f"{conversation.where}: the chat template leaves nothing of what the {ASSISTANT} says to learn from"
        )
    return ids, learnt


def turns_apart(conversation: Conversation) -> list[Conversation]:
    """The conversation up to each of the assistant's messages."""
    ends = [
        i + 1 for i, message in enumerate(conversation.messages) if message["role"] == ASSISTANT
    ]
    return [replace(conversation, messages=conversation.messages[:end]) for end in ends]


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def _encode_marked(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    with _rendering(conversation.messages, conversation.where):
        encoded: Any = tokenizer.apply_chat_template(
            [dict(m) for m in conversation.messages],
            tools=_tools(conversation),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    return encoded["input_ids"], [bool(flag) for flag in encoded["assistant_masks"]]


def _render(
    messages: Messages,
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    prompt: bool = False,
) -> str:
    with _rendering(messages, conversation.where):
        rendered: Any = tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tools=_tools(conversation),
            tokenize=False,
            add_generation_prompt=prompt,
        )
    return str(rendered)


@contextmanager
def _rendering(messages: Messages, where: str) -> Iterator[None]:
    """A chat template at work: a limit on its time, and its errors as one of ours."""
    late = SourceError(
        f"{where}: the model's chat template has not rendered this conversation after "
        f"{SECONDS:g} s; name a file with another template in data.chat_template"
    )
    roles = ", ".join(m["role"] for m in messages)
    what = f"{where}: the model's chat template refuses these messages ({roles})"
    with foreign_as(SourceError, what), time_limit(late):
        yield


def _tools(conversation: Conversation) -> list[Any] | None:
    return [dict(tool) for tool in conversation.tools] or None


def _check_tools_are_rendered(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> None:
    if not conversation.tools:
        return
    rendered = _render(conversation.messages, conversation, tokenizer)
    try:
        without = _render(conversation.messages, replace(conversation, tools=()), tokenizer)
    except SourceError:  # the template does not do without them
        return
    if rendered == without:
        raise SourceError(
            f"{conversation.where}: the model's chat template takes no notice of tools, so their definitions would be left out: "
            f"name a file with a template that renders them in data.chat_template, or take the field 'tools' out of the records"
        )


def _assistant_spans(
    conversation: Conversation, text: str, tokenizer: PreTrainedTokenizerBase, last_only: bool
) -> list[tuple[int, int]]:
    """(start, end) in characters of `text` of each message of the assistant, or of the last."""
    endings = tuple(
        {
            *tokenizer.all_special_tokens,
            *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special),
        }
    )
    spans = []
    spoken_by_assistant = [
        i for i, message in enumerate(conversation.messages) if message["role"] == ASSISTANT
    ]
    for i in spoken_by_assistant[-1 if last_only else 0 :]:
        where = f"{conversation.where}: message {i + 1}"
        after = _render(conversation.messages[: i + 1], conversation, tokenizer)
        start = (
            _start_after_others(conversation, i, after, tokenizer, where)
            if i
            else _start_of_greeting(conversation, after, tokenizer, where)
        )
        if start is None or not text.startswith(after):
            raise SourceError(
                f"{where}: the chat template renders this message otherwise when another follows or before it is answered, so which tokens are the "
                f"{ASSISTANT}'s cannot be told. Use data.turns: apart, or a template with {{% generation %}} markers (data.chat_template)"
            )
        end = len(after)
        spoken = after[start:end].rstrip()
        spans.append((start, start + len(spoken) if spoken.endswith(endings) else end))
    return spans


def _start_after_others(
    conversation: Conversation, i: int, text: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> int | None:
    """Where the assistant begins in `text`, which ends with message i; None if what is before it is not the beginning of `text`."""
    before = _render(conversation.messages[:i], conversation, tokenizer, prompt=True)
    if not text.startswith(before):
        return None
    if before == _render(conversation.messages[:i], conversation, tokenizer):
        return _content_start(conversation.messages[i], text, len(before), where)
    return len(before)


def _start_of_greeting(
    conversation: Conversation, text: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> int | None:
    """The same for a message with none before it: after the last generation prompt in what is there whatever the message says."""
    greeting = conversation.messages[0]
    content = greeting.get("content") or ""
    other = next(c for c in "abc" if c not in (content[:1], content.strip()[:1]))
    header = text[
        : shared(text, _render([{**greeting, "content": other}], conversation, tokenizer))
    ]
    question = [{"role": "user", "content": "a"}]
    unasked, asked = (
        _render(question, conversation, tokenizer, prompt) for prompt in (False, True)
    )
    if unasked == asked:
        return _content_start(greeting, text, 0, where, earliest=len(header))
    prompt = asked[shared(unasked, asked) :].lstrip()
    return header.rfind(prompt) + len(prompt) if prompt in header else None


def _content_start(
    message: Mapping[str, Any], text: str, start: int, where: str, earliest: int = 0
) -> int:
    """Where the content begins, with the spaces before it, for a template whose generation prompt is empty."""
    content = (message.get("content") or "").strip()
    found = text.find(content, max(start, earliest)) if content else -1
    if found < 0:
        raise SourceError(
            f"{where}: the chat template has no generation prompt and changes the content, so which tokens are the {ASSISTANT}'s cannot be told"
        )
    header = text[start:found]
    return start + len(header.rstrip(" ")) if header.strip() else start
