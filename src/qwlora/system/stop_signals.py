"""Signals that ask a run to stop: Ctrl-C (SIGINT), SIGTERM and SIGHUP.

    signal     who sends it                                exit code (128 + number)
    SIGINT     Ctrl-C                                      130
    SIGTERM    kill, job schedulers, container runtimes    143
    SIGHUP     a terminal that is closed                   129

The exit code of a stopped command follows from the number of the signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Stopped(KeyboardInterrupt):
    """The process was asked to stop by signal `number`."""

    def __init__(self, number: int, where: str = ""):
        self.number = number
        super().__init__(where)


def number_of(interrupt: KeyboardInterrupt) -> int:
    """The signal that `interrupt` came from."""
    return interrupt.number if isinstance(interrupt, Stopped) else signal.SIGINT


@contextlib.contextmanager
def on_stop_signal(handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` with the number of each stop signal that arrives in the block."""
    # Python lets only the main thread handle signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _: object) -> None:
        if number != signal.SIGINT:
            _leave_closed_terminal()
        handle(number)

    # A signal that was ignored when the process started stays ignored, as `nohup` requires.
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    replaced = {n: old for n, old in before.items() if old not in (None, signal.SIG_IGN)}
    for number in replaced:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)


def raise_stopped(number: int) -> None:
    """Raise `Stopped`, and ignore later signals during the cleanup, except Ctrl-C."""
    # A terminal that closes sends SIGHUP twice, and systemd sends SIGHUP after SIGTERM.
    for other in STOP_SIGNALS:
        if other != signal.SIGINT:
            signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


def _leave_closed_terminal() -> None:
    """Discard output to a closed terminal, because writing to it raises an error."""
    for descriptor in (1, 2):
        # A terminal that was closed is still a character device, but no terminal any more.
        with contextlib.suppress(OSError):
            is_device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
            if is_device and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
