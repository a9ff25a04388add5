"""Records as people have them: ShareGPT, Alpaca, and preference data, which are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwlora.data import Completion, Conversation, Document, Reading
from qwlora.data.read_source import read_documents
from qwlora.errors import SourceError

HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
ALPACA = {"instruction": "Add.", "input": "2+2", "output": "4"}


def read(folder: Path, *records: dict[str, Any], **columns: str) -> list[Document]:
    path = folder / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return read_documents(str(path), Reading(columns))[0]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("assistant", "assistant"),
        ("system", "system"),
        ("developer", "developer"),
        ("tool", "tool"),
        ("observation", "tool"),
        ("function_response", "tool"),
    ],
)
def test_sharegpt_roles_become_those_of_chat_templates(
    tmp_path: Path, name: str, role: str
) -> None:
    (found,) = read(tmp_path, {"conversations": [{"from": name, "value": "x"}, HUMAN, GPT]})
    assert isinstance(found, Conversation)
    assert found.messages == (
        {"role": role, "content": "x"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    )


def test_the_form_of_messages_does_not_depend_on_their_column(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for record, columns in (
        ({"conversations": talk, "tools": tools}, {}),
        ({"messages": [HUMAN, GPT], "tools": tools}, {}),
        ({"chat": [HUMAN, GPT], "text": "x", "tools": tools}, {"messages": "chat"}),
    ):
        (found,) = read(tmp_path, record, **columns)
        assert isinstance(found, Conversation)
        assert (found.messages, found.tools) == (tuple(talk), tuple(tools))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([HUMAN, {"from": "gpt"}], "message 2: 'value' is missing"),
        ([HUMAN, {"from": "gpt", "value": None}], "message 2: 'value' is null"),
        ([HUMAN, {"from": "gpt", "value": 3}], "message 2: 'value' must be a string"),
        ([HUMAN, {"role": "assistant", "content": "x"}], "message 2: 'from' is missing"),
        (
            [HUMAN, {"from": "humn", "value": "x"}],
            "message 2: unknown role 'humn'; did you mean hu",
        ),
        ([HUMAN, {"from": "gpt", "value": " "}], "message 2: the assistant's value is empty"),
        ([HUMAN], "there is no message of the assistant"),
        ("Hi", "'conversations' must be a list"),
    ],
)
def test_a_bad_sharegpt_message_is_named(tmp_path: Path, messages: Any, message: str) -> None:
    good = {"conversations": [HUMAN, GPT]}
    with pytest.raises(SourceError, match=r"a\.jsonl:2: .*" + re.escape(message)):
        read(tmp_path, good, {"conversations": messages})


def test_an_instruction_needs_no_input(tmp_path: Path) -> None:
    with_input, *others = read(
        tmp_path,
        ALPACA,
        {"instruction": "Add.", "output": "4"},
        {**ALPACA, "input": None},
        {**ALPACA, "input": " "},
    )
    assert isinstance(with_input, Completion)
    assert with_input.user_message == "Add.\n\n2+2"
    assert "### Input:\n2+2\n" in with_input.prompt
    for other in others:
        assert isinstance(other, Completion)
        assert (other.user_message, other.completion) == ("Add.", "4")
        assert "Input" not in other.prompt


def test_columns_of_instructions_may_be_named(tmp_path: Path) -> None:
    dolly = {"instruction": "Add.", "context": "2+2", "response": "4"}
    expected = read(tmp_path, ALPACA)
    assert read(tmp_path, dolly, input="context", output="response") == expected
    with pytest.raises(SourceError, match=r"no column 'contxt' \(data\.input_column\).*context"):
        read(tmp_path, dolly, input="contxt", output="response")


def test_alpacas_own_text_next_to_its_fields_has_to_be_chosen(tmp_path: Path) -> None:
    record = {**ALPACA, "text": "Below is ..."}
    with pytest.raises(
        SourceError, match=r"data\.text_column: text or data\.instruction_column: instruction"
    ):
        read(tmp_path, record)
    assert read(tmp_path, record, instruction="instruction") == read(tmp_path, ALPACA)


@pytest.mark.parametrize(
    ("record", "remedies"),
    [
        (
            {"prompt": "Q", "chosen": "A", "rejected": "B"},
            ("data.prompt_column: prompt and data.completion_column: chosen",),
        ),
        ({"chosen": "Q A", "rejected": "Q B"}, ("data.text_column: chosen",)),
        (
            {"messages": [], "prompt": "Q", "Chosen": [], "Rejected": []},
            ("data.messages_column: Chosen",),
        ),
    ],
)
def test_preference_data_are_refused_by_name(
    tmp_path: Path, record: dict[str, Any], remedies: tuple[str, ...]
) -> None:
    with pytest.raises(SourceError, match=r"a\.jsonl:1: .*preference.*DPO") as caught:
        read(tmp_path, record)
    assert all(remedy in str(caught.value) for remedy in remedies)


def test_the_chosen_answers_can_be_trained_on(tmp_path: Path) -> None:
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    (found,) = read(tmp_path, pair, prompt="prompt", completion="chosen")
    assert isinstance(found, Completion)
    assert (found.prompt, found.completion) == ("Q", "A")
