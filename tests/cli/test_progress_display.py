"""What a person sees while a command runs, on a terminal and without one."""

import contextlib
import os
import pty
import re
import time
from collections.abc import Iterator
from unittest import mock

import pytest

from qwlora.cli.terminal import LINE_SECONDS, ProgressDisplay


@contextlib.contextmanager
def terminal() -> Iterator[int]:
    """Standard error is a terminal of 80 columns; the file descriptor of its screen."""
    screen, ours = pty.openpty()
    environment = mock.patch.dict("os.environ", {"TERM": "xterm-256color", "COLUMNS": "80"})
    with environment, os.fdopen(ours, "w") as file, contextlib.redirect_stderr(file):
        yield screen
    os.close(screen)


def shown(screen: int) -> str:
    os.set_blocking(screen, False)
    parts = []
    while True:
        try:
            parts.append(os.read(screen, 65536))
        except BlockingIOError:
            return b"".join(parts).decode()


def interrupted_job() -> None:
    with ProgressDisplay() as display:
        display.say("quantize ...")
        display.watch("quantize", 1, 2)
        for item in display.track(range(4), "quantizing", 4):
            time.sleep(0.3)
            if item == 2:
                raise KeyboardInterrupt


def test_a_terminal_shows_the_job_and_its_step_and_is_clean_after_an_interruption() -> None:
    with terminal() as screen:
        with pytest.raises(KeyboardInterrupt):
            interrupted_job()
        text = shown(screen)
    assert all(part in text for part in ("1/2 quantize", "left", "2/4"))
    assert text.index("quantize ...") < text.index("2/4")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is visible again
    assert text.endswith("\x1b[2K")  # and the bars are erased


def test_without_a_terminal_lines_are_few(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LINE_SECONDS == 30.0
    monkeypatch.setattr("qwlora.cli.terminal.LINE_SECONDS", 0.4)
    with ProgressDisplay() as display:
        display.watch("train/a", 1, 1)
        for _ in display.track(range(10), "training", 10):
            time.sleep(0.1)
        steps = capsys.readouterr()
        time.sleep(0.5)  # a stage without steps
        stage = capsys.readouterr().err
    assert steps.out == ""
    assert 1 <= len(steps.err.splitlines()) <= 2
    assert re.match(r"train/a \(1 of 1\): .*training.*left", steps.err)
    assert re.match(r"train/a \(1 of 1\): 0:00:0\d so far\n", stage)


def test_quiet_shows_nothing_but_what_libraries_print(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwlora.cli.terminal.LINE_SECONDS", 0.05)
    with ProgressDisplay(quiet=True) as display:
        display.say("a line")
        print("a banner")
        assert list(display.track(range(3), "training", 3)) == [0, 1, 2]
        time.sleep(0.2)
    print("a result")
    assert capsys.readouterr() == ("a result\n", "a banner\n")
