"""Other libraries keep quiet while a command runs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from qwlora.system.machine import SlowComputeWarning

_OF_TORCH = (
    *("torch.onnx", "torch.onnx._internal.exporter._registration"),
    *("torch.utils._pytree", "torch._export.non_strict_utils"),
)


def quiet_libraries() -> None:
    """Silence progress bars, notices and deprecation warnings of other libraries."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    # The preflight of a run reports slow computation by itself.
    for category in (FutureWarning, DeprecationWarning, SlowComputeWarning):
        warnings.filterwarnings("ignore", category=category)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in (*_OF_TORCH, "accelerate", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_export() -> Iterator[None]:
    """Silence what torch logs about sizes of 1 and about a missing torchvision."""
    loggers = [logging.getLogger(name) for name in _OF_TORCH]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
