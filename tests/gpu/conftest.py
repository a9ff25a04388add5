"""Tests here run on the pretend device in the fast lane, and on a CUDA device with mark `gpu`."""

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from gpu.pretend_device import OWN_PROCESS, pretend_device

lacking = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICES = [pytest.param("cuda", marks=[pytest.mark.gpu, lacking])]
if OWN_PROCESS in os.environ:
    DEVICES.append(pytest.param("pretend"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device that is not the CPU."""
    cuda = nullcontext(torch.device("cuda", 0))
    with cuda if request.param == "cuda" else pretend_device() as chosen:
        yield chosen
