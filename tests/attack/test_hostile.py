"""Hostile models, adapters, recipes and data: one message, exit code 2, none of their code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from . import hostile_models
from .jobs import Job, digests, write_recipe
from .record import Record
from .victims import Ended, parallel, python, qwlora

pytestmark = pytest.mark.attack
SECONDS = 60.0  # until a hostile input must be refused, on a machine that is busy with the others

Check = Callable[[Ended], str]


def refused(ended: Ended) -> str:
    return ended.refused()


def _run_all(
    record: Record,
    row: str,
    cases: dict[str, Any],
    attack: Callable[[str, Path], str],
    folder: Path,
) -> None:
    """Run every case, count it under one row, and fail with all that did not hold."""
    since, names = len(record.failures), list(cases)

    def one(name: str, own: Path) -> dict[str, str]:
        place = own / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return {"problem": attack(name, place)}

    for name, result in zip(names, parallel(one, names, folder), strict=True):
        record.add("hostile", row, result.get("error") or result["problem"], name)
    record.check(since)


def _after(ended: Ended, marker: Path, out: Path | None = None) -> str:
    problems = [ended.refused()] if ended.refused() else []
    if ended.seconds > SECONDS:
        problems.append(f"took {ended.seconds:.0f} s")
    if marker.exists():
        problems.append("its code ran")
    if out is not None and out.exists():
        # finished blocks stay in the hidden folder for the next run, and what the report says
        is_begun = any((out / ".qwlora" / "work").rglob("*"))
        may_stay = {"recipe.yaml", "results.json", "report.html"} if is_begun else set()
        if left := {p.name for p in out.glob("[!.]*")} - may_stay:
            problems.append(f"left {sorted(left)}")
    return "; ".join(problems)


def test_hostile_models_are_refused(
    warm: None, two_layers: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    def attack(name: str, place: Path) -> str:
        marker, model = place / "marker", place / "model"
        shutil.copytree(two_layers, model)
        hostile_models.MODELS[name](model, marker)
        recipe = write_recipe(place / "recipe.yaml", model, corpus)
        found = []
        for verb in (
            ("quantize", str(recipe), "--out", str(place / "out")),
            ("inspect", str(model)),
        ):
            if verb[0] == "inspect":  # reads headers alone, so it may well succeed
                ended = qwlora(*verb, logs=place / "logs")
                if ended.code not in (0, 2) or ended.has_traceback:
                    found.append(f"inspect: {ended.refused()}")
                if marker.exists():
                    found.append("inspect: its code ran")
            else:
                ended = qwlora(*verb, logs=place / "logs")
                if ended.code == 0 and name in hostile_models.HARMLESS and not marker.exists():
                    continue
                if problem := _after(ended, marker, place / "out"):
                    found.append(problem)
        return "; ".join(found)

    cases = hostile_models.MODELS
    _run_all(record, "models", cases, attack, tmp_path)


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
        found = []
        own = qwlora("merge-check", job, "first", logs=place / "logs")
        found += [f"merge-check: {p}" for p in [_after(own, marker)] if p]
        listed = qwlora("adapters", "check", foreign, logs=place / "logs")
        # what only shows once a model is there is for `train` to refuse
        if listed.has_traceback or listed.code not in (0, 1, 2) or marker.exists():
            found.append(f"adapters check: {listed.refused()}")
        recipe = yaml.safe_load(tuned.recipe.read_text())
        recipe["adapters"] = [
            {
                "name": "next",
                "continue_from": str(foreign),
                "unknown_base": "accept",
                "steps": 1,
                "warmup_steps": 0,
            }
        ]
        recipe["base"] = {"solver": "rtn"}
        (place / "next.yaml").write_text(yaml.safe_dump(recipe))
        shutil.copytree(started, place / "started")
        train = ("train", place / "next.yaml", "--out", place / "started")
        ended = qwlora(*train, logs=place / "logs")
        found += [f"start: {p}" for p in [_after(ended, marker)] if p]
        if (place / "started" / "adapters").exists():
            found.append("start: wrote an adapter")
        if digests(job) != before:
            found.append("merge-check changed the job")
        return "; ".join(found)

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


def shows(text: str) -> Check:
    """Either refused, or it is what YAML 1.2 says."""

    def check(ended: Ended) -> str:
        return "" if ended.code == 0 and text in ended.out else ended.refused()

    return check


RECIPES: dict[str, tuple[str | bytes, Check]] = {
    "a key twice": (GOOD + "seed: 1\nseed: 2\n", refused),
    "a section twice": (GOOD + "base: {solver: rtn}\nbase: {solver: gptq}\n", refused),
    "a key twice, deep": (GOOD.replace("{name: a}", "{name: a, rank: 4, rank: 8}"), refused),
    "a key twice by merging": (GOOD + "seed: 1\n<<: {seed: 2}\n<<: {seed: 3}\n", refused),
    "octal": (GOOD + "seed: 012\n", shows("seed: 12\n")),
    "octal of YAML 1.2": (GOOD + "seed: 0o17\n", shows("seed: 15\n")),
    "sexagesimal": (GOOD + "seed: 1:30\n", refused),
    "sexagesimal fraction": (
        GOOD.replace("{name: a}", "{name: a, alpha: 1:30.5}"),
        refused,
    ),
    "underscores": (GOOD + "seed: 1_000\n", refused),
    "yes is a word": (GOOD.replace("{name: a}", "{name: a, dora: yes}"), refused),
    "binary": (GOOD + "seed: 0b11\n", refused),
    "deep lists": (GOOD + "seed: " + "[" * 20_000 + "]" * 20_000, refused),
    "deep mappings": (GOOD + "seed: " + "{a: " * 20_000 + "1" + "}" * 20_000, refused),
    "deep blocks": (GOOD + "base:\n" + "".join(" " * i + "a:\n" for i in range(1, 3000)), refused),
    "5,000 digits": (GOOD + f"seed: {'9' * 5000}\n", refused),
    "5,000 digits in base 16": (GOOD + f"seed: 0x{'f' * 50_000}\n", refused),
    "a date": (GOOD + "name: 2024-01-01\n", shows("name: '2024-01-01'")),
    "a name that is a list": (GOOD + "name: [a, b]\n", refused),
    "an adapter's name that is a list": (GOOD.replace("name: a", "name: [a]"), refused),
    "adapters are a mapping": (GOOD.replace("[{name: a}]", "{name: a}"), refused),
    "adapters are numbers": (GOOD.replace("[{name: a}]", "[1, 2]"), refused),
    "a path of 5,000 characters": (GOOD.replace("MODEL", "/" + "m" * 5000), refused),
    "a data path of 5,000 characters": (GOOD.replace("DATA", "d" * 5000), refused),
    "a start of 5,000 characters": (
        GOOD.replace("{name: a}", "{name: a, continue_from: " + "s" * 5000 + "}"),
        refused,
    ),
    "a user that is not there": (GOOD.replace("MODEL", "~nouser/model"), refused),
    "data of a user that is not there": (GOOD.replace("DATA", "~nouser/data"), refused),
    "a template of a user that is not there": (
        GOOD.replace("DATA,", "DATA, chat_template: ~nouser/t,"),
        refused,
    ),
    "a start of a user that is not there": (
        GOOD.replace("{name: a}", "{name: a, continue_from: ~nouser/a}"),
        refused,
    ),
    "a name of 300 characters": (GOOD.replace("name: a", f"name: {'a' * 300}"), refused),
    "names that differ in case only": (
        GOOD.replace("[{name: a}]", "[{name: first}, {name: First}]"),
        refused,
    ),
    "a name with a path": (GOOD.replace("name: a", "name: ../a"), refused),
    "NUL in a path": (GOOD.replace("MODEL", '"a\\0b"'), refused),
    "a surrogate in a name": (GOOD.replace("MODEL", '"a\\uD800b"'), refused),
    "not UTF-8": (GOOD.encode() + b"name: \xff\xfe\n", refused),
    "NUL bytes": (GOOD.encode() + b"\0\0\0", refused),
    "UTF-16": (GOOD.encode("utf-16"), refused),
    "a billion laughs": (_laughs(), refused),
    "a list that holds itself": (GOOD + "base: &a [*a]\n", refused),
    "a mapping that holds itself": (GOOD + "base: &a {weights: *a}\n", refused),
    "a Python object": (GOOD + "name: !!python/object/apply:os.system ['touch MARKER']\n", refused),
    "a key that is a list": (GOOD + "? [a, b]\n: 1\n", refused),
    "a key that is a number": (GOOD + "7: 1\n", refused),
    "infinity": (GOOD.replace("{name: a}", "{name: a, alpha: .inf}"), refused),
    "two documents": (GOOD + "---\n" + GOOD, refused),
    "empty": ("", refused),
    "a scalar": ("hello", refused),
    "a regular expression that is none": (
        GOOD.replace("{name: a}", "{name: a, target_modules: '((('}"),
        refused,
    ),
    "a regular expression of 100,000 groups": (
        GOOD.replace(
            "{name: a}", "{name: a, target_modules: '" + "(" * 50_000 + ")" * 50_000 + "'}"
        ),
        refused,
    ),
}

CHANGES: dict[str, Check] = {
    "seed=1:30": refused,
    "seed=[" + "[" * 5000: refused,
    f"seed={'9' * 5000}": refused,
    "seed=012": shows("seed: 12\n"),
    "a.b.c=1": refused,
    "=1": refused,
    "seed": refused,
    "adapters.99.steps=1": refused,
    "adapters.0.0.0=1": refused,
    "adapters=[]": refused,
    "model=null": refused,
    "name={a: 1, a: 2}": refused,
    "name=2024-01-01": shows("name: '2024-01-01'"),
    "model.source=~nouser": refused,
    "data.source=" + "x" * 5000: refused,
    "seed=!!python/name:os.system": refused,
}


def test_hostile_recipes_are_refused(
    warm: None, one_layer: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    def attack(name: str, place: Path) -> str:
        content, check = RECIPES[name]
        marker, path = place / "marker", place / "recipe.yaml"
        parts = {"MODEL": str(one_layer), "DATA": str(corpus), "MARKER": str(marker)}
        if isinstance(content, str):
            for word, value in parts.items():
                content = content.replace(word, value)
            content = content.encode("utf-8", "surrogatepass")
        path.write_bytes(content)
        return _recipe_problem(qwlora("check", path, logs=place / "logs"), marker, check)

    _run_all(record, "recipes", RECIPES, attack, tmp_path)


def test_hostile_changes_are_refused(
    warm: None, one_layer: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    good = GOOD.replace("MODEL", str(one_layer)).replace("DATA", str(corpus))
    (tmp_path / "recipe.yaml").write_text(good)

    def attack(name: str, place: Path) -> str:
        ended = qwlora("check", tmp_path / "recipe.yaml", "--set", name, logs=place / "logs")
        return _recipe_problem(ended, place / "marker", CHANGES[name])

    _run_all(record, "changes by --set", CHANGES, attack, tmp_path)


def _recipe_problem(ended: Ended, marker: Path, check: Check) -> str:
    problems = [check(ended)] if check(ended) else []
    problems += ["took a minute"] * (ended.seconds > SECONDS) + ["code ran"] * marker.exists()
    if len(ended.err) > 20_000:
        problems.append(f"a message of {len(ended.err)} characters")
    return "; ".join(problems)


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


TURNS = [
    {
        "messages": [
            {"role": "user", "content": "the grid"},
            {"role": "assistant", "content": "holds"},
        ]
    }
] * 20
ENDLESS = "".join(f"{{% for {name} in range(99999) %}}" for name in "ijk") + "{% endfor %}" * 3


def _lines(*records: Any) -> bytes:
    return "\n".join(json.dumps(r) for r in records).encode()


def _parquet(**columns: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=False)

    return write


def _bad_text(path: Path) -> None:
    data = pa.array([b"\xff\xfe" * 50] * 20, pa.binary()).view(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 20, data.buffers())
    pq.write_table(pa.table({"text": text}), path)


def _bomb(path: Path) -> None:
    """A gigabyte in a few kilobytes."""
    schema = pa.schema({"text": pa.string()})
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(16):
            writer.write_table(pa.table({"text": ["a" * 2**26]}, schema))


def _arrow_bomb(path: Path) -> None:
    schema = pa.schema({"text": pa.string()})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(path, schema, options=options) as writer:
        for _ in range(16):
            writer.write_table(pa.table({"text": ["a" * 2**26]}, schema))


DATA: dict[str, tuple[str, bytes | Callable[[Path], None], str | bytes | None]] = {
    "text that is not UTF-8": ("a.txt", b"the grid \xff\xfe holds " * 50, None),
    "JSON lines that are not UTF-8": ("a.jsonl", b'{"text": "\xff\xfe"}\n' * 20, None),
    "JSON lines that are deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000, None),
    "JSON that is deep": ("a.json", b"[" * 100_000 + b"]" * 100_000, None),
    "5,000 digits": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", None),
    "a surrogate": ("a.jsonl", b'{"text": "a \\ud800 b"}\n' * 20, None),
    "lists for text": ("a.jsonl", _lines(*[{"text": ["a"]}] * 20), None),
    "numbers for records": ("a.jsonl", b"1\n2\n3\n", None),
    "NaN for text": ("a.jsonl", b'{"text": NaN}\n' * 20, None),
    "messages that are text": ("a.jsonl", _lines(*[{"messages": "hello"}] * 20), None),
    "messages without roles": ("a.jsonl", _lines(*[{"messages": [{"content": "x"}]}] * 20), None),
    "CSV with NUL": ("a.csv", b"text\n" + b"a\0b\n" * 20, None),
    "CSV with an open quote": ("a.csv", b'text\n"' + b"a" * 2_000_000, None),
    "CSV that is not UTF-8": ("a.csv", b"text\n" + b"\xff\xfe\n" * 20, None),
    "CSV with 200,000 columns": ("a.csv", b"c,d" * 100_000 + b"\n" + b"1,2" * 100_000, None),
    "Parquet that is none": ("a.parquet", b"PAR1" + b"\xff" * 500 + b"PAR1", None),
    "Parquet that is empty": ("a.parquet", b"", None),
    "Parquet text that is not UTF-8": ("a.parquet", _bad_text, None),
    "Parquet of lists": ("a.parquet", _parquet(text=[["a"]] * 20), None),
    "Parquet bomb": ("a.parquet", _bomb, None),
    "Arrow that is none": ("a.arrow", b"ARROW1\0\0" + b"\xff" * 500, None),
    "Arrow bomb": ("a.arrow", _arrow_bomb, None),
    "gzip": ("a.txt.gz", b"\x1f\x8b\x08\0" + b"\xff" * 100, None),
    "gzip named .jsonl": ("a.jsonl", b"\x1f\x8b\x08\0" + b"\xff" * 100, None),
    "template that loops": ("a.jsonl", _lines(*TURNS), ENDLESS),
    "template that calls itself": (
        "a.jsonl",
        _lines(*TURNS),
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    ),
    "template that fills memory": (
        "a.jsonl",
        _lines(*TURNS),
        "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(40) %}"
        "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    ),
    "template that multiplies": ("a.jsonl", _lines(*TURNS), "{{ 'a' * 10**11 }}"),
    "template that pads": ("a.jsonl", _lines(*TURNS), "{{ messages | center(300000000) }}"),
    "template with a power": ("a.jsonl", _lines(*TURNS), "{{ 10 ** 10 ** 10 }}"),
    "template that raises": ("a.jsonl", _lines(*TURNS), "{{ raise_exception('no') }}"),
    "template that breaks out": (
        "a.jsonl",
        _lines(*TURNS),
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    ),
    "template that is none": ("a.jsonl", _lines(*TURNS), "{% for %}"),
    "template that is deep": ("a.jsonl", _lines(*TURNS), "{{ " + "(" * 50_000),
    "template that is not UTF-8": ("a.jsonl", _lines(*TURNS), b"{{ messages }} \xff\xfe"),
}


def test_hostile_data_are_refused(
    warm: None, one_layer: Path, record: Record, tmp_path: Path
) -> None:
    def attack(name: str, place: Path) -> str:
        file, content, template = DATA[name]
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
        return _after(qwlora("data", recipe, logs=place / "logs"), marker)

    _run_all(record, "data", DATA, attack, tmp_path)


EXPRESSIONS: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": r"([a-z_.0-9]+)+!"},
    "rank_pattern": {"rank_pattern": {r"([a-z_.0-9]+)+!": 8}},
    "alpha_pattern": {"alpha_pattern": {r"([a-z_.0-9]+)+!": 8.0}},
}


def test_regular_expressions_that_backtrack_for_ever_are_refused(
    warm: None, one_layer: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    def attack(name: str, place: Path) -> str:
        adapters = [{"name": "first", "rank": 4, "steps": 1, **EXPRESSIONS[name]}]
        recipe = write_recipe(place / "recipe.yaml", one_layer, corpus, adapters=adapters)
        ended = qwlora("run", recipe, "--out", place / "out", logs=place / "logs")
        return _after(ended, place / "marker", place / "out")

    _run_all(record, "regular expressions", EXPRESSIONS, attack, tmp_path)


def test_data_that_contain_the_output_are_refused(
    warm: None, one_layer: Path, corpus: Path, record: Record, tmp_path: Path
) -> None:
    def attack(name: str, place: Path) -> str:
        shutil.copytree(corpus, place / "data")
        recipe = write_recipe(place / "recipe.yaml", one_layer, place / "data")
        out = place / "data" / "out" if name == "inside" else place / "data"
        ended = qwlora("quantize", recipe, "--out", out, logs=place / "logs")
        changed = digests(place / "data") != digests(corpus)
        return "; ".join([*([ended.refused()] if ended.refused() else []), *["changed"] * changed])

    _run_all(record, "data around --out", dict.fromkeys(("inside", "same")), attack, tmp_path)
