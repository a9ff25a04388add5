"""A limit for work that somebody else's text decides: chat templates and regular expressions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qwlora.errors import QwloraError

SECONDS = 10.0


class _LateError(BaseException):
    """Not an Exception: Jinja drops those that it meets while it folds constants."""


@contextmanager
def time_limit(error: QwloraError, seconds: float = SECONDS) -> Iterator[None]:
    """Raise `error` when what is inside has used `seconds` of processor time.

    Processor time, since a busy machine or a suspended process is no fault of the text. Python's
    regular expressions look for signals while they match, so a timer's signal ends them too.
    Signals reach the main thread of a Unix process only: elsewhere there is no limit.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _LateError

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except _LateError:
        raise error from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
