"""What a model's files say about its origin and license; text of others in README.md files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from gguf import GGUFWriter
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qwlora.formats.model_card import (
    MOST_CHARACTERS,
    ModelCardInfo,
    as_code,
    escaped,
    one_line,
    origin_of,
)

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def gguf(path: Path, **metadata: str) -> Path:
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_string(f"general.{key.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def folder(path: Path, card: str | None) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if card is not None:
        (path / "README.md").write_text(card)
    return path


def test_a_folder_has_the_license_of_its_card(tmp_path: Path) -> None:
    stated = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    lines = "".join(f"{key}: {value}\n" for key, value in stated.items())
    found = origin_of(str(folder(tmp_path / "m", f"---\n{lines}---\n# M\n")))
    assert found == ModelCardInfo("m", **stated, stated_in="README.md of the model")
    cached = folder(tmp_path / "models--owner--name--v2" / "snapshots" / "abc", None)
    assert origin_of(str(cached)).repository == "owner/name--v2"


# Every run writes the model cards, also one that skips all stages.
QUICK = """
import sys
import qwlora, qwlora.grid.scheme, qwlora.cli.encodings_command, qwlora.quantize.solvers
from qwlora.formats.model_card import origin_of
assert origin_of('a.gguf').name == 'a.gguf'
print(sorted({'torch', 'onnx', 'transformers'} & set(sys.modules)))
"""


def test_what_must_be_quick_loads_no_torch(tmp_path: Path) -> None:
    gguf(tmp_path / "a.gguf", name="A", organization="someone")
    command = [sys.executable, "-c", QUICK]
    found = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
    assert found.stdout == b"[]\n"


TWO_LINES = json.dumps("gpl\n\n# Verified\n\x1b[0m <b>")


@pytest.mark.parametrize(
    ("card", "key", "found"),
    [
        (None, "license", None),
        ("", "license", None),
        ("# no metadata", "license", None),
        ("---\nlicense: [a\n---\n", "license", None),
        ("---\nlicense: unknown\n---\n", "license", None),
        *(
            (f"---\n{key}: {TWO_LINES}\n---\n", key, "gpl # Verified [0m <b>")
            for key in ("license", "license_name", "license_link")
        ),
    ],
)
def test_a_license_is_one_line_and_not_guessed(tmp_path, card, key, found) -> None:
    assert getattr(origin_of(str(folder(tmp_path / "m", card))), key) == found


def test_only_the_card_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, asked = folder(tmp_path / "m", "---\nlicense: mit\n---\n"), []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options["allow_patterns"]))
        return str(there)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = origin_of("owner/name")
    assert (found.name, found.repository, found.license) == ("name", "owner/name", "mit")
    assert asked == [("owner/name", ("README.md",))]
    no_network = mock.Mock(side_effect=OSError("no network"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    assert origin_of("owner/name") == ModelCardInfo("name", "owner/name")


def test_a_gguf_file_has_what_its_keys_say(tmp_path: Path) -> None:
    url = "https://huggingface.co/owner/name"
    found = origin_of(str(gguf(tmp_path / "a.gguf", license="mit", source__repo_url=url)))
    assert (found.license, found.repository) == ("mit", "owner/name")
    assert "general.license" in found.stated_in
    bare = origin_of(str(gguf(tmp_path / "b.gguf", name="B", organization="someone")))
    assert (bare.license, bare.repository) == (None, None)
    assert origin_of(str(tmp_path / "gone")) == ModelCardInfo("gone")


@given(st.text(max_size=300))
@example("x" * 10_000)
@example("\n" * 10_000)
@example("é " * 5000)
@example("mit.\n\n# Proof\n\n| all | passed |\n|---|---|\n<img src=x onerror=alert(1)>")
@example("[a](javascript:x) ![b](c) **d** `e` ~~f~~ &lt; \\ <https://g.h>")
@example("a\u202eb\x1b[2Jc\x00\u2028d")
def test_text_is_shown_letter_by_letter_in_one_line(text: str) -> None:
    opening, inline, closing = MARKDOWN.parse(f"Its license is {escaped(text)}.")
    assert (opening.type, closing.type) == ("paragraph_open", "paragraph_close")
    assert {child.type for child in inline.children or []} <= {"text", "text_special"}
    assert len(one_line(text)) <= MOST_CHARACTERS + 3
    shown = "".join(child.content for child in inline.children or [])
    assert shown == f"Its license is {one_line(text)}."


@given(st.text(max_size=60))
@example("a`b``c")
def test_code_is_one_piece_of_code(text: str) -> None:
    _, inline, _ = MARKDOWN.parse(f"Name: {as_code('m' + text)}.")
    assert [child.type for child in inline.children or []] == ["text", "code_inline", "text"]
