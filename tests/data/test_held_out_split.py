"""Documents: where they come from, how they are split, how they become sequences."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from conftest import byte_tokenizer
from qwlora.data.document import Text
from qwlora.data.read_source import Reading, load_documents, locate_documents, read_documents
from qwlora.data.sequences import joined_ids
from qwlora.data.tokenization import encode_documents, start_tokens
from qwlora.errors import SourceError


def paragraphs(name: str, count: int) -> str:
    return "\n\n".join(
        f"Paragraph {i} of document {name}: " + "words that fill the line and the next one too " * 3
        for i in range(count)
    )


def test_no_document_and_no_paragraph_is_on_both_sides(tmp_path: Path) -> None:
    shared = "This paragraph stands in every one of the documents, and it is longer than a line, so it would teach the held-out text."
    for i in range(10):
        wrapped = shared.replace(" ", "\n" if i % 2 else " ", 3)
        (tmp_path / f"{i}.md").write_text(f"{paragraphs(str(i), 4)}\n\n{wrapped}\n\nshort")
    documents = load_documents(str(tmp_path), 0.3, seed=1)
    assert len(documents.held_out) == 3
    assert len(documents.train) == 7
    assert not any(shared in " ".join(d.text.split()) for d in documents.train)
    assert all("short" in d.text for d in documents.train)
    again, other = (load_documents(str(tmp_path), 0.3, seed=seed).digest for seed in (1, 2))
    assert again == documents.digest != other


@pytest.mark.parametrize("text", [paragraphs("one", 40), "title\n\n" + "no paragraphs here " * 500])
def test_one_document_is_split_near_the_wanted_share(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.txt").write_text(text)
    documents = load_documents(str(tmp_path / "one.txt"), 0.2, seed=0)
    assert documents.train[0].text + documents.held_out[0].text == text
    assert 0.2 <= len(documents.held_out[0].text) / len(text) <= 0.25


def test_equal_answers_to_different_prompts_stay(tmp_path: Path) -> None:
    documents = load_documents(written(tmp_path / "chats.jsonl", chats(300)), 0.02, seed=3)
    assert len(documents.train) + len(documents.held_out) == 300
    assert (len(documents.held_out), documents.repeated_documents) == (6, 0)


def test_a_document_with_most_of_the_text_is_trained_on(tmp_path: Path) -> None:
    for name, count in (("book", 40), ("notes", 4)):
        (tmp_path / f"{name}.txt").write_text(paragraphs(name, count))
    for seed in range(4):
        (only,) = load_documents(str(tmp_path), 0.2, seed).train
        assert only.where.endswith("book.txt")


def test_each_sequence_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", begin)]
    )
    documents = encode_documents(["abc", "defg"], tokenizer)
    ids = joined_ids(documents, 4, start_tokens(tokenizer), "training")
    assert (ids[:, 0] == begin).all()
    assert "".join(tokenizer.convert_ids_to_tokens(ids[:, 1:].flatten())) == "abc<end>defg<end>"


MODULE = """
open("ran", "w").close()
TEXT = "the grid holds. " * 9
PLAIN: str = "the grid holds"
LATER = "one"
LATER += " two"
COUNTS = {"a": 1}
"""


@pytest.mark.parametrize("name", ["theirs", "theirs_too.deep.texts"])
def test_a_module_is_read_and_not_run(name, tmp_path, monkeypatch) -> None:
    file = (tmp_path / "site" / Path(*name.split("."))).with_suffix(".py")
    file.parent.mkdir(parents=True)
    for package in file.parents[: name.count(".")]:
        (package / "__init__.py").write_text(MODULE)
    file.write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    (document,) = read_documents(f"python:{name}:PLAIN", Reading())[0]
    assert document == Text("the grid holds", f"python:{name}:PLAIN")
    refusals = {"TEXT": "not a constant", "LATER": "once", "absent": "once", "COUNTS": "is a dict"}
    for attribute, problem in refusals.items():
        with pytest.raises(SourceError, match=problem):
            read_documents(f"python:{name}:{attribute}", Reading())
    assert not (tmp_path / "ran").exists()
    monkeypatch.chdir(tmp_path / "site")  # where a stranger's recipe could be
    for source in (f"python:{name}:PLAIN", "python:pydoc_data.topics"):
        with pytest.raises(SourceError, match="python:MODULE:ATTRIBUTE needs"):
            locate_documents(source)


CANNED = "Thanks for writing to us! Please restart the device, and tell us if it still blinks: {}."


def chats(count: int) -> list[dict[str, Any]]:
    """Support chats with few different answers, each to another question."""
    asked = [{"role": "user", "content": f"ticket {i}: it blinks"} for i in range(count)]
    said = [{"role": "assistant", "content": CANNED.format(i % 8)} for i in range(count)]
    return [{"messages": [*pair]} for pair in zip(asked, said, strict=True)]


def written(path: Path, records: Iterable[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


@pytest.mark.parametrize("kind", ["completions", "conversations", "several turns"])
def test_a_record_that_is_trained_on_is_not_held_out(tmp_path: Path, kind: str) -> None:
    records = chats(20)
    if kind == "several turns":
        for record in records:
            record["messages"] *= 2
    if kind == "completions":
        said = [[m["content"] for m in record["messages"]] for record in records]
        records = [{"prompt": prompt, "completion": answer} for prompt, answer in said]
    respaced = json.loads(json.dumps(records).replace(" it ", "   it\\n"))
    source = written(tmp_path / "twice.jsonl", [*records, *respaced[:6]])
    documents = load_documents(source, 0.4, seed=0)
    trained = {pair for document in documents.train for pair in document.exchanges}
    assert documents.repeated_documents
    assert not any(d.exchanges <= trained for d in documents.held_out)
    assert len(documents.train) + len(documents.held_out) + documents.repeated_documents == 26
    kept = load_documents(source, 0.4, 0, Reading(keep_repeated=True))
    assert (len(kept.train), kept.repeated_documents) == (len(documents.train), 0)
    assert len(kept.held_out) == len(documents.held_out) + documents.repeated_documents


SAID = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("records", "message"),
    [(SAID, "jsonl:1: this is the only record"), (SAID * 4, "held-out part.*data.repeated: keep")],
)
def test_records_that_leave_nothing(tmp_path: Path, records: str, message: str) -> None:
    (tmp_path / "few.jsonl").write_text(records)
    with pytest.raises(SourceError, match=message):
        load_documents(str(tmp_path / "few.jsonl"), 0.2, 0)


def test_held_out_documents_from_a_source_of_their_own(tmp_path: Path) -> None:
    source, valid = (
        written(tmp_path / name, [{"prompt": f"{name} {i}?", "completion": "x"} for i in range(n)])
        for name, n in (("train.jsonl", 7), ("valid.jsonl", 3))
    )
    documents = load_documents(source, 0.5, 0, Reading(evaluation=valid))
    assert [len(documents.train), len(documents.held_out)] == [7, 3]
    assert all(d.prompt.startswith("valid") for d in documents.held_out)
    # what is in both is not held out
    written(tmp_path / "valid.jsonl", [{"prompt": "train.jsonl 1?", "completion": "x"}] * 2)
    with pytest.raises(SourceError, match="the held-out part is empty"):
        load_documents(source, 0.5, 0, Reading(evaluation=valid))
    text = tmp_path / "text.txt"
    text.write_text("words")
    with pytest.raises(SourceError, match=r"evaluation .*text.txt' holds text, but .* completions"):
        load_documents(source, 0.5, 0, Reading(evaluation=str(text)))
