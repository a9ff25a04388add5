"""Hostile models, adapters, recipes and data: one message, exit code 2, none of their code."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from . import hostile_models
from .jobs import Job, write_recipe
from .record import Record
from .victims import python, qwlora

pytestmark = pytest.mark.attack


def _run_all(
    record: Record, row: str, cases: Iterable[str], attack: Callable[[str, Path], str], folder: Path
) -> None:
    """Attack every case in an empty folder of its own, and count it under one row."""

    def one(name: str, own: Path) -> list[tuple[str, str, str]]:
        place = own / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return [(row, attack(name, place), name)]

    record.attack("hostile", cases, one, folder)


def _left(out: Path) -> str:
    """What a refused command left."""
    # finished blocks stay in the hidden folder for the next run, and what the report says
    is_begun = any((out / ".qwlora" / "work").rglob("*"))
    may_stay = {"recipe.yaml", "results.json", "report.html"} if is_begun else set()
    left = {path.name for path in out.glob("[!.]*")} - may_stay
    return f"left {sorted(left)}" if left else ""


def _joined(*problems: str) -> str:
    return "; ".join(filter(None, problems))


def test_hostile_models_are_refused(
    warm: None, two_layers: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    def attack(name: str, place: Path) -> str:
        marker, model = place / "marker", place / "model"
        shutil.copytree(two_layers, model)
        hostile_models.MODELS[name](model, marker)
        recipe = write_recipe(place / "recipe.yaml", model, corpus)
        quantized = qwlora("quantize", recipe, "--out", place / "out", logs=place / "logs")
        is_harmless = name in hostile_models.HARMLESS and not (quantized.code or marker.exists())
        found = [] if is_harmless else [quantized.problem(marker), _left(place / "out")]
        inspected = qwlora("inspect", model, logs=place / "logs")  # reads headers alone
        if inspected.code or inspected.has_traceback or marker.exists():
            found.append(inspected.problem(marker))
        return _joined(*found)

    _run_all(record, "models", hostile_models.MODELS, attack, tmp_path)


def test_hostile_adapters_are_refused(tuned: Job, record: Record, tmp_path: Path) -> None:
    base = {"solver": "rtn"}
    adapter = {"name": "next", "rank": 4, "steps": 1, "warmup_steps": 0}
    recipe = yaml.safe_load(tuned.recipe.read_text()) | {"base": base, "adapters": [adapter]}
    started = tmp_path / "started"
    (tmp_path / "started.yaml").write_text(yaml.safe_dump(recipe))
    assert qwlora("quantize", tmp_path / "started.yaml", "--out", started).code == 0

    def attack(name: str, place: Path) -> str:
        foreign, out, marker = place / "foreign", place / "started", place / "marker"
        shutil.copytree(tuned.finished / "adapters" / "first", foreign)
        hostile_models.ADAPTERS[name](foreign, marker)
        for ours in foreign.glob("*qwlora*"):
            ours.unlink()
        found = []
        listed = qwlora("adapters", "check", foreign, logs=place / "logs")
        # what only shows once a model is there is for `train` to refuse
        if listed.has_traceback or listed.code not in (0, 1, 2) or marker.exists():
            found.append(f"adapters check: {listed.refused()}")
        begins = {"continue_from": str(foreign), "unknown_base": "accept"}
        begins |= {"name": "next", "steps": 1, "warmup_steps": 0}
        (place / "next.yaml").write_text(yaml.safe_dump(recipe | {"adapters": [begins]}))
        shutil.copytree(started, out)
        trained = qwlora("train", place / "next.yaml", "--out", out, logs=place / "logs")
        found.append(trained.problem(marker))
        if (out / "adapters").exists():
            found.append("train wrote an adapter")
        return _joined(*found)

    _run_all(record, "adapters", hostile_models.ADAPTERS, attack, tmp_path)


# A recipe's text, where MODEL and DATA are replaced by good ones. What tests/recipe cover is not
# repeated here, nor below what tests/data and tests/pipeline/test_ownership.py cover.
GOOD = "model: {source: MODEL}\ndata: {source: DATA, sequence_tokens: 32}\nadapters: [{name: a}]\n"


def _adapter(keys: str) -> str:
    """The good recipe with more keys of its adapter."""
    return GOOD.replace("{name: a}", f"{{name: a, {keys}}}")


RECIPES: dict[str, str | bytes] = {
    "empty": "",
    "a scalar": "hello",
    "NUL bytes": GOOD.encode() + b"\0\0\0",
    "UTF-16": GOOD.encode("utf-16"),
    "a key twice by merging": GOOD + "seed: 1\n<<: {seed: 2}\n<<: {seed: 3}\n",
    "a key that is a list": GOOD + "? [a, b]\n: 1\n",
    "a key that is a number": GOOD + "7: 1\n",
    "deep mappings": GOOD + "seed: " + "{a: " * 20_000 + "1" + "}" * 20_000,
    "deep blocks": GOOD + "base:\n" + "".join(" " * i + "a:\n" for i in range(1, 3000)),
    "a list that holds itself": GOOD + "base: &a [*a]\n",
    "a mapping that holds itself": GOOD + "base: &a {weights: *a}\n",
    "a Python object": GOOD + "name: !!python/object/apply:os.system ['touch MARKER']\n",
    "an adapter's name that is a list": GOOD.replace("name: a", "name: [a]"),
    "adapters are a mapping": GOOD.replace("[{name: a}]", "{name: a}"),
    "adapters are numbers": GOOD.replace("[{name: a}]", "[1, 2]"),
    "NUL in a path": GOOD.replace("MODEL", '"a\\0b"'),
    "a surrogate in a name": GOOD.replace("MODEL", '"a\\uD800b"'),
    "text of a device": GOOD.replace("DATA", "/dev/zero"),
    "a model of a device": GOOD.replace("MODEL", "/dev/zero"),
    "an adapter of a device": _adapter("continue_from: /dev/zero"),
    "a module that opens a browser": GOOD.replace("DATA", '"python:antigravity:webbrowser"'),
    "a module of the process": GOOD.replace("DATA", '"python:__main__:x"'),
    "a package of the process": GOOD.replace("MODEL", '"package:__main__/x"'),
    "a regular expression that is none": _adapter("target_modules: '((('"),
    "a regular expression of 100,000 groups": _adapter(
        f"target_modules: '{'(' * 50_000}{')' * 50_000}'"
    ),
}
CHANGES = ("=1", "adapters.0.0.0=1", "model=null", "seed=[" + "[" * 5000)
CHANGES += ("seed=!!python/name:os.system",)


def test_hostile_recipes_are_refused(
    warm: None, one_layer: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    def attack(name: str, place: Path) -> str:
        recipe, marker = place / "recipe.yaml", place / "marker"
        content = RECIPES.get(name, GOOD)
        if isinstance(content, str):
            for word, path in (("MODEL", one_layer), ("DATA", corpus), ("MARKER", marker)):
                content = content.replace(word, str(path))
            content = content.encode("utf-8", "surrogatepass")
        recipe.write_bytes(content)
        options = ("--set", name) if name in CHANGES else ()
        return qwlora("check", recipe, *options, logs=place / "logs").problem(marker)

    _run_all(record, "recipes and --set", [*RECIPES, *CHANGES], attack, tmp_path)


def _users(place: Path) -> Path:
    (place / "base").mkdir()
    (place / "base" / "mine.txt").write_text("mine")
    (place / "recipe.yaml").write_text("mine: 1\n")
    return place


def _loop(place: Path) -> Path:
    (place / "link").symlink_to(place / "link")
    return place / "link"


def _below_a_file(place: Path) -> Path:
    (place / "out").write_text("mine")
    return place / "out" / "below"


OUTS: dict[str, Callable[[Path], str | Path]] = {
    "a folder of the user's": _users,
    "a link to itself": _loop,
    "below a file": _below_a_file,
    "a name of 300 characters": lambda place: place / ("o" * 300),
    "/proc": lambda place: "/proc/out",
    "/dev/null": lambda place: "/dev/null",
    "below /dev/null": lambda place: "/dev/null/out",
}


def test_hostile_outs_are_refused(
    qwa: Job, one_layer: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", one_layer, corpus)

    def contents(place: Path) -> dict[Path, str | None]:
        return {p: p.read_text() if p.is_file() else None for p in place.rglob("*")}

    def attack(name: str, place: Path) -> str:
        out = OUTS[name](place)
        before = contents(place)
        found = []
        for arguments in (
            ("quantize", recipe, "--out", out),
            ("merge", qwa.finished, "first", "--into", "float", "--out", out),
        ):
            if problem := qwlora(*arguments, logs=tmp_path / "logs").refused():
                found.append(f"{arguments[0]}: {problem}")
            if contents(place) != before:
                found.append(f"{arguments[0]}: changed what was there")
        return _joined(*found)

    _run_all(record, "--out", OUTS, attack, tmp_path)


def _lines(record: Any) -> bytes:
    return "\n".join([json.dumps(record)] * 20).encode()


def _parquet_of_lists(path: Path) -> None:
    pq.write_table(pa.table({"text": [["a"]] * 20}), path)


DATA: dict[str, tuple[str, bytes | Callable[[Path], None]]] = {
    "a pipe": ("a.txt", os.mkfifo),
    "a link to a device": ("a.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "text that is not UTF-8": ("a.txt", b"the grid \xff\xfe holds " * 50),
    "JSON lines that are deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000),
    "JSON that is deep": ("a.json", b"[" * 100_000 + b"]" * 100_000),
    "5,000 digits": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n"),
    "a surrogate": ("a.jsonl", b'{"text": "a \\ud800 b"}\n' * 20),
    "lists for text": ("a.jsonl", _lines({"text": ["a"]})),
    "numbers for records": ("a.jsonl", b"1\n2\n3\n"),
    "NaN for text": ("a.jsonl", b'{"text": NaN}\n' * 20),
    "messages without roles": ("a.jsonl", _lines({"messages": [{"content": "x"}]})),
    "CSV with NUL": ("a.csv", b"text\n" + b"a\0b\n" * 20),
    "CSV with an open quote": ("a.csv", b'text\n"' + b"a" * 2_000_000),
    "CSV with 200,000 columns": ("a.csv", b"c,d" * 100_000 + b"\n" + b"1,2" * 100_000),
    "Parquet that is empty": ("a.parquet", b""),
    "Parquet of lists": ("a.parquet", _parquet_of_lists),
    "gzip named .jsonl": ("a.jsonl", b"\x1f\x8b\x08\0" + b"\xff" * 100),
}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TURNS = _lines({"messages": [USER, ASSISTANT]})
TEMPLATES: dict[str, bytes] = {
    "template that calls itself": b"{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "template that breaks out": (
        b"{{ ''.__class__.__mro__[1].__subclasses__() }}"
        b"{{ cycler.__init__.__globals__.os.system('touch MARKER') }}"
    ),
    "template that is none": b"{% for %}",
    "template that is deep": b"{{ " + b"(" * 50_000,
}


def test_hostile_data_are_refused(
    warm: None, one_layer: Path, record: Record, tmp_path: Path
) -> None:
    def attack(name: str, place: Path) -> str:
        file, content = DATA.get(name, ("a.jsonl", TURNS))
        marker, source = place / "marker", place / file
        if callable(content):  # in a process of its own, since pyarrow starts threads
            assert python(lambda: content(source), place / "logs").code == 0
        else:
            source.write_bytes(content)
        section = {"source": str(source), "sequence_tokens": 32}
        if name in TEMPLATES:
            template = TEMPLATES[name].replace(b"MARKER", str(marker).encode())
            (place / "t.jinja").write_bytes(template)
            section["chat_template"] = str(place / "t.jinja")
        recipe = write_recipe(place / "recipe.yaml", one_layer, source, data=section)
        return qwlora("data", recipe, logs=place / "logs").problem(marker)

    _run_all(record, "data", [*DATA, *TEMPLATES], attack, tmp_path)
