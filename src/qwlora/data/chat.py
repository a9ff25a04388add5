"""A conversation to tokens, with those of the assistant marked.

The tokenizer's own chat template renders the text. Which tokens are the assistant's:

    template has {% generation %} markers   what is between them (return_assistant_tokens_mask)
    template has none                       for the assistant's message i, what
                                            `render(messages[:i + 1])` adds to
                                            `render(messages[:i], add_generation_prompt=True)`

The second method needs each of these renderings to be a prefix of the whole text, which is checked
for every message. A template that renders past messages differently (some drop the reasoning of
earlier turns) is refused; with `turns: apart` each turn is rendered as the last, as at inference.

Special cases:
    no generation prompt   the template ignores `add_generation_prompt`, so its header is part of
                           the difference. The message then begins at its content, including the
                           spaces before it: SentencePiece has one token for a space and a word.
    assistant first        transformers renders no empty conversation. The message begins after
                           the generation prompt in what two renderings, with different contents,
                           have in common.
    tools                  are rendered, not in the loss; a template that ignores them is refused.
    end of a turn          white space after the turn's special end token is not in the loss:
                           generation stops before it.

A token belongs to the message that contains its first character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwlora.data.document import ASSISTANT, Conversation
from qwlora.errors import SourceError, foreign_as
from qwlora.messages import listed
from qwlora.system.time_limit import SECONDS, memory_limit, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
_MOST_ADDED = 100_000  # characters that a template may add: system prompts, headers
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, last_only: bool = False
) -> tuple[list[int], list[bool]]:
    """(ids, whether each counts in the loss), both [tokens].

    Args:
        last_only: only the assistant's last message counts in the loss.

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
    _check_tools_are_rendered(conversation, tokenizer)
    if _GENERATION.search(
        tokenizer.get_chat_template(tools=[dict(t) for t in conversation.tools] or None)
    ):
        ids, in_loss = _encode_marked(conversation, tokenizer)
        if last_only:
            end = max((i for i, flag in enumerate(in_loss) if flag), default=-1) + 1
            start = next((i + 1 for i in range(end - 1, -1, -1) if not in_loss[i]), 0)
            in_loss = [flag and start <= i for i, flag in enumerate(in_loss)]
    else:
        text = _render(conversation.messages, conversation, tokenizer)
        spans = _assistant_spans(conversation, text, tokenizer, last_only)
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        in_loss = [any(start <= first < end for start, end in spans) for first, _ in offsets]
    if not any(in_loss):
        raise SourceError(
            f"{conversation.where}: the chat template renders no token of the {ASSISTANT}'s "
            "messages, so there is nothing to train on"
        )
    return ids, in_loss


def split_turns(conversation: Conversation) -> list[Conversation]:
    """One conversation for each message of the assistant, which ends it."""
    ends = [
        i + 1 for i, message in enumerate(conversation.messages) if message["role"] == ASSISTANT
    ]
    return [replace(conversation, messages=conversation.messages[:end]) for end in ends]


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of equal elements at the start of both."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def render(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    tools: Sequence[Mapping[str, Any]] = (),
    prompt: bool = False,
) -> str:
    """The text of `messages`, rendered with the tokenizer's chat template.

    A template is a program from the model's folder, so its time, memory and output are limited.

    Args:
        where: what messages name.
        prompt: end with the header of the assistant's next message.

    Raises:
        SourceError: the template refuses the messages, or exceeds a limit.
    """
    remedy = "name a file with another template in data.chat_template"
    late = SourceError(
        f"{where}: the model's chat template has not rendered this conversation after "
        f"{SECONDS:g} s; {remedy}"
    )
    most = _MOST_ADDED + 20 * sum(
        len(json.dumps(part, default=str)) for part in (*messages, *tools)
    )
    large = SourceError(
        f"{where}: the model's chat template renders more than {most:,} characters for these "
        f"{len(messages)} messages; {remedy}"
    )
    roles = listed(m["role"] for m in messages)
    refusal = f"{where}: the model's chat template refuses these messages ({roles})"
    with foreign_as(SourceError, refusal), time_limit(late), memory_limit(large):
        rendered = str(
            tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        )
    if len(rendered) > most:
        raise large
    return rendered


def _encode_marked(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    _render(conversation.messages, conversation, tokenizer)  # what exceeds a limit ends here
    encoded: Any = tokenizer.apply_chat_template(
        [dict(m) for m in conversation.messages],
        tools=[dict(tool) for tool in conversation.tools] or None,
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
    return render(messages, tokenizer, conversation.where, conversation.tools, prompt)


def _check_tools_are_rendered(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> None:
    if not conversation.tools:
        return
    rendered = _render(conversation.messages, conversation, tokenizer)
    try:
        without = _render(conversation.messages, replace(conversation, tools=()), tokenizer)
    except SourceError:  # the template requires tools
        return
    if rendered == without:
        raise SourceError(
            f"{conversation.where}: the model's chat template ignores tools, so their definitions "
            "would be lost. Name a file with a template that renders them in "
            "data.chat_template, or remove the field 'tools' from the records"
        )


def _assistant_spans(
    conversation: Conversation, text: str, tokenizer: PreTrainedTokenizerBase, last_only: bool
) -> list[tuple[int, int]]:
    """(start, end), in characters of `text`, of the assistant's messages, or of the last one."""
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
                f"{where}: the chat template renders this message differently when another "
                f"follows, so the {ASSISTANT}'s tokens cannot be located. Set data.turns: apart, "
                "or use a template with {% generation %} markers (data.chat_template)"
            )
        end = len(after)
        spoken = after[start:end].rstrip()
        spans.append((start, start + len(spoken) if spoken.endswith(endings) else end))
    return spans


def _start_after_others(
    conversation: Conversation, i: int, text: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> int | None:
    """Start of message i in `text`, which it ends; None if `text` does not begin with the
    rendering of the messages before it."""
    before = _render(conversation.messages[:i], conversation, tokenizer, prompt=True)
    if not text.startswith(before):
        return None
    if before == _render(conversation.messages[:i], conversation, tokenizer):
        return _content_start(conversation.messages[i], text, len(before), where)
    return len(before)


def _start_of_greeting(
    conversation: Conversation, text: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> int | None:
    """Start of a first message: after the last generation prompt in the header, which is what
    does not depend on the message's content; None if the header has no generation prompt."""
    greeting = conversation.messages[0]
    content = greeting.get("content") or ""
    other = next(c for c in "abc" if c not in (content[:1], content.strip()[:1]))
    header = text[
        : common_prefix_length(
            text, _render([{**greeting, "content": other}], conversation, tokenizer)
        )
    ]
    question = [{"role": "user", "content": "a"}]
    unasked, asked = (
        _render(question, conversation, tokenizer, prompt) for prompt in (False, True)
    )
    if unasked == asked:
        return _content_start(greeting, text, 0, where, earliest=len(header))
    prompt = asked[common_prefix_length(unasked, asked) :].lstrip()
    return header.rfind(prompt) + len(prompt) if prompt in header else None


def _content_start(
    message: Mapping[str, Any], text: str, start: int, where: str, earliest: int = 0
) -> int:
    """Start of the content and of the spaces before it, for an empty generation prompt.

    Without a header (`[/INST] Hi`) this is `start`.
    """
    content = (message.get("content") or "").strip()
    found = text.find(content, max(start, earliest)) if content else -1
    if found < 0:
        raise SourceError(
            f"{where}: the chat template has no generation prompt and changes the content, so the "
            f"{ASSISTANT}'s tokens cannot be located. Use a template with "
            "{% generation %} markers (data.chat_template)"
        )
    header = text[start:found]
    return start + len(header.rstrip(" ")) if header.strip() else start
