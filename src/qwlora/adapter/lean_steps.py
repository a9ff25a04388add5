"""Training steps in less memory and time. Numbers change by no more than the order in which they are rounded.

    with lean_steps(model):
        for batch in batches:
            model(**batch).loss.backward()

This is how the train stage computes (`train.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from qwlora.adapter.activation_checkpointing import kept_apart
from qwlora.adapter.float32_matmul import float32_by_onednn
from qwlora.adapter.fused_forward import fused


@contextlib.contextmanager
def lean_steps(model: PeftModel, autocast: bool = False) -> Iterator[None]:
    """While it lasts, steps of `model` are computed so: LoRA and packed base as one sum (`fused.py`), checkpoints in memory of their own (`apart.py`), float32
    products by the faster library where it is exact (`float32.py`). The loss is a matter of its own (`chunk_loss_`).

    Args:
        model: on the device where it is trained.
        autocast: whether its forward runs under autocast, which casts what goes into products; PEFT would cast it first to float32.
    """
    device = next(model.parameters()).device
    with (
        kept_apart(model),
        disable_input_dtype_casting(model, autocast),
        fused(model),
        float32_by_onednn(device),
    ):
        yield
