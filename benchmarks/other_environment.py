"""Run one of these scripts in another environment, with the modules of scripts and tests."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_script(python: str | Path, script: str, *arguments: str | Path) -> Any:
    """What the script prints last, which is JSON. It runs on one thread."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests", "benchmarks"))
    done = subprocess.run(
        # -P: tests/aimet is before benchmarks/aimet.py
        [str(python), "-P", str(ROOT / "benchmarks" / script), *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])
