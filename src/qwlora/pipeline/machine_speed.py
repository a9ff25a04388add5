"""How fast this machine is: short measurements, kept in the user's cache folder.

    products      seconds of x [rows, in] @ W^T [in, out], in the precisions that stages use,
                  measured for the shapes of the model at hand
    memory        bytes per second of an elementwise operation, read and written
    unpacking     weights per second from 4 bits in blocks of 32 to float32
    operators     seconds of an operator that torch traces without data: what capture and export
                  are made of

Each is the fastest of several runs: what other programs take is not the speed of this machine.
`spread` is how much slower the median run was, for a typical measurement. The file is
`~/.cache/qwlora/speed.json` (or where the system keeps such files),
and may be deleted at any time. It is measured again when the processor, the number of threads or
torch's version differs.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwlora import strict_json
from qwlora.adapter.float32_matmul import onednn_float32_matmul
from qwlora.atomic import write_text
from qwlora.grid.observers import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import parse_scheme
from qwlora.nn.packed_tensor import PackedTensor
from qwlora.pipeline.job_status import machine

FORMAT = 1
FILE = "speed.json"
# Precision of products: as evaluation computes, as float32 training, as bfloat16 training.
EXACT, TRAINING, BFLOAT16 = "exact", "training", "bfloat16"
_RUNS, _LEAST_SECONDS = 7, 0.01
# Larger products take time in proportion; the memory of a measurement stays small.
_MOST_ROWS, _MOST_OUT = 2048, 8192


def cache_folder() -> Path:
    """The user's cache folder of qwlora; it need not exist."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "qwlora"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qwlora"
    if local := os.environ.get("LOCALAPPDATA"):
        return Path(local) / "qwlora"
    return Path.home() / ".cache" / "qwlora"


# Operators that torch traces without data take this many times as long in torch.export, with
# decompositions and the checks of `graph/capture.py`, and in torch.onnx.export.
CAPTURE, TRANSLATE = 60, 100
_OPERATORS_PER_MODULE = 2.5  # of a transformer with adapters


class MachineSpeed:
    """Measurements of this machine. What the file does not hold is measured when it is asked for.

    Args:
        file: default: in the user's cache folder; it is written by `save`.
    """

    def __init__(self, file: Path | None = None):
        self._file = file or cache_folder() / FILE
        self._known = self._read()
        self._is_changed = False

    def product(self, rows: int, inner: int, out: int, precision: str = EXACT) -> float:
        """Seconds of a product of `rows` inputs with a weight [out, inner]."""
        if min(rows, inner, out) <= 0:
            return 0.0
        r, o = min(_rounded(rows), _MOST_ROWS), min(out, _MOST_OUT)
        measured = self._get(
            f"{precision} {r}x{inner}x{o}", lambda: _product(r, inner, o, precision)
        )
        return measured * (rows / r) * (out / o)

    def moving(self, count_bytes: float) -> float:
        """Seconds of elementwise operators that read and write `count_bytes`."""
        return count_bytes * self._get("byte moved", _byte_moved)

    def unpacking(self, weights: float) -> float:
        """Seconds to dequantize `weights` packed weights."""
        return weights * self._get("weight unpacked", _weight_unpacked)

    def tracing(self, operators: float) -> float:
        """Seconds to trace `operators` operators without data."""
        return operators * self._get("operator traced", _operator_traced)

    @property
    def spread(self) -> float:
        """How much slower a median run was than the fastest, for a typical measurement."""
        return statistics.median([spread for _, spread in self._known.values()] or [0.0])

    def save(self) -> None:
        """Keep what was measured; does nothing if the folder cannot be written."""
        if not self._is_changed:
            return
        content = {"format": FORMAT, "machine": _identity(), "measured": self._known}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, strict_json.dumps(content, indent=1) + "\n")
        except OSError:
            return
        self._is_changed = False

    def _get(self, key: str, run: Callable[[], Callable[[], float]]) -> float:
        if key not in self._known:
            self._known[key] = _fastest(run())
            self._is_changed = True
        return self._known[key][0]

    def _read(self) -> dict[str, tuple[float, float]]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            if content["format"] == FORMAT and content["machine"] == _identity():
                return {str(k): (float(a), float(b)) for k, (a, b) in content["measured"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # missing, damaged or of another version: measure again
        return {}


def capture_seconds(speed: MachineSpeed, modules: int) -> float:
    """About how long it takes to capture a model with this number of modules."""
    return speed.tracing(CAPTURE * _OPERATORS_PER_MODULE * modules)


def export_seconds(speed: MachineSpeed, nodes: int) -> float:
    """About how long it takes to write a graph with this number of nodes as ONNX."""
    return speed.tracing(TRANSLATE * nodes)


def _identity() -> dict[str, Any]:
    found = {**machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {key: value for key, value in found.items() if key != "memory_bytes"}


def _rounded(rows: int) -> int:
    """The next power of two, so that few shapes are measured."""
    return 1 << max(0, rows - 1).bit_length()


def _fastest(run: Callable[[], float]) -> tuple[float, float]:
    run()  # the first one allocates
    times = [run() for _ in range(_RUNS)]
    return min(times), statistics.median(times) / min(times) - 1


def _timed(call: Callable[[], Any], units: float = 1.0) -> Callable[[], float]:
    """A function that gives the seconds of one call per unit."""

    def run() -> float:
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < _LEAST_SECONDS or not count:
            call()
            count += 1
        return elapsed / count / units

    return run


def _product(rows: int, inner: int, out: int, precision: str) -> Callable[[], float]:
    dtype = torch.bfloat16 if precision == BFLOAT16 else torch.float32
    x, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(out, inner, dtype=dtype)

    run = _timed(lambda: torch.nn.functional.linear(x, weight))
    if precision != TRAINING:
        return run

    def in_training() -> float:
        with onednn_float32_matmul():
            return run()

    return in_training


def _byte_moved() -> Callable[[], float]:
    x = torch.ones(2**22)
    return _timed(lambda: x * 1.5, 2 * x.nbytes)


def _weight_unpacked() -> Callable[[], float]:
    weight, scheme = torch.randn(1024, 1024), parse_scheme("w4-block32")
    encoding = measure(weight, scheme)
    packed = PackedTensor.from_quantized(QuantizedTensor(encoding.quantize(weight), encoding))
    return _timed(lambda: packed.dequantize(torch.float32), weight.numel())


def _operator_traced() -> Callable[[], float]:
    operators = 20
    with FakeTensorMode() as mode:
        x = torch.empty(8, 8)

    def call() -> None:
        with mode:
            y = x
            for _ in range(operators // 2):
                y = torch.sigmoid(y) + x

    return _timed(call, operators)
