"""Checkpoints of a training run: the newest complete one, and whether training had ended there.

`seal` writes the digests of all files of a checkpoint after the Trainer has written them. A folder
without them was interrupted, and one whose files differ is damaged: neither is resumed from.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerState

from qwlora.adapter.adapter_files import WEIGHTS
from qwlora.errors import reading
from qwlora.formats import manifest
from qwlora.system.atomic import files_in

STATE = "trainer_state.json"
DIGESTS = "digests.json"


def seal(checkpoint: Path) -> None:
    """Write the digests of the files of a complete checkpoint."""
    manifest.write(checkpoint, DIGESTS, {}, files_in(checkpoint))


def last_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint, if that of its best evaluation is complete too, or None.
    Deletes nothing, because several processes call it and must find the same."""

    def is_complete(checkpoint: Path) -> bool:
        return manifest.has_digests(checkpoint, DIGESTS) and not manifest.changed_files(
            checkpoint, DIGESTS
        )

    newest_first = sorted(work.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((c for c in newest_first if is_complete(c) and is_complete(_best(c) or c)), None)


def delete_newer(work: Path, last: Path | None) -> None:
    """Delete the checkpoints newer than `last`, which are incomplete or damaged. One process calls
    it, after all of them have found `last`."""
    for checkpoint in work.glob("checkpoint-*"):
        if last is None or step_of(checkpoint) > step_of(last):
            shutil.rmtree(checkpoint)


def final_checkpoint(last: Path, steps: int, patience: int | None, keeps_best: bool) -> Path | None:
    """The checkpoint with the final adapter if training had ended at `last`, else None: after all
    steps, or after `patience` evaluations without improvement. With `keeps_best` the final adapter
    is that of the best evaluation, not of the last step.
    """
    stopped_early = patience and evaluations_without_improvement(last) >= patience
    if read_state(last).global_step < steps and not stopped_early:
        return None
    chosen = (_best(last) if keeps_best else None) or last
    return chosen if (chosen / WEIGHTS).exists() else None


def evaluations_without_improvement(checkpoint: Path) -> int:
    """Number of evaluations in a row without improvement, up to `checkpoint`."""
    callbacks: Any = read_state(checkpoint).stateful_callbacks  # a mapping, once it was stored
    stopping = callbacks.get("EarlyStoppingCallback")
    attributes = stopping["attributes"] if isinstance(stopping, dict) else {}
    return int(attributes.get("early_stopping_patience_counter", 0))


def last_good(work: Path) -> str:
    """Where the newest complete checkpoint is, in words for an error message."""
    complete = [c for c in work.glob("checkpoint-*") if (c / DIGESTS).exists()]
    return (
        f"the last good checkpoint is {max(complete, key=step_of)}"
        if complete
        else "no checkpoint has been written"
    )


def read_state(checkpoint: Path) -> TrainerState:
    """The Trainer's state at `checkpoint`."""
    with reading(checkpoint / STATE):
        return TrainerState.load_from_json(str(checkpoint / STATE))


def step_of(checkpoint: Path) -> int:
    """The training step after which `checkpoint` was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _best(checkpoint: Path) -> Path | None:
    """The checkpoint of the best evaluation so far, which training may end with."""
    step = read_state(checkpoint).best_global_step
    return checkpoint.with_name(f"checkpoint-{step}") if step else None
