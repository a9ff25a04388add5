"""Several processes that do the work of one job, under `torchrun` or `accelerate launch`.

The first process runs all stages, writes files and prints. The others wait for a stage that all run
together, and call the same functions on the same data. Within such a stage (`joint`), `is_mine` and
`divided` say which process does what, and `gathered` sends it to those that need it. Values travel
one by one, through the CPU (gloo), and are added in the order of one process, so that sums are its
sums bit for bit. In one process, nothing is copied or sent.

A process that fails prints its error; the others, which wait for its part, end without a message.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

from qwlora.errors import ProcessError, is_out_of_memory
from qwlora.system.machine import process_count

T = TypeVar("T")

_PATIENCE = timedelta(days=30)  # the others wait while a large model is exported, for hours
_state: dict[str, Any] = {}


def is_first_process() -> bool:
    """Whether this is the process that writes."""
    return _rank() == 0


@contextmanager
def joint_stage(stage: tuple[str, str], is_joint: bool) -> Iterator[None]:
    """In the first process: run a stage, by name and key, together with the others, or alone."""
    if not is_joint or process_count() == 1:
        yield
        return
    _broadcast(stage)
    _state["failed"] = True
    with joint():
        yield
    _collect("barrier")  # until the others have read what they need of its work folder
    _state["failed"] = False


def joined_stages() -> Iterator[tuple[str, str]]:
    """In the others: each stage to run together, until the first process ends."""
    while (stage := _broadcast(None)) is not None:
        atexit.register(_exit)
        with joint():
            yield stage
        _collect("barrier")
        atexit.unregister(_exit)
    _leave()


def end() -> None:
    """In the first process: let the others end, if they wait for a stage."""
    if _state.get("failed"):
        atexit.register(_exit)
    elif process_count() > 1:
        _broadcast(None)
        _leave()


@contextmanager
def joint(is_shared: bool = True) -> Iterator[None]:
    """Within, work is shared with the other processes, or not."""
    before, _state["joint"] = _state.get("joint", False), is_shared
    try:
        yield
    finally:
        _state["joint"] = before


def sharing_count() -> int:
    """How many processes share the work; 1 outside of joint stages."""
    return process_count() if _state.get("joint") else 1


def is_mine(number: int) -> bool:
    """Whether this process does item or task `number`: every n-th one of n processes."""
    return sharing_count() == 1 or number % sharing_count() == _rank()


def divided(costs: Mapping[str, float]) -> dict[str, int]:
    """The process for each task: the most expensive one first, to the process with least to do."""
    loads, processes = [0.0] * sharing_count(), dict[str, int]()
    for task in sorted(costs, key=lambda task: -costs[task]):
        processes[task] = loads.index(min(loads))
        loads[processes[task]] += costs[task]
    return processes


def gathered(value: T, receiver: int | None = None) -> list[T]:
    """The `value` of each process, with tensors on the CPU; for all processes, or for the
    `receiver`: then the others get an empty list."""
    if sharing_count() == 1:
        return [value]
    from qwlora.system.device import CPU, moved

    parts = [value] * (sharing_count() if receiver in (None, _rank()) else 0)
    if receiver is None:
        _collect("all_gather_object", parts, moved(value, CPU))
    else:
        _collect("gather_object", moved(value, CPU), parts or None, dst=receiver)
    return parts


def by_first(compute: Callable[[], T]) -> T:
    """What the first process computes while the others wait."""
    if sharing_count() == 1:
        return compute()
    with joint(False):
        value: Any = compute() if is_first_process() else None
    return cast(T, gathered(value)[0])


def is_first_failure(message: str) -> bool:
    """Whether no other process has failed before, so that this one prints its error."""
    own = f"process {_rank() + 1} of {process_count()} failed: {message}"
    return process_count() == 1 or _first_failure(own) == own


def _first_failure(own: str = "") -> str:
    """What the first process that failed has said; `own` if it is this one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined] # public, not in __all__

    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=10))
        return str(store.compare_set("qwlora/failure", "", own).decode())
    except (KeyError, RuntimeError):  # the launcher that holds the store has ended
        return own


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _exit() -> None:
    """Exit without closing connections: closing waits for the other processes, a deadlock."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _leave() -> None:
    """Close the connections; a process that exits with open connections may be aborted."""
    from torch import distributed

    _state.clear()
    distributed.destroy_process_group()


def _broadcast(stage: tuple[str, str] | None) -> tuple[str, str] | None:
    import torch
    from accelerate import PartialState
    from torch import distributed

    if "group" not in _state:
        PartialState(cpu=not torch.accelerator.is_available())
        _state["group"] = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    message = [stage]
    _collect("broadcast_object_list", message, src=0)
    return message[0]


def _collect(collective: str, *arguments: Any, **options: Any) -> None:
    """Call a function of torch.distributed that needs all processes."""
    from torch import distributed

    try:
        getattr(distributed, collective)(*arguments, group=_state["group"], **options)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = _first_failure() or "another process ended; see its output for the reason"
        raise ProcessError(reason) from error
