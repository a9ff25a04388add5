"""What reaches standard output and standard error: no control character of data, and JSON alone."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time
from typing import Any

import pytest
from rich.table import Table

from qwlora.cli.terminal import ProgressDisplay, console, safe_streams
from qwlora.errors import EncodingsFileError, RecipeError, VerificationError, escaped

HOSTILE = "\x1b[2J\x1b]8;;http://x\x07bell\x9b31m\u202eevil\r\x7f"
SHOWN = r"\x1b[2J\x1b]8;;http://x\x07bell\x9b31m\u202eevil\r\x7f"


def test_control_characters_become_escapes_and_text_stays() -> None:
    assert escaped(HOSTILE) == SHOWN
    assert escaped("\udc80") == r"\udc80"
    text = "tabs\tand\nlines, naïve — 你好 👩‍🚀 ⟦x⟧"
    assert escaped(text) == text


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["print", "table", "say"])
@pytest.mark.parametrize("stream", [io.StringIO, Screen])
def test_no_way_of_printing_passes_control_characters_on(kind, stream, monkeypatch) -> None:
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
            console(width=200).print(table, "[red]x[/red] [/]")
            console(stderr=True, width=200).print(HOSTILE)
    shown = out.getvalue() + err.getvalue()
    assert "evil" in shown
    assert kind != "table" or "[red]x[/red] [/]" in shown  # names are no markup
    for part in ("\x1b[2J", "\x1b]8", "\x9b31m", "\u202e"):
        assert part not in shown


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
    command = [sys.executable, "-c", PRINTING, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
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


def test_a_terminal_shows_the_job_and_is_clean_after_an_interruption(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    screen, ours = pty.openpty()
    os.set_blocking(screen, False)
    with io.FileIO(screen) as terminal, os.fdopen(ours, "w") as file:
        interrupted = pytest.raises(KeyboardInterrupt)
        with contextlib.redirect_stderr(file), interrupted, ProgressDisplay() as display:
            display.say("quantize ...")
            display.watch("quantize", 1, 2)
            for item in display.track(range(4), "quantizing", 4):
                time.sleep(0.3)
                if item == 2:
                    raise KeyboardInterrupt
        text = terminal.readall().decode()
    assert all(part in text for part in ("1/2 quantize", "left", "2/4"))
    assert text.index("quantize ...") < text.index("2/4")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is visible again
    assert text.endswith("\x1b[2K")  # and the bars are erased


def test_without_a_terminal_lines_are_few_and_none_if_quiet(capsys, monkeypatch) -> None:
    monkeypatch.setattr("qwlora.cli.terminal.LINE_SECONDS", 0.4)
    with ProgressDisplay() as display:
        display.watch("train/a", 1, 1)
        for _ in display.track(range(10), "training", 10):
            time.sleep(0.1)
        steps = capsys.readouterr()
    assert (steps.out, 1 <= len(steps.err.splitlines()) <= 2) == ("", True)
    assert re.match(r"train/a \(1 of 1\): .*training.*left", steps.err)
    capsys.readouterr()
    with ProgressDisplay(quiet=True) as display:
        display.say("a line")
        print("a banner")
        for _ in display.track(range(10), "training", 10):
            time.sleep(0.1)
    print("a result")
    assert capsys.readouterr() == ("a result\n", "a banner\n")
