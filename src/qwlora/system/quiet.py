"""Other libraries keep quiet while a command runs, and while our modules import them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from qwlora.system.machine import SlowComputeWarning

# torchao 0.18, which ExecuTorch installs and transformers imports, warns of its libraries for other
# processors, and makes torch 2.13 warn twice.
OF_IMPORTS = ("torchao", "torch.utils._pytree")
OF_EXPORT = (  # of sizes of 1, and of a missing torchvision
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
    for name in (*OF_EXPORT, "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet(names: Iterable[str]) -> Iterator[None]:
    """Silence these loggers."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
