"""The whole job of recipes/demo.yaml, from an empty directory.

python benchmarks/demo.py            writes benchmarks/results/demo.json: results.json of the run, and its wall time
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, machine_line, write_result


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "qwlora",
            "run",
            str(ROOT / "recipes" / "demo.yaml"),
            "--out",
            f"{folder}/demo",
        ]
        seconds = []
        for _ in range(2):  # the second run skips everything
            began = time.perf_counter()
            subprocess.run(command, check=True)
            seconds.append(round(time.perf_counter() - began, 1))
        results = json.loads(Path(folder, "demo", "results.json").read_text())
    results["train"]["topics"].pop("losses")
    record = {
        "machine": machine_line(),
        "seconds": seconds[0],
        "second_run_seconds": seconds[1],
        "results": results,
    }
    write_result("demo", record)


if __name__ == "__main__":
    main()
