"""Several processes and one directory, under `torchrun` or `accelerate launch`.

The first process runs the stages, writes, and speaks; the others wait, and take part where a stage is done together: training. What the first tells them is the
name of that stage, and in the end that there is nothing more.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from qwlora.errors import TrainingError

_PATIENCE = timedelta(days=30)  # quantizing a large model takes hours, and the others wait for it
_state: dict[str, Any] = {}


def process_count() -> int:
    """Processes of this run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def tell(stage: str | None) -> None:
    """From the first process to the others: take part in `stage`, or, with None, go home. Nothing is told after a common stage failed."""
    if _state.get("failed"):
        atexit.register(_exit)
    elif process_count() > 1:
        _broadcast(stage)
        _state["failed"] = stage is not None  # until `done`
        if stage is None:
            _leave()


def done() -> None:
    """A stage that was told came to its end; waits until it did in the others, which may still read what is in its work folder."""
    if _state.get("failed"):
        _wait_for_all()
    _state["failed"] = False


def told_stages() -> Iterator[str]:
    """What every process but the first does: yields the name of each stage to take part in, until the
    first process is finished.
    """
    while (name := _broadcast(None)) is not None:
        atexit.register(_exit)
        yield name
        _wait_for_all()
        atexit.unregister(_exit)
    _leave()


def _exit() -> None:
    """End without closing connections that the other processes still wait on: closing would wait for them, and they for us."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _leave() -> None:
    """Close the connections; a process that exits with open ones may be aborted."""
    from torch import distributed

    _state.clear()
    distributed.destroy_process_group()


def _wait_for_all() -> None:
    from torch import distributed

    try:
        distributed.barrier(_state["group"])
    except RuntimeError as error:
        raise TrainingError(
            "another process of this run has ended in the middle of the stage; what it printed says why"
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
