"""Runs the other tests of this folder on the pretend device, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.pretend_device import OWN_PROCESS


@pytest.mark.skipif(OWN_PROCESS in os.environ, reason="this is the process")
def test_every_stage_on_the_pretend_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    here, environment = Path(__file__).parent, {**os.environ, OWN_PROCESS: "1"}
    command.append(str(here))
    ran = subprocess.run(command, env=environment, cwd=here.parents[1], stdout=-1, text=True)
    assert ran.returncode == 0, ran.stdout
