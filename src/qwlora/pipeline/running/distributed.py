"""Several processes on one directory, under `torchrun` or `accelerate launch`.

The first process runs all stages, writes files and prints. The others wait for a stage that all
processes run together, which is training. The first process broadcasts the name of such a stage,
and None at the end.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from qwlora.errors import TrainingError
from qwlora.system.machine import process_count

_PATIENCE = timedelta(days=30)  # the others wait while a large model is quantized, for hours
_state: dict[str, Any] = {}


def is_first_process() -> bool:
    """Whether this is the process that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def announce(stage: str | None) -> None:
    """Called by the first process: tell the others to join `stage`, or to end if None.

    Does nothing after a common stage has failed.
    """
    if _state.get("failed"):
        atexit.register(_exit)
    elif process_count() > 1:
        _broadcast(stage)
        _state["failed"] = stage is not None  # until `wait_for_others`
        if stage is None:
            _leave()


def wait_for_others() -> None:
    """Called by the first process after a common stage: wait until the others finish it too.

    Until then they may read its work folder.
    """
    if _state.get("failed"):
        _wait_for_all()
    _state["failed"] = False


def announced_stages() -> Iterator[str]:
    """Called by all other processes: yield each stage to join, until the first is finished."""
    while (name := _broadcast(None)) is not None:
        atexit.register(_exit)
        yield name
        _wait_for_all()
        atexit.unregister(_exit)
    _leave()


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


def _wait_for_all() -> None:
    from torch import distributed

    try:
        distributed.barrier(_state["group"])
    except RuntimeError as error:
        raise TrainingError(
            "another process of this run ended during the stage; see its output for the reason"
        ) from error


def _broadcast(stage: str | None) -> str | None:
    import torch
    from accelerate import PartialState
    from torch import distributed

    if "group" not in _state:
        PartialState(cpu=not torch.accelerator.is_available())
        _state["group"] = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    message = [stage]
    distributed.broadcast_object_list(message, src=0, group=_state["group"])
    return message[0]
