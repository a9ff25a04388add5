"""Limits of time and memory for programs in data: chat templates and regular expressions."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qwlora.errors import QwloraError

SECONDS = 10.0
MEMORY_BYTES = 2**30


# Not an Exception: Jinja ignores these while it folds constants.
class _LateError(BaseException):
    pass


@contextmanager
def time_limit(error: QwloraError, seconds: float = SECONDS) -> Iterator[None]:
    """Raise `error` when the block has used `seconds` of processor time."""
    # Only the main thread of a Unix process receives signals; elsewhere there is no limit.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _LateError

    # The timer counts processor time: a busy machine or a suspended process is not the text's
    # fault. Python's regular expressions check for signals while they match, so it ends them too.
    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except _LateError:
        raise error from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


@contextmanager
def memory_limit(error: QwloraError, count: int = MEMORY_BYTES) -> Iterator[None]:
    """Raise `error` when the block needs more than `count` bytes beyond what the process has.

    Limits the address space of the whole process meanwhile; Linux only.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + count
    limits = [most, *(limit for limit in (before, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    except MemoryError:
        raise error from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
