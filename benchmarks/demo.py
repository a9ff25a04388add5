"""The whole job of src/qwlora/recipe/examples/demo.yaml, from an empty directory.

python benchmarks/demo.py            writes benchmarks/results/demo.json: results.json of the run, and its wall time
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, machine_line, write_result


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe, out = str(ROOT / "src/qwlora/recipe/examples/demo.yaml"), f"{folder}/demo"
        seconds = []
        for _ in range(2):  # the second run skips everything
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "qwlora", "run", recipe, "--out", out], check=True
            )
            seconds.append(round(time.perf_counter() - began, 1))
        results = json.loads(Path(out, "results.json").read_text())
    results["train"]["topics"].pop("losses")
    first, second = seconds
    timed = {"machine": machine_line(), "seconds": first, "second_run_seconds": second}
    write_result("demo", {**timed, "results": results})


if __name__ == "__main__":
    main()
