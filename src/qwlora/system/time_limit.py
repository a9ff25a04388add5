"""A time limit for text that users supply: chat templates and regular expressions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qwlora.errors import QwloraError

SECONDS = 10.0


class _LateError(BaseException):
    """Not an Exception, because Jinja ignores exceptions while it folds constants."""


@contextmanager
def time_limit(error: QwloraError, seconds: float = SECONDS) -> Iterator[None]:
    """Raise `error` when the block has used `seconds` of processor time.

    Processor time, because a busy machine or a suspended process is not the text's fault. Python's
    regular expressions check for signals while they match, so the timer ends them too. Only the
    main thread of a Unix process receives signals; elsewhere there is no limit.
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
