"""Text of others in README.md files: one line, letter by letter, whatever it holds."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qwlora.formats.model_card import MOST_CHARACTERS, as_code, escaped, one_line

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@given(st.text(max_size=300))
@example("mit.\n\n# Proof\n\n| all | passed |\n|---|---|\n<img src=x onerror=alert(1)>")
@example("[a](javascript:x) ![b](c) **d** `e` ~~f~~ &lt; \\ <https://g.h>")
@example("a\u202eb\x1b[2Jc\x00\u2028d")
def test_text_is_shown_letter_by_letter_in_one_line(text: str) -> None:
    opening, inline, closing = MARKDOWN.parse(f"Its license is {escaped(text)}.")
    assert (opening.type, closing.type) == ("paragraph_open", "paragraph_close")
    assert {child.type for child in inline.children or []} <= {"text", "text_special"}
    shown = "".join(child.content for child in inline.children or [])
    assert shown == f"Its license is {one_line(text)}."


@given(st.text(max_size=60))
@example("a`b``c")
def test_code_is_one_piece_of_code(text: str) -> None:
    _, inline, _ = MARKDOWN.parse(f"Name: {as_code('m' + text)}.")
    assert [child.type for child in inline.children or []] == ["text", "code_inline", "text"]


@pytest.mark.parametrize("text", ["x" * 10_000, "\n" * 10_000, "é " * 5000])
def test_a_line_has_an_end(text: str) -> None:
    assert len(one_line(text)) <= MOST_CHARACTERS + 3
