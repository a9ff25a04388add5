"""Checkpoints of a training run: the newest whole one, whether it is the end, and where it lies.

The Trainer writes `trainer_state.json` last, so a folder without a readable one was interrupted, and is not gone on from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError, safe_open

from qwlora.adapter.adapter_folder import WEIGHTS
from qwlora.errors import reading

STATE = "trainer_state.json"


def last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that is whole. Nothing is deleted: other processes look too, and all have to find the same."""
    return next(
        (c for c in sorted(work.glob("checkpoint-*"), key=step_of, reverse=True) if _is_whole(c)),
        None,
    )


def delete_newer(work: Path, last: Path | None) -> None:
    """Delete what is newer than `last`, which is half-written or damaged; to be called by one process, after all of them have found `last`."""
    for checkpoint in work.glob("checkpoint-*"):
        if last is None or step_of(checkpoint) > step_of(last):
            shutil.rmtree(checkpoint)


def final_checkpoint(last: Path, steps: int, patience: int | None, keeps_best: bool) -> Path | None:
    """The checkpoint with the final adapter, if training had ended at `last`: all steps done, or `patience` evaluations without a better one."""
    state = read_state(last)
    if state["global_step"] < steps and not (patience and waited(last) >= patience):
        return None
    chosen = (
        last.with_name(f"checkpoint-{state['best_global_step']}")
        if keeps_best and state.get("best_global_step")
        else last
    )
    return chosen if (chosen / WEIGHTS).exists() else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether it was written to its end: its state can be read, and its adapter, which of a sharded run may be in FSDP's files alone."""
    try:
        read_state(checkpoint)
        if (checkpoint / WEIGHTS).exists() or not any(checkpoint.glob(f"{FSDP_MODEL_NAME}*")):
            with safe_open(checkpoint / WEIGHTS, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def waited(checkpoint: Path) -> int:
    """How many evaluations in a row, up to `checkpoint`, were without a better one, as the early stopping there had counted."""
    stopping = read_state(checkpoint).get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    return (
        int(stopping["attributes"]["early_stopping_patience_counter"])
        if isinstance(stopping, dict)
        else 0
    )


def last_good(work: Path) -> str:
    """Where the newest whole checkpoint is, for a message."""
    whole = [c for c in work.glob("checkpoint-*") if (c / STATE).exists()]
    return (
        f"the last good checkpoint is {max(whole, key=step_of)}"
        if whole
        else "no checkpoint was written yet"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state at `checkpoint`."""
    with reading(checkpoint / STATE):
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])
