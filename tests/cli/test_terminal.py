"""What reaches standard output and standard error: no control character of data, and JSON alone."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.table import Table

from cli.command_line import refused
from qwlora.cli.terminal import ProgressDisplay, console, safe_streams, score_lines
from qwlora.errors import (
    EncodingsFileError,
    RecipeError,
    VerificationError,
    escaped,
    near_names,
    shortened,
)

HOSTILE = "\x1b[2J\x1b]8;;http://x\x07bell\x9b31m\u202eevil\r\x7f"
SHOWN = r"\x1b[2J\x1b]8;;http://x\x07bell\x9b31m\u202eevil\r\x7f"


def test_control_characters_become_escapes_and_text_stays() -> None:
    assert escaped(HOSTILE) == SHOWN
    assert escaped("\udc80") == r"\udc80"
    text = "tabs\tand\nlines, naïve — 你好 👩‍🚀 ⟦x⟧"
    assert escaped(text) == text


def test_long_text_is_cut_and_says_so() -> None:
    assert shortened("x" * 10, 10) == "x" * 10
    assert shortened("x" * 1234, 10) == "x" * 10 + "... (1,224 more characters)"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["print", "table", "say"])
@pytest.mark.parametrize("stream", [io.StringIO, Screen])
def test_no_way_of_printing_passes_control_characters_on(
    kind: str, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out, err = stream(), stream()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), safe_streams(["data"]):
        if kind == "print":
            print(HOSTILE)
            print(HOSTILE, file=sys.stderr)
        elif kind == "say":
            with ProgressDisplay() as display:
                list(display.track([1], HOSTILE, 1))
                display.say(HOSTILE)
        else:
            table = Table("name", box=None)
            table.add_row(HOSTILE, style="bold")
            console(width=200).print(table)
            console(stderr=True, width=200).print(HOSTILE)
    shown = out.getvalue() + err.getvalue()
    assert "evil" in shown
    for part in ("\x1b[2J", "\x1b]8", "\x9b31m", "\u202e"):
        assert part not in shown


def test_names_are_not_read_as_markup() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        console(width=80).print("adapter [red]x[/red] [/]")
    assert out.getvalue() == "adapter [red]x[/red] [/]\n"


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)


PRINTING = """
import os, sys
from qwlora.cli.terminal import print_json, safe_streams
with safe_streams(sys.argv[1:]):
    print('banner', flush=True)
    os.write(1, b'of C\\n')
    print_json({'a': 1})
    print('later')
print('after')
"""


@pytest.mark.parametrize("options", [["--json"], []])
def test_standard_output_of_json_is_json_whatever_libraries_print(options: list[str]) -> None:
    result = run_python(PRINTING, *options)
    content = '{\n "a": 1\n}\n'
    if options:
        assert (result.stdout, result.stderr) == (content + "after\n", "banner\nof C\nlater\n")
    else:
        assert result.stdout == f"banner\nof C\n{content}later\nafter\n"


@pytest.mark.parametrize("kind", [RecipeError, EncodingsFileError, VerificationError])
def test_lists_of_problems_have_a_limit(kind: Any) -> None:
    problems = [f"layer {i}: wrong" for i in range(3000)]
    problems[2] = "y" * 50_000
    message = str(kind("x.yaml", problems))
    assert len(message) < 5000
    assert "and 2950 more" in message
    assert "(48,000 more characters)" in message


def test_thousands_of_unknown_keys_are_one_short_message(recipe_for: Any, tmp_path: Path) -> None:
    path = recipe_for()
    content = yaml.safe_load(path.read_text())
    content["data"] |= {f"sequence_token{i}": i for i in range(3000)}
    path.write_text(yaml.safe_dump(content))
    message = refused("check", path)
    assert "3000 problems" in message
    assert len(message) < 10_000


def test_near_names_take_no_longer_for_a_file_of_many_names() -> None:
    assert near_names("txt", ["text", *(f"column{i}" for i in range(300_000))], 1) == ["text"]
    assert near_names("zzzz", (f"column{i}" for i in range(10**6))) == []


@pytest.mark.parametrize("value", ["-1", "inf", "1e9"])
def test_temperatures_that_no_runtime_can_use_are_refused(value: str, tmp_path: Path) -> None:
    message = refused("generate", tmp_path, "hi", "--temperature", value)
    assert "--temperature" in message


BARS = """
import sys, contextlib
from qwlora.cli.main import main
sys.argv = ['qwlora', '--version']
with contextlib.suppress(SystemExit):
    main()
import tqdm
from huggingface_hub.utils import tqdm as hub_tqdm
list(tqdm.tqdm(range(3)))
list(hub_tqdm(range(3)))
"""


def test_progress_bars_of_other_libraries_are_not_shown() -> None:
    assert run_python(BARS).stderr == ""


def test_scores_of_tasks_are_one_table() -> None:
    def scores(value: float, error: float | None) -> dict[str, Any]:
        return {"copa": {"metrics": {"acc": {"value": value, "stderr": error}}}}

    stages = {"base": scores(0.5, None), "adapted": {"first": scores(0.75, 0.1)}}
    assert [line.split() for line in score_lines(stages)] == [
        ["task", "metric", "model", "value", "±", "stderr"],
        ["copa", "acc", "base", "0.5000"],
        ["copa", "acc", "adapted/first", "0.7500", "0.1000"],
    ]
