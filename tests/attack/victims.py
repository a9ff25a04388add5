"""Run the command line in forked processes, which start in milliseconds: torch is imported.

The parent must have a single thread when it forks: run the suite with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKERS = 2
TIMEOUT = 300.0
# audit events of the interpreter that change something on disk
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}

_numbers = itertools.count()


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        code: its exit code; minus the signal's number if a signal ended it.
    """

    code: int
    out: str
    err: str
    seconds: float

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.err + self.out

    def refused(self) -> str:
        """Why this is not a refusal in one message with exit code 2; empty if it is."""
        if self.has_traceback:
            return f"a traceback: {self.err.strip()[-300:]}"
        if self.code != 2:
            return f"exit code {self.code}: {(self.out + self.err).strip()[-300:]}"
        if (count := len([x for x in self.err.splitlines() if x.startswith("qwlora: ")])) != 1:
            return f"{count} messages: {self.err.strip()[-300:]}"
        return ""

    def problem(self, marker: Path | None = None, seconds: float = 60.0) -> str:
        """Why this is not such a refusal, in time, of which no code has run that makes `marker`."""
        found = [self.refused()] if self.refused() else []
        found += [f"took {self.seconds:.0f} s"] if self.seconds > seconds else []
        found += ["its code ran"] if marker is not None and marker.exists() else []
        found += [f"{len(self.err)} characters"] if len(self.err) > 20_000 else []
        return "; ".join(found)


@dataclass
class Running:
    """A process that was started."""

    pid: int
    out: Path
    err: Path
    began: float = field(default_factory=time.monotonic)

    status: int | None = None

    def is_done(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def poll(self) -> Ended | None:
        if not self.is_done():
            return None
        assert self.status is not None
        texts = [path.read_text(errors="replace") for path in (self.out, self.err)]
        code = os.waitstatus_to_exitcode(self.status)
        return Ended(code, texts[0], texts[1], time.monotonic() - self.began)

    def wait(self, timeout: float = TIMEOUT) -> Ended:
        """Wait for the end; a process that takes longer is killed, and has exit code -9."""
        while (ended := self.poll()) is None:
            if time.monotonic() - self.began > timeout:
                self.kill()
            time.sleep(0.003)
        return ended

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def stage_began(self) -> bool:
        """Whether it has said that it begins with a stage, or with a merge."""
        said = self.out.read_text(errors="replace") + self.err.read_text(errors="replace")
        return any(word in said for word in (" ...", "perplexity:"))


def other_threads() -> list[str]:
    """Threads of this process that a fork must not lose.

    It may lose the one of pyarrow's allocator, and one that onnxruntime starts when imported.
    """
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    others = [name for name in names[1:] if not name.startswith("jemalloc")]
    return others[1:] if "onnxruntime" in sys.modules else others


def start(action: Callable[[], Any], logs: Path) -> Running:
    """Fork a process that runs `action`; what it prints goes into files in `logs`."""
    deadline = time.monotonic() + 10
    while (others := other_threads()) and time.monotonic() < deadline:
        time.sleep(0.01)  # one may be about to end
    known = [thread.name for thread in threading.enumerate()]
    assert not others, f"OMP_NUM_THREADS=1 is needed to fork: {others}, {known}"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "yes").write_text("y\n" * 1000)  # whatever is asked for
    stem = f"{os.getpid()}-{next(_numbers)}"
    files = [logs / f"{stem}.out", logs / f"{stem}.err"]
    for file in files:
        file.touch()
    pid = os.fork()
    if pid:
        return Running(pid, *files)
    code = 70
    try:
        for number, file in enumerate(files, 1):
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.dup2(os.open(logs / "yes", os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            action()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def command(*arguments: str | Path) -> Callable[[], None]:
    """The command line with these arguments, as an action for `start`."""

    def run() -> None:
        from qwlora.cli.main import main

        sys.argv = ["qwlora", *map(str, arguments)]
        main()

    return run


def inside(folder: Path, action: Callable[[], None]) -> Callable[[], None]:
    """`action` in a folder, so that relative paths, which model cards repeat, are equal."""

    def run() -> None:
        os.chdir(folder)
        action()

    return run


def qwlora(*arguments: str | Path, logs: Path | None = None, timeout: float = TIMEOUT) -> Ended:
    """Run the command line in a process of its own and wait for it."""
    with _folder(logs) as folder:
        return start(command(*arguments), folder).wait(timeout)


def python(action: Callable[[], Any], logs: Path | None = None) -> Ended:
    """Run a function in a process of its own. An error of QWLoRA ends it like the command line."""

    def run() -> None:
        from qwlora.errors import QwloraError

        try:
            action()
        except QwloraError as error:
            print(f"qwlora: {error}", file=sys.stderr)
            sys.exit(2)

    with _folder(logs) as folder:
        return start(run, folder).wait()


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def killed_at_change(action: Callable[[], None], folder: Path, number: int) -> Callable[[], None]:
    """`action`, which kills itself right before its nth change to `folder`, n being `number`."""

    def run() -> None:
        count = itertools.count(1)

        def die() -> None:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        _watch(folder, die)
        action()

    return run


def counting_changes(action: Callable[[], None], folder: Path, into: Path) -> Callable[[], None]:
    """`action`, which writes how many changes to `folder` it made into a file."""

    def run() -> None:
        made: list[None] = []
        _watch(folder, lambda: made.append(None))
        try:
            action()
        finally:
            into.write_text(str(len(made)))

    return run


def _watch(folder: Path, notice: Callable[[], None]) -> None:
    inside = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and _writes(arguments)):
            path = arguments[0]
            if isinstance(path, bytes):
                path = os.fsdecode(path)
            # a relative path belongs to a removal of a tree, which goes by directory descriptors
            if isinstance(path, str | os.PathLike):
                path = os.fspath(path)
                if path.startswith(inside) or not path.startswith("/"):
                    notice()

    sys.addaudithook(hook)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def parallel(function: Callable[[Any, Path], Any], items: Sequence[Any], folder: Path) -> list[Any]:
    """`function(item, own folder)` of every item, in forked workers; results in the items' order.

    Results must be JSON. A function that raises has `{"error": traceback}`.
    """
    read, write = os.pipe()
    for number in range(len(items)):  # a pipe holds 64 KiB
        os.write(write, number.to_bytes(4, "little"))
    os.close(write)
    workers = []
    for number in range(WORKERS):
        own = folder / f"worker{number}"
        own.mkdir(parents=True, exist_ok=True)

        def work(own: Path = own) -> None:
            with (own / "results.jsonl").open("w", buffering=1) as file:
                while taken := os.read(read, 4):
                    place = int.from_bytes(taken, "little")
                    try:
                        result = function(items[place], own)
                    except Exception:
                        result = {"error": traceback.format_exc()[-400:]}
                    file.write(json.dumps([place, result]) + "\n")

        workers.append((start(work, own / "logs"), own))
    os.close(read)
    results: dict[int, Any] = {}
    for running, own in workers:
        ended = running.wait(timeout=3600)
        assert ended.code == 0, ended.err
        for line in (own / "results.jsonl").read_text().splitlines():
            place, result = json.loads(line)
            results[place] = result
        shutil.rmtree(own, ignore_errors=True)
    return [results[place] for place in range(len(items))]


def seeds(base: int, *names: str) -> random.Random:
    """A generator of its own for an attack, the same whatever else runs."""
    return random.Random("/".join([str(base), *names]))


def failing_at_change(action: Callable[[], None], folder: Path, number: int) -> int:
    """Run `action`, whose nth change to `folder` fails as on a full disk; n = 0: none does. How
    many changes it made.

    For a process of its own: the interpreter keeps the hook. What the action does afterwards to
    undo its changes succeeds.
    """
    made: list[None] = []

    def fail() -> None:
        made.append(None)
        if len(made) == number:
            raise OSError(errno.ENOSPC, "No space left on device")

    _watch(folder, fail)
    with contextlib.suppress(*[OSError] if number else []):
        action()
    return len(made)
