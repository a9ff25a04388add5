"""Several processes that do the work of one job, under `torchrun` or `accelerate launch`.

The first process runs all stages, writes files and prints. The others run the joint stages with it.
There each process runs every n-th sequence, and all continue with the same sums and integers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qwlora.errors import ProcessError
from qwlora.system.machine import process_count

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# The other processes wait for hours while the first one exports a large model; gloo's default is 30
# minutes.
_PATIENCE = timedelta(days=30)
_state: dict[str, Any] = {}


def is_first_process() -> bool:
    """Whether this is the process that writes."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def connected() -> Iterator[None]:
    """Within, the processes of a run are connected."""
    if process_count() == 1:
        yield
        return
    import torch
    from accelerate import PartialState
    from torch import distributed

    PartialState(cpu=not torch.accelerator.is_available())
    _state["group"] = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    # After an error, the processes stay connected: closing a connection waits for the other one.
    yield
    # This ends `joined_stages` in the other processes.
    if is_first_process():
        _sent(None)
    # An exit with open connections may be aborted.
    distributed.destroy_process_group()


@contextmanager
def joint_stage(stage: tuple[str, str], is_joint: bool) -> Iterator[None]:
    """In the first process: run a stage (name, key), with the other processes if `is_joint`."""
    if not is_joint or process_count() == 1:
        yield
        return
    _sent(stage)
    _state["is_shared"] = True
    yield
    # The others may still read the stage's work folder.
    gathered(None)
    _state["is_shared"] = False


def joined_stages() -> Iterator[tuple[str, str]]:
    """Worker loop: yields each stage that the first process starts, until that process ends."""
    while (stage := _sent(None)) is not None:
        _state["is_shared"] = True
        yield stage
        gathered(None)


def share() -> tuple[int, int]:
    """(number of this process, how many share the work); (0, 1) outside of joint stages."""
    return (int(os.environ["RANK"]), process_count()) if _state.get("is_shared") else (0, 1)


def is_mine(number: int) -> bool:
    """Whether this process runs sequence `number`."""
    rank, count = share()
    return number % count == rank


def summed(value: Tensor) -> Tensor:
    """In a joint stage: the sum of the tensors of all processes. May overwrite `value`."""
    # The order of addition depends on the number of processes, so sums differ by rounding.
    # The group is gloo's, which works without GPUs and adds on the CPU.
    total = value.cpu()
    _collect("all_reduce", total)
    return total.to(value.device)


def gathered(value: T) -> list[T]:
    """The value of each process. Its tensors must be on the CPU."""
    count = share()[1]
    return [value] if count == 1 else [_sent(value, source) for source in range(count)]


def by_first(compute: Callable[[], T]) -> T:
    """The result of `compute`, which the first process runs while the others wait."""
    return gathered(compute() if is_mine(0) else cast(T, None))[0]


def is_first_failure() -> bool:
    """Whether no other process has failed before this one."""
    if process_count() == 1:
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined] # public, not in __all__

    # The others fail when they lose their connection to the first failure, which has the reason.
    # The launcher holds the store, so this works after the processes' own connections broke. If
    # the launcher has ended, too, the error is printed once too often rather than never.
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*address, timeout=timedelta(seconds=10))
        return bool(store.add("qwlora/failures", 1) == 1)
    except (KeyError, RuntimeError):
        return True


def _sent(value: Any, source: int = 0) -> Any:
    message = [value]
    _collect("broadcast_object_list", message, src=source)
    return message[0]


def _collect(collective: str, *arguments: Any, **options: Any) -> None:
    from torch import distributed

    try:
        getattr(distributed, collective)(*arguments, group=_state["group"], **options)
    except RuntimeError as error:
        raise ProcessError("another process ended; see its output for the reason") from error
