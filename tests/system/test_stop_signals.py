"""SIGINT, SIGTERM and SIGHUP: what they do to the command line, and to training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from conftest import packed_model
from qwlora.adapter.attach import LoraShape, attach
from qwlora.adapter.train import Interrupted, TrainingSettings, train_adapter
from qwlora.adapter.trainer import last_checkpoint
from qwlora.system.stop_signals import STOP_SIGNALS, on_stop_signal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

# the command line with a stage that takes long, so that no model is needed
WAITING = """
import sys, time
import qwlora.pipeline.commands.open_job
import qwlora.pipeline.run
from qwlora.cli.main import main

def wait(*_, **__):
    try:
        print("waiting", file=sys.__stdout__, flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", file=sys.__stdout__, flush=True)

qwlora.pipeline.run.run = qwlora.pipeline.commands.open_job.open_job = wait
sys.argv[1:] = {arguments!r}
main()
"""


@pytest.fixture(autouse=True)
def signals_of_a_terminal() -> Iterator[None]:
    """`nohup` hands down an ignored SIGHUP. SIGINT has the handler of `conftest.py`."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS[1:]}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def waiting(*arguments: str) -> list[str]:
    return [sys.executable, "-c", WAITING.format(arguments=list(arguments))]


RUN = ("run", "recipe.yaml", "--out", "out")


@pytest.mark.parametrize(
    ("arguments", "number", "remedy"),
    [
        *((RUN, number, "The same command resumes from here.") for number in STOP_SIGNALS),
        (("merge", "out", "first"), signal.SIGTERM, "Run the command again."),
    ],
)
def test_a_signal_ends_a_command(arguments: tuple[str, ...], number: int, remedy: str) -> None:
    process = subprocess.Popen(
        waiting(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "cleaned up\n")
    assert errors == f"qwlora: interrupted by {signal.Signals(number).name}. {remedy}\n"


def test_a_closed_terminal_ends_a_command_that_still_cleans_up(tmp_path: Path) -> None:
    """What is printed after the terminal is gone must not be an error."""
    import pty

    command = waiting("run", "recipe.yaml", "--out", "out")
    process, terminal = pty.fork()
    if process == 0:
        os.execv(command[0], command)
    seen = b""
    while b"waiting" not in seen:
        seen += os.read(terminal, 1000)
    os.close(terminal)  # the kernel sends SIGHUP
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP


def test_an_ignored_signal_stays_ignored() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_stop_signal(seen.append):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_other_threads_leave_signals_alone() -> None:
    def work() -> signal.Handlers:
        with on_stop_signal(lambda number: None):
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor() as threads:
        assert threads.submit(work).result() == signal.SIG_DFL


def test_training_finishes_the_step_and_writes_a_checkpoint(tmp_path: Path) -> None:
    """Twice, as closed terminals do: only a second Ctrl-C does not wait for the checkpoint."""
    number = signal.SIGHUP
    model = packed_model("llama")
    adapted = attach(model.requires_grad_(False), LoraShape(rank=4, alpha=8), seed=0)
    settings = TrainingSettings(6, 5e-3, 2, 1, "constant", checkpoint_steps=5, seed=0)

    def track(items: Iterable[int], description: str, total: int | None = None) -> Iterator[int]:
        for step in items:
            if description == "training" and step == 2:
                signal.raise_signal(number)
                signal.raise_signal(number)
            yield step

    with pytest.raises(Interrupted) as caught:
        train_adapter(adapted, torch.arange(256).view(8, 32), settings, tmp_path, track=track)
    assert (caught.value.number, caught.value.step in (2, 3)) == (number, True)
    assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{caught.value.step}"
