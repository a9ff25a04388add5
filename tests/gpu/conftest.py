"""Every test here runs on the pretend device in the fast lane, and on a real one with mark `gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpu.pretend_device import pretend_device

DEVICES = ["pretend", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device that is not the CPU."""
    if request.param == "pretend":
        with pretend_device() as pretend:
            yield pretend
    elif torch.cuda.is_available():
        yield torch.device("cuda", torch.cuda.current_device())
    else:
        pytest.skip("there is no CUDA device")
