"""Other libraries keep quiet while a command runs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from qwlora.system.machine import SlowComputeWarning


def quiet_libraries() -> None:
    """Silence progress bars, notices and deprecation warnings of other libraries."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    # The preflight of a run reports slow computation by itself.
    for category in (FutureWarning, DeprecationWarning, SlowComputeWarning):
        warnings.filterwarnings("ignore", category=category)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    of_torch = ("torch.onnx", "torch.onnx._internal.exporter._registration", "torch.utils._pytree")
    for name in (*of_torch, "accelerate", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_export() -> Iterator[None]:
    """Silence what torch logs about sizes of 1, and about a missing torchvision."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
