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
from .jobs import Job, digests, write_recipe
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


def test_hostile_adapters_are_refused(qwa: Job, tuned: Job, record: Record, tmp_path: Path) -> None:
    def attack(name: str, place: Path) -> str:
        job, marker = place / "job", place / "marker"
        shutil.copytree(tuned.finished, job)
        hostile_models.ADAPTERS[name](job / "adapters" / "first", marker)
        foreign = place / "foreign"
        shutil.copytree(job / "adapters" / "first", foreign)
        for ours in foreign.glob("*qwlora*"):
            ours.unlink()
        before = digests(job)
        found = [qwlora("merge", job, "first", logs=place / "logs").problem(marker)]
        listed = qwlora("adapters", "check", foreign, logs=place / "logs")
        # what only shows once a model is there is for `train` to refuse
        if listed.has_traceback or listed.code not in (0, 1, 2) or marker.exists():
            found.append(f"adapters check: {listed.refused()}")
        recipe = yaml.safe_load(tuned.recipe.read_text())
        begins = {"continue_from": str(foreign), "unknown_base": "accept"}
        recipe["adapters"] = [{"name": "next", "steps": 1, "warmup_steps": 0, **begins}]
        recipe["base"] = {"solver": "rtn"}
        (place / "next.yaml").write_text(yaml.safe_dump(recipe))
        shutil.copytree(started, place / "started")
        train = ("train", place / "next.yaml", "--out", place / "started")
        ended = qwlora(*train, logs=place / "logs")
        found.append(ended.problem(marker))
        if (place / "started" / "adapters").exists():
            found.append("start: wrote an adapter")
        if digests(job) != before:
            found.append("merge changed the job")
        return _joined(*found)

    started = tmp_path / "started"
    recipe = yaml.safe_load(tuned.recipe.read_text()) | {"base": {"solver": "rtn"}}
    recipe["adapters"] = [{"name": "next", "rank": 4, "steps": 1, "warmup_steps": 0}]
    (tmp_path / "started.yaml").write_text(yaml.safe_dump(recipe))
    assert qwlora("quantize", tmp_path / "started.yaml", "--out", started).code == 0
    _run_all(record, "adapters", hostile_models.ADAPTERS, attack, tmp_path)


# a recipe's text, where MODEL and DATA are replaced by good ones
GOOD = "model: {source: MODEL}\ndata: {source: DATA, sequence_tokens: 32}\nadapters: [{name: a}]\n"


def _laughs() -> str:
    lines = ['a0: &a0 ["x", "x"]']
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join([*lines, GOOD])


def _adapter(keys: str) -> str:
    """The good recipe with more keys of its adapter."""
    return GOOD.replace("{name: a}", f"{{name: a, {keys}}}")


RECIPES: dict[str, str | bytes] = {
    "a key twice": GOOD + "seed: 1\nseed: 2\n",
    "a section twice": GOOD + "base: {solver: rtn}\nbase: {solver: gptq}\n",
    "a key twice, deep": _adapter("rank: 4, rank: 8"),
    "a key twice by merging": GOOD + "seed: 1\n<<: {seed: 2}\n<<: {seed: 3}\n",
    "octal": GOOD + "seed: 012\n",
    "octal of YAML 1.2": GOOD + "seed: 0o17\n",
    "sexagesimal": GOOD + "seed: 1:30\n",
    "sexagesimal fraction": _adapter("alpha: 1:30.5"),
    "underscores": GOOD + "seed: 1_000\n",
    "yes is a word": _adapter("dora: yes"),
    "binary": GOOD + "seed: 0b11\n",
    "deep lists": GOOD + "seed: " + "[" * 20_000 + "]" * 20_000,
    "deep mappings": GOOD + "seed: " + "{a: " * 20_000 + "1" + "}" * 20_000,
    "deep blocks": GOOD + "base:\n" + "".join(" " * i + "a:\n" for i in range(1, 3000)),
    "5,000 digits": GOOD + f"seed: {'9' * 5000}\n",
    "5,000 digits in base 16": GOOD + f"seed: 0x{'f' * 50_000}\n",
    "a date": GOOD + "name: 2024-01-01\n",
    "a name that is a list": GOOD + "name: [a, b]\n",
    "an adapter's name that is a list": GOOD.replace("name: a", "name: [a]"),
    "adapters are a mapping": GOOD.replace("[{name: a}]", "{name: a}"),
    "adapters are numbers": GOOD.replace("[{name: a}]", "[1, 2]"),
    "a path of 5,000 characters": GOOD.replace("MODEL", "/" + "m" * 5000),
    "a data path of 5,000 characters": GOOD.replace("DATA", "d" * 5000),
    "a start of 5,000 characters": _adapter("continue_from: " + "s" * 5000),
    "a user that is not there": GOOD.replace("MODEL", "~nouser/model"),
    "data of a user that is not there": GOOD.replace("DATA", "~nouser/data"),
    "a template of a user that is not there": GOOD.replace("DATA,", "DATA, chat_template: ~u/t,"),
    "a start of a user that is not there": _adapter("continue_from: ~nouser/a"),
    "a name of 300 characters": GOOD.replace("name: a", f"name: {'a' * 300}"),
    "names that differ in case only": GOOD.replace("{name: a}", "{name: first}, {name: First}"),
    "a name with a path": GOOD.replace("name: a", "name: ../a"),
    "NUL in a path": GOOD.replace("MODEL", '"a\\0b"'),
    "a surrogate in a name": GOOD.replace("MODEL", '"a\\uD800b"'),
    "not UTF-8": GOOD.encode() + b"name: \xff\xfe\n",
    "NUL bytes": GOOD.encode() + b"\0\0\0",
    "UTF-16": GOOD.encode("utf-16"),
    "a billion laughs": _laughs(),
    "a list that holds itself": GOOD + "base: &a [*a]\n",
    "a mapping that holds itself": GOOD + "base: &a {weights: *a}\n",
    "a Python object": GOOD + "name: !!python/object/apply:os.system ['touch MARKER']\n",
    "a key that is a list": GOOD + "? [a, b]\n: 1\n",
    "a key that is a number": GOOD + "7: 1\n",
    "infinity": _adapter("alpha: .inf"),
    "text of a device": GOOD.replace("DATA", "/dev/zero"),
    "a model of a device": GOOD.replace("MODEL", "/dev/zero"),
    "an adapter of a device": _adapter("continue_from: /dev/zero"),
    "a module that opens a browser": GOOD.replace("DATA", '"python:antigravity:webbrowser"'),
    "a module of the process": GOOD.replace("DATA", '"python:__main__:x"'),
    "a package of the process": GOOD.replace("MODEL", '"package:__main__/x"'),
    "two documents": GOOD + "---\n" + GOOD,
    "empty": "",
    "a scalar": "hello",
    "a regular expression that is none": _adapter("target_modules: '((('"),
    "a regular expression of 100,000 groups": _adapter(
        f"target_modules: '{'(' * 50_000}{')' * 50_000}'"
    ),
}
CHANGES = (
    *("seed=1:30", "seed=[" + "[" * 5000, f"seed={'9' * 5000}", "seed=012", "a.b.c=1", "=1"),
    *("seed", "adapters.99.steps=1", "adapters.0.0.0=1", "adapters=[]", "model=null"),
    *("name={a: 1, a: 2}", "name=2024-01-01", "model.source=~nouser"),
    *("data.source=" + "x" * 5000, "seed=!!python/name:os.system"),
)
# what may be accepted, if it is shown as YAML 1.2 says
SHOWN = {"octal": "seed: 12\n", "octal of YAML 1.2": "seed: 15\n", "a date": "name: '2024-01-01'"}
SHOWN |= {"seed=012": "seed: 12\n", "name=2024-01-01": "name: '2024-01-01'"}


def _checked(recipe: Path, place: Path, name: str, *options: str) -> str:
    """What is wrong with how `check` refuses a recipe, or shows it."""
    ended = qwlora("check", recipe, *options, logs=place / "logs")
    is_shown = name in SHOWN and ended.code == 0 and SHOWN[name] in ended.out
    return "" if is_shown else ended.problem(place / "marker")


def test_hostile_recipes_are_refused(
    warm: None, one_layer: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    def attack(name: str, place: Path) -> str:
        content = RECIPES[name]
        path, marker = place / "recipe.yaml", str(place / "marker")
        parts = {"MODEL": str(one_layer), "DATA": str(corpus), "MARKER": marker}
        if isinstance(content, str):
            for word, value in parts.items():
                content = content.replace(word, value)
            content = content.encode("utf-8", "surrogatepass")
        path.write_bytes(content)
        return _checked(path, place, name)

    _run_all(record, "recipes", RECIPES, attack, tmp_path)


def test_hostile_changes_are_refused(
    warm: None, one_layer: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    good = GOOD.replace("MODEL", str(one_layer)).replace("DATA", str(corpus))
    (tmp_path / "recipe.yaml").write_text(good)

    def attack(name: str, place: Path) -> str:
        return _checked(tmp_path / "recipe.yaml", place, name, "--set", name)

    _run_all(record, "changes by --set", CHANGES, attack, tmp_path)


def _link(target: str) -> Callable[[Path], str]:
    def make(place: Path) -> str:
        (place / "link").symlink_to(place / target)
        return str(place / "link")

    return make


def _file(name: str, content: str) -> Callable[[Path], str]:
    def make(place: Path) -> str:
        (place / name).write_text(content)
        return str(place / name)

    return make


def _users(place: Path) -> str:
    (place / "base").mkdir()
    (place / "base" / "mine.txt").write_text("mine")
    (place / "recipe.yaml").write_text("mine: 1\n")
    return str(place)


OUTS: dict[str, Callable[[Path], str]] = {
    "a link to itself": _link("link"),
    "a link to nothing": _link("nowhere/at/all"),
    "a file": _file("out", "mine"),
    "below a file": lambda place: _file("out", "mine")(place) + "/below",
    "a name of 300 characters": lambda place: str(place / ("o" * 300)),
    "a path of 5,000 characters": lambda place: str(place) + "/o" * 2500,
    "a folder of the user's": _users,
    "/proc": lambda place: "/proc/out",
    "/dev/null": lambda place: "/dev/null",
    "below /dev/null": lambda place: "/dev/null/out",
    "empty": lambda place: "",
}


def test_hostile_outs_are_refused(
    warm: None, qwa: Job, one_layer: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", one_layer, corpus)

    def attack(name: str, place: Path) -> str:
        out = OUTS[name](place)
        names, before = sorted(str(p) for p in place.rglob("*")), _mine(place)
        found = []
        commands = {
            "quantize": ("quantize", recipe, "--out", out),
            "merge": ("merge", qwa.finished, "first", "--into", "float", "--out", out),
        }
        for verb, arguments in commands.items():
            ended = qwlora(*arguments, logs=tmp_path / "logs")
            if name == "empty" and ended.code == 2:  # the current folder is not to be touched
                continue
            if problem := ended.refused():
                found.append(f"{verb}: {problem}")
            if sorted(str(p) for p in place.rglob("*")) != names or _mine(place) != before:
                found.append(f"{verb}: changed what was there")
        return "; ".join(found)

    cwd = os.getcwd()
    os.chdir(tmp_path)
    try:
        _run_all(record, "--out", OUTS, attack, tmp_path)
    finally:
        os.chdir(cwd)


def _mine(place: Path) -> list[str]:
    return [p.read_text() for p in sorted(place.rglob("*")) if p.is_file()]


def _lines(record: Any) -> bytes:
    return "\n".join([json.dumps(record)] * 20).encode()


USER, ASSISTANT = (
    {"role": "user", "content": "the grid"},
    {"role": "assistant", "content": "holds"},
)
TURNS = _lines({"messages": [USER, ASSISTANT]})


def _parquet(**columns: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=False)

    return write


def _bad_text(path: Path) -> None:
    data = pa.array([b"\xff\xfe" * 50] * 20, pa.binary()).view(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 20, data.buffers())
    pq.write_table(pa.table({"text": text}), path)


DATA: dict[str, tuple[str, bytes | Callable[[Path], None]]] = {
    "a pipe": ("a.txt", os.mkfifo),
    "a link to a device": ("a.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "text that is not UTF-8": ("a.txt", b"the grid \xff\xfe holds " * 50),
    "JSON lines that are not UTF-8": ("a.jsonl", b'{"text": "\xff\xfe"}\n' * 20),
    "JSON lines that are deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000),
    "JSON that is deep": ("a.json", b"[" * 100_000 + b"]" * 100_000),
    "5,000 digits": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n"),
    "a surrogate": ("a.jsonl", b'{"text": "a \\ud800 b"}\n' * 20),
    "lists for text": ("a.jsonl", _lines({"text": ["a"]})),
    "numbers for records": ("a.jsonl", b"1\n2\n3\n"),
    "NaN for text": ("a.jsonl", b'{"text": NaN}\n' * 20),
    "messages that are text": ("a.jsonl", _lines({"messages": "hello"})),
    "messages without roles": ("a.jsonl", _lines({"messages": [{"content": "x"}]})),
    "CSV with NUL": ("a.csv", b"text\n" + b"a\0b\n" * 20),
    "CSV with an open quote": ("a.csv", b'text\n"' + b"a" * 2_000_000),
    "CSV that is not UTF-8": ("a.csv", b"text\n" + b"\xff\xfe\n" * 20),
    "CSV with 200,000 columns": ("a.csv", b"c,d" * 100_000 + b"\n" + b"1,2" * 100_000),
    "Parquet that is none": ("a.parquet", b"PAR1" + b"\xff" * 500 + b"PAR1"),
    "Parquet that is empty": ("a.parquet", b""),
    "Parquet text that is not UTF-8": ("a.parquet", _bad_text),
    "Parquet of lists": ("a.parquet", _parquet(text=[["a"]] * 20)),
    "Arrow that is none": ("a.arrow", b"ARROW1\0\0" + b"\xff" * 500),
    "gzip": ("a.txt.gz", b"\x1f\x8b\x08\0" + b"\xff" * 100),
    "gzip named .jsonl": ("a.jsonl", b"\x1f\x8b\x08\0" + b"\xff" * 100),
}
TEMPLATES: dict[str, str | bytes] = {
    "template that calls itself": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "template that raises": "{{ raise_exception('no') }}",
    "template that breaks out": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}"
    ),
    "template that is none": "{% for %}",
    "template that is deep": "{{ " + "(" * 50_000,
    "template that is not UTF-8": b"{{ messages }} \xff\xfe",
}


def test_hostile_data_are_refused(
    warm: None, one_layer: Path, record: Record, tmp_path: Path
) -> None:
    def attack(name: str, place: Path) -> str:
        template = TEMPLATES.get(name)
        file, content = DATA[name] if template is None else ("a.jsonl", TURNS)
        marker, source = place / "marker", place / file
        if callable(content):  # in a process of its own, since pyarrow starts threads
            assert python(lambda: content(source), place / "logs").code == 0
        else:
            source.write_bytes(content)
        section = {"source": str(source), "sequence_tokens": 32}
        if template is not None:
            data = template if isinstance(template, bytes) else template.encode()
            (place / "t.jinja").write_bytes(data.replace(b"MARKER", str(marker).encode()))
            section["chat_template"] = str(place / "t.jinja")
        recipe = write_recipe(place / "recipe.yaml", one_layer, source, data=section)
        return qwlora("data", recipe, logs=place / "logs").problem(marker)

    _run_all(record, "data", [*DATA, *TEMPLATES], attack, tmp_path)


def test_data_that_contain_the_output_are_refused(
    warm: None, one_layer: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    def attack(name: str, place: Path) -> str:
        shutil.copytree(corpus, place / "data")
        recipe = write_recipe(place / "recipe.yaml", one_layer, place / "data")
        out = place / "data" / "out" if name == "inside" else place / "data"
        ended = qwlora("quantize", recipe, "--out", out, logs=place / "logs")
        changed = digests(place / "data") != digests(corpus)
        return _joined(ended.refused(), "changed" * changed)

    _run_all(record, "data around --out", dict.fromkeys(("inside", "same")), attack, tmp_path)
