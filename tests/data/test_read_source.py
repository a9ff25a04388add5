"""Every format that documents come in, and a wrong twin of each with its error."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from qwlora.data.document import Completion, Conversation, Document, Text
from qwlora.data.read_source import Reading, load_documents, locate_documents, read_documents
from qwlora.errors import MissingExtraError, SourceError

datasets.disable_progress_bars()

HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
ALPACA = {"instruction": "Add.", "input": "2+2", "output": "4"}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be kind."}
SHAREGPT = [HUMAN, GPT]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "first, “quoted”\nand a second line"}, {"text": "NA"}, {"text": "third"}],
    "completions": [{"prompt": "2+2=", "completion": " 4"}, {"prompt": "a,b", "completion": '"x"'}],
    "conversations": [{"messages": TALK}, {"messages": [SYSTEM, *TALK]}],
    "alpaca": [
        {"instruction": "Translate.", "input": "ja", "output": "yes"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ],
}
TASK = "Below is an instruction that describes a task"
ANSWER = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
FURTHER = f"{TASK}, paired with an input that provides further context. {ANSWER}"
TRANSLATE = f"{FURTHER}Translate.\n\n### Input:\nja\n\n### Response:\n"
DOCUMENTS: dict[str, list[Document]] = {
    "text": [Text(r["text"]) for r in RECORDS["text"]],
    "completions": [Completion(**r) for r in RECORDS["completions"]],
    "conversations": [Conversation((*TALK,)), Conversation((SYSTEM, *TALK))],
    "alpaca": [
        Completion(TRANSLATE, "yes", user_message="Translate.\n\nja"),
        Completion(f"{TASK}. {ANSWER}Say hi.\n\n### Response:\n", "hi", user_message="Say hi."),
    ],
}


def read(path: Path | str, reading: Reading | None = None) -> list[Document]:
    return read_documents(str(path), reading or Reading())[0]


def refused(source: Path | str, reading: Reading | None = None, *, match: str) -> None:
    with pytest.raises(SourceError, match=match):
        read(source, reading)


def without_place(documents: list[Document]) -> list[Document]:
    return [type(d)(**{k: v for k, v in vars(d).items() if k != "where"}) for d in documents]


def write(path: Path, records: list[Any]) -> None:
    """In the format that the name says; a name without a suffix is that of a saved dataset."""
    match path.suffix.lower():
        case ".csv" | ".tsv" as suffix:
            separator = "\t" if suffix == ".tsv" else ","
            datasets.Dataset.from_list(records).to_csv(path, sep=separator)
        case ".parquet":
            pa.parquet.write_table(pa.Table.from_pylist(records), path)
        case ".feather":
            pa.feather.write_feather(pa.Table.from_pylist(records), path)
        case ".arrow":
            table = pa.Table.from_pylist(records)
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        case "":
            datasets.Dataset.from_list(records).save_to_disk(str(path))
        case _ if path.name == "list.json":
            path.write_text(json.dumps(records, indent=1))
        case _:
            path.write_text("".join(json.dumps(r) + "\n" for r in records))


LINES = "data.jsonl data.ndjson data.jsonlines data.JSONL lines.json"
HOLDS_LISTS = [*LINES.split(), "list.json", "data.parquet", "data.arrow", "data.feather", "saved"]
NAMES = [*HOLDS_LISTS, "data.csv", "data.tsv", "data.TSV"]
HELD = [(n, k) for k in RECORDS for n in (HOLDS_LISTS if k == "conversations" else NAMES)]


@pytest.mark.parametrize(("name", "kind"), HELD)
def test_each_format_holds_each_kind(tmp_path: Path, name: str, kind: str) -> None:
    write(tmp_path / name, RECORDS[kind])
    found = read(tmp_path / name)
    assert without_place(found) == DOCUMENTS[kind]
    assert all(name in d.where for d in found)


CALLED = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
PLAIN = {"instruction": "Add.", "output": "4"}
ROLES = {
    "user": "human user",
    "tool": "observation function_response tool",
    "assistant": "gpt chatgpt bot model assistant",
    "system": "system",
    "developer": "developer",
}
CALLING = {"role": "assistant", **CALLED}
DOLLY = {"instruction": "Add.", "context": "2+2", "response": "4"}
SAME = [  # columns that the recipe names, a record, and one that is read as the same
    ({}, PLAIN, {**PLAIN, "input": ""}),
    ({}, {**PLAIN, "input": None}, {**PLAIN, "input": ""}),
    ({"input": "context", "output": "response"}, DOLLY, ALPACA),
    ({"instruction": "instruction"}, {**ALPACA, "text": "Below is ..."}, ALPACA),
    ({"prompt": "a", "completion": "b"}, {"a": "2", "b": "4"}, {"prompt": "2", "completion": "4"}),
    ({}, {"conversations": TALK, "tools": [CALLED]}, {"messages": TALK, "tools": [CALLED]}),
    ({}, {"messages": SHAREGPT, "tools": [CALLED]}, {"messages": TALK, "tools": [CALLED]}),
    ({"messages": "chat"}, {"chat": SHAREGPT, "text": "x"}, {"messages": TALK}),
    ({}, {"messages": [TALK[0], {**CALLING, "content": None}]}, {"messages": [TALK[0], CALLING]}),
    *(
        (
            {},
            {"conversations": [{"from": name, "value": "x"}, *SHAREGPT]},
            {"messages": [{"role": role, "content": "x"}, *TALK]},
        )
        for role, names in ROLES.items()
        for name in names.split()
    ),
]


@pytest.mark.parametrize(("columns", "record", "same"), SAME)
def test_fields_and_roles_may_have_other_names(tmp_path, columns, record, same) -> None:
    write(tmp_path / "a.jsonl", [record])
    write(tmp_path / "b.jsonl", [same])
    found = read(tmp_path / "a.jsonl", Reading(columns))
    assert without_place(found) == without_place(read(tmp_path / "b.jsonl"))


ASKED = {"question": "Add.", "input": "2+2", "answer": "4"}
WRONG_COLUMNS = [
    ("a.jsonl", {**ALPACA, "text": "x"}, {}, r"text_column=text or .*instruction_column=instr"),
    ("a.jsonl", {"a": "x", "b": "y"}, {"prompt": "a"}, r"'completion' \(data.completion_column\)"),
    ("a.jsonl", {"a": "x", "b": "y"}, {"text": "x"}, r"'x' \(data.text_column\).* a, b"),
    ("a.jsonl", ALPACA, {"prompt": "input", "completion": "zz"}, "are instruction, input, output"),
    ("a.jsonl", ASKED, {}, "instruction_column=question .*input_column=input .*output_c"),
    ("a.txt", {}, {"text": "x"}, "no columns"),
]


@pytest.mark.parametrize(("name", "record", "columns", "message"), WRONG_COLUMNS)
def test_columns_that_are_not_there_are_named(tmp_path, name, record, columns, message) -> None:
    write(tmp_path / name, [record])
    refused(tmp_path / name, Reading(columns), match=message)


def user(content: Any = "Hi", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def said(**message: Any) -> list[dict[str, Any]]:
    """A question, and this message after it."""
    return [user(), message]


TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}},
    {"type": "function", "function": {"name": "time", "parameters": {"zone": {"as": "UTC+1"}}}},
]
CALLS = [
    [{"function": {"name": "weather", "arguments": {"city": "Graz"}}}],
    [{"function": {"name": "time", "arguments": {"zone": "Z"}}}],
]
TOOL_RECORDS = [
    {"messages": said(role="assistant", tool_calls=CALLS[0]), "tools": TOOLS},
    {"messages": said(role="assistant", tool_calls=CALLS[1]), "tools": TOOLS[1:]},
    {"messages": TALK, "tools": None},
]


@pytest.mark.parametrize("as_string", [False, True])
@pytest.mark.parametrize("name", HOLDS_LISTS)
def test_tools_are_read_beside_messages(tmp_path: Path, name: str, as_string: bool) -> None:
    write_tools = json.dumps if as_string else list
    written = [{**r, "tools": r["tools"] and write_tools(r["tools"])} for r in TOOL_RECORDS]
    write(tmp_path / name, written)
    assert without_place(read(tmp_path / name)) == [
        Conversation(tuple(r["messages"]), tools=tuple(r["tools"] or ())) for r in TOOL_RECORDS
    ]


def test_tools_may_be_in_one_file_and_not_in_another(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"messages": TALK}])
    write(tmp_path / "b.parquet", [{"messages": TALK, "tools": TOOLS}])
    lines = [{"messages": TALK, "tools": tools} for tools in (TOOLS[1:], [], "")]
    write(tmp_path / "c.jsonl", lines)
    found = [d for d in read(tmp_path) if isinstance(d, Conversation)]
    assert [len(d.tools) for d in found] == [0, 2, 1, 0, 0]
    assert len({d.identity for d in found}) == 3  # the tools are a part of a conversation
    # A column of this name means something next to messages only.
    write(tmp_path / "text.jsonl", [{"text": "a", "tools": 3}])
    assert without_place(read(tmp_path / "text.jsonl")) == [Text("a")]


WRONG_LINES = [
    ('{"text": "a"', "',' delimiter at character 13"),
    ("[", "character 2. A .jsonl file holds one whole object a line"),
    ('{"text": NaN}', "NaN"),
    ('{"text": "a", "text": "b"}', "'text' twice"),
    ("{}", "the record is empty.* data.empty_records: skip"),
    ('{"text": " "}', "'text' is empty"),
    ('{"Text": "a"}', "'text' is missing; did you mean Text"),
    ('{"text": null}', "'text' is null.* data.empty_records: skip"),
    ('{"messages": []}', "one kind"),
]
WRONG_MESSAGES = [
    ("Hi", "'messages' must be a list of messages with role and content, not 'Hi'"),
    ([], "'messages' is empty"),
    ([user()], "no message of the assistant"),
    (said(**GPT), "message 2: 'role' is missing; did you mean from"),
    (said(role="assistant", content=None), "message 2: 'content' is null"),
    (said(role="asistant", content="x"), "role 'asistant'; did you mean assistant"),
    (said(role="bot", content="x"), "role 'bot'; there are system, developer, user, assistant, t"),
    (said(role="assistant", content=" \n"), "message 2: the assistant's content is empty"),
    ([HUMAN, {"from": "gpt"}], "message 2: 'value' is missing"),
    ([HUMAN, {"role": "assistant", "content": "x"}], "message 2: 'from' is missing"),
    ([HUMAN, {"from": "humn", "value": "x"}], "message 2: unknown role 'humn'; did you mean hu"),
]
WRONG_TOOLS = [
    (3, "'tools' must be a list of tools, .*not 3"),
    (json.dumps(TOOLS[0]), "'tools' must be a list of tools, .*not an object"),
    ([TOOLS[0], "weather"], "tool 2 must be an object .*, not 'weather'"),
    ([{"name": "\ud800"}], "'tools' is not UTF-8"),
]
TALKING = json.dumps({"messages": TALK})
WRONG_RECORDS = [
    *(('{"text": "good"}', line, message) for line, message in WRONG_LINES),
    *((TALKING, json.dumps({"messages": talk}), message) for talk, message in WRONG_MESSAGES),
    *((TALKING, json.dumps({"messages": TALK, "tools": t}), message) for t, message in WRONG_TOOLS),
    ('{"prompt": "a", "completion": "b"}', '{"prompt": "a", "completion": ""}', "'completion' is"),
]


@pytest.mark.parametrize(("good", "line", "message"), WRONG_RECORDS)
def test_a_bad_record_is_named(tmp_path: Path, good: str, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    refused(path, match=f"{path}:3: .*{message}")


def test_empty_records_may_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path, skipping = tmp_path / "some.jsonl", Reading(skip_empty=True)
    write(path, [{"text": "a"}, {"text": ""}, {}, {"text": "b"}])
    documents, skipped, _ = read_documents(str(path), skipping)
    assert (len(documents), skipped) == (2, 2)
    assert load_documents(str(path), 0.5, 0, skipping).skipped_records == 2
    write(tmp_path / "some.parquet", [{"text": "a"}, {"text": None}])  # as pandas does
    assert read_documents(str(tmp_path / "some.parquet"), skipping)[1] == 1
    write(path, [{"text": "a"}, {"text": 3}])  # only what is empty may be skipped
    refused(path, skipping, match="must be a string")


@pytest.mark.parametrize("name", HOLDS_LISTS)
def test_columns_with_text_that_is_not_used_are_counted(tmp_path: Path, name: str) -> None:
    records = [{"id": f"no-{n}", "source": "a b", "text": f"x {n}", "score": n} for n in range(3)]
    write(tmp_path / name, records)
    assert load_documents(str(tmp_path / name)).unused_columns == ("source",)


TWO_LINES = b'prompt,completion\n"two\nlines",b\n'
WRONG_FILES = [
    ("a.csv", b"", "is empty.* first line"),
    ("a.csv", b"text,text\na,b\n", ":1: two columns are named 'text'"),
    ("a.csv", TWO_LINES + b"a,b,c\n", ":4: this record has 3 fields, and the header 2"),
    ("a.csv", b'text\na\n"b" c\n', ":3: this is not CSV: ',' expected after '\"'"),
    ("a.csv", b"txt\nhello\n", r"columns \(txt\).* --set data.prompt_column"),
    ("a.csv", b"id,query,answer\n1,b,c\n", "column=query --set data.completion_column=answer; r"),
    ("a.csv", b"text\na\xff\n", r":2: byte 2 of the line \(0xff\)"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r":2: byte 11 of the line \(0xe9\)"),
    ("a.jsonl", b"\n", "no records"),
    ("a.jsonl", b'{"a": 1}\n', r":1: none of its columns \(a\).* --set"),
    ("a.jsonl", b'{"text": "a", "messages": []}\n', ":1: has both text and messages"),
    ("a.parquet", b"PAR1 not really", "not a Parquet file"),
    ("a.arrow", b"not arrow at all", "not an Arrow file"),
    ("a.json", b'[\n{"text": "a"},\n{"text" "b"}]', ":3: this is not JSON: Expecting ':' deli"),
    ("a.json", b'[{"text": "a"}, {"text": 3}]', " record 2: 'text' must be a string, not 3"),
    ("a.json", b'{\n "text": "a"\n}', "character 2. A .json file holds a list of records, or one"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG_FILES)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, match=f"{name}.*{message}")


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow", "data.feather", "saved"])
def test_a_bad_row_of_a_table_is_counted(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, [{"text": float("nan")}, {"text": 1.0}])
    refused(tmp_path / name, match=rf"{name}.* row 1: 'text' must be a string, not nan")
    if name != "saved":
        buffers = [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
        table = pa.table({"text": pa.Array.from_buffers(pa.string(), 1, buffers)})
        is_parquet = name.endswith("parquet")
        (pa.parquet.write_table if is_parquet else pa.feather.write_feather)(table, tmp_path / name)
        refused(tmp_path / name, match=rf"{name}.*after row 0.*utf-8")


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
def test_a_damaged_saved_dataset_is_named(tmp_path: Path, file: str) -> None:
    write(tmp_path / "saved", RECORDS["text"])
    (tmp_path / "saved" / file).write_text("{")
    refused(tmp_path / "saved", match="saved: .*datasets cannot load it: ")


@pytest.mark.parametrize("file", ["/dev/zero", "../mine.arrow", "pipe"])
def test_a_saved_dataset_lists_files_of_its_folder(tmp_path: Path, file: str) -> None:
    saved = tmp_path / "saved"
    write(saved, RECORDS["text"])
    (saved / "data-00000-of-00001.arrow").rename(tmp_path / "mine.arrow")
    os.mkfifo(saved / "pipe")
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": file}]}))
    refused(saved, match=r"saved/(pipe' is a pipe|state\.json' lists)")
    (saved / "pipe").unlink()
    refused(saved, match=r"state\.json' lists|datasets cannot load it")


def test_files_of_one_folder_hold_one_kind(tmp_path: Path) -> None:
    for number, name in enumerate(("a.jsonl", "data.parquet", "list.json", "data.csv"), 1):
        write(tmp_path / name, RECORDS["text"])
        assert without_place(read(tmp_path)) == DOCUMENTS["text"] * number
    write(tmp_path / "z.csv", RECORDS["completions"])
    refused(tmp_path, match=r"z.csv: this table has prompt\+completion, the files before it text")
    (tmp_path / "c.json").write_text('{"version": 1}')
    refused(tmp_path, match=r"c.json:1: the field 'text' is missing; there are version")
    (tmp_path / "d.txt").write_text("text")
    refused(tmp_path, match=r"holds running text \(d.txt\) and records \(a.jsonl\)")


RUNNING = ("notes.rst", "NOTES", "about json.text", "model.jsonnet", "README.md")


@pytest.mark.parametrize("name", RUNNING)
def test_other_names_are_running_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert without_place(read(tmp_path / name)) == [Text("one\ntwo")]


def test_a_long_field_of_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\r\n" + b"x" * 200_000 + b"\r\n")
    assert [document.characters for document in read(tmp_path)] == [200_000]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for folder, other in ("data", "elsewhere"), ("elsewhere", "data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "more").symlink_to(tmp_path / other)
    write(tmp_path / "elsewhere" / "a.jsonl", RECORDS["text"])
    assert without_place(read(tmp_path / "data")) == DOCUMENTS["text"]


def test_splits_of_a_folder_are_named_as_on_the_hub(tmp_path: Path) -> None:
    clone, folders = tmp_path / "clone", tmp_path / "folders"
    for folder in ("clone/data", "clone/.cache", "folders/train", "folders/dev", "folders/more"):
        (tmp_path / folder).mkdir(parents=True)
        if folder.startswith("folders"):
            write(tmp_path / folder / "0.jsonl", [{"text": folder}])
    train, test = ["train-00000-of-00002", "train-00001-of-00002"], ["test-00000-of-00001"]
    for name in (*train, *test, "validation"):
        write(clone / "data" / f"{name}.parquet", [{"text": name}])
    for name in ("README.md", "dataset_infos.json", ".cache/train.json"):  # no documents
        (clone / name).write_text("{")
    for folder, split, names in (
        (clone, "train", train),
        (clone, None, [*test, *train, "validation"]),
        (folders, "validation", ["folders/dev"]),
        (folders, "more", ["folders/more"]),
    ):
        assert without_place(read(folder, Reading(split=split))) == [*map(Text, names)]
    refused(clone, Reading(split="rain"), match=r"'rain' .*; there are data/test-00000-of-00001.p")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("train.json.gz", ".gz files are not read: unpack"),
        ("train.jsonl.ZST", ".zst files are not read: unpack"),
        ("train.xlsx", ".xlsx files are not read: save"),
        ("train.jsonlines_old", "contains .jsonlines but"),
    ],
)
def test_other_records_are_refused(tmp_path: Path, name: str, problem: str) -> None:
    """In a folder, only those that a program has to unpack."""
    write(tmp_path / "a.jsonl", RECORDS["text"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text("{}")
    refused(tmp_path / "data" / name, match=problem)
    if "are not read" in problem:
        refused(tmp_path, match=f"holds data/{name}: {problem}")
    else:
        assert without_place(read(tmp_path)) == DOCUMENTS["text"]


def test_a_folder_may_hold_other_files_besides_but_a_card_is_not_its_data(tmp_path: Path) -> None:
    names = "README.md LICENSE LICENSE.txt .gitattributes dataset_infos.json data.jsonl.sha256"
    names += " data.jsonl.dvc picture.png loader.py Thumbs.db data.csv.py data.jsonl.sha1"
    for name in names.split():
        (tmp_path / name).write_text("# about")
    refused(tmp_path, match=r"no file of a supported kind .*; it holds .* and 7 more.*card")
    for name in ("train.jsonl", "test.jsonl.gz"):
        write(tmp_path / name, RECORDS["text"])
    assert without_place(read(tmp_path, Reading(split="train"))) == DOCUMENTS["text"]
    refused(tmp_path, Reading(split="test"), match="holds test.jsonl.gz: .gz files are not read")


def test_splits_that_are_not_there_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", RECORDS["text"])
    write(tmp_path / "one", RECORDS["text"])
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    for names in (("train", "test"), ("a", "b")):
        parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in names}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / names[0]))
    assert without_place(read(tmp_path / "train")) == [Text("train")]
    assert without_place(read(tmp_path / "train", Reading(split="test"))) == [Text("test")]
    for name, split, message in (
        ("train", "tset", "no split 'tset'. .* one of train, test"),
        ("a", None, "it has several splits. Set data.split to one of a, b"),
        ("one", "train", "has no splits, but data.split is 'train'"),
        ("train.jsonl", "train", "has no splits, but data.split is 'train'"),
        ("texts", "train", "named after the split 'train'.*there are a.txt"),
    ):
        refused(tmp_path / name, Reading(split=split), match=message)
    refused("python:string:ascii_letters", Reading(split="train"), match="has no splits")


def test_a_hub_id_is_asked_for_what_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(source: str, name: str | None = None) -> datasets.DatasetDict:
        asked.append((source, name))
        splits = {"train": "a", "test": "b"}.items()
        made = {split: datasets.Dataset.from_list([{"body": body}]) for split, body in splits}
        return datasets.DatasetDict(made)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    locate_documents("owner/name")
    found = read("owner/name", Reading({"text": "body"}, split="test", subset="main"))
    assert (found, asked) == ([Text("b", "owner/name[test] row 1")], [("owner/name", "main")])


@pytest.mark.parametrize("source", ["corpus/a.JSONL", "corpus/a.jsonl.gz", "./corpus/x", "a/b/c"])
def test_a_mistaken_path_is_no_hub_id(source: str) -> None:
    message = r"does not exist.*\. Give a file \(text, .jsonl.*hub id like owner/name"
    with pytest.raises(SourceError, match=message) as caught:
        locate_documents(source)
    assert str(Path(source).absolute()) in str(caught.value)


def test_only_some_formats_need_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        write(tmp_path / name, RECORDS["text"])
    for module in ("datasets", "pyarrow", "pandas"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("data.jsonl", "data.csv"):
        assert without_place(read(tmp_path / name)) == DOCUMENTS["text"]
    for name in ("data.parquet", "data.arrow", "saved"):
        with pytest.raises(MissingExtraError, match=rf"{name}' .*qwlora\[data\]"):
            read(tmp_path / name)
