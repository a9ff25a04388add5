"""What a run of a job is doing: the keys `run` and `error` of results.json, and when to write it.

results.json and report.html are written when a stage begins or ends, when the run ends, and while
an adapter is trained: at most every 10 seconds, and so that writing takes less than 1% of the time.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwlora.errors import (
    CalibrationError,
    CaptureError,
    DirectoryError,
    ExportError,
    FingerprintError,
    GridError,
    MissingExtraError,
    NonFiniteError,
    QwloraError,
    RecipeError,
    SourceError,
    TrainingError,
    VerificationError,
    is_out_of_memory,
)
from qwlora.pipeline.plan.stage import Stage
from qwlora.system.memory import peak_rss_bytes
from qwlora.system.processor import processor_name

PACKAGES = ("qwlora", "torch", "transformers", "peft", "onnx", "onnxruntime")
LEAST_SECONDS = 10.0  # between two writes while training
COST = 100  # times the duration of a write, which then takes 1% of the time
REMEDIES: tuple[tuple[type[BaseException], str], ...] = (
    (RecipeError, "Change the recipe as the message says."),
    (SourceError, "Correct the model or the data source that the message names."),
    (GridError, "Choose another grid or block size for the layers that the message names."),
    (FingerprintError, "Restore the file that the message names, or make it again."),
    (DirectoryError, "Make the folder usable as the message says: space, permissions, or --out."),
    (
        TrainingError,
        "Change the settings of the adapter as the message says. A lower learning_rate or more "
        "warmup_steps helps most often.",
    ),
    (
        CalibrationError,
        "Give the tensor that the message names other calibration data, or keep it float.",
    ),
    (CaptureError, "Change the part of the model or of the simulation that the message names."),
    (ExportError, "Change what the target cannot hold, or choose another target."),
    (VerificationError, "Do not use the exported files until the check has passed."),
    (NonFiniteError, "Find the layer or the data that gives NaN or infinity."),
    (MissingExtraError, "Install the package that the message names."),
)


class JobStatus:
    """The state of one run.

    Args:
        write: writes results.json and report.html with the given keys added.
        plan: all stages of the job.
        command: that runs the job.
        before: the status of the last run, which stays if no stage runs.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], dict[str, Any]],
        plan: Sequence[Stage],
        command: str,
        before: dict[str, Any],
    ):
        self._write, self._plan, self._command = write, plan, command
        self._before = before
        self._began: float | None = None
        self._started = ""
        self._stage = ""
        self._training: Callable[[], dict[str, Any]] | None = None
        self._extra: dict[str, Any] = {}
        self._error: dict[str, Any] | None = None
        self._written, self._took = 0.0, 0.0

    def begin(self, stage: str) -> None:
        """A stage begins; the report shows it as running."""
        if self._began is None:
            self._began, self._started = time.monotonic(), _now()
        self._stage, self._training = stage, None
        self.write("running")

    def train(self, progress: Callable[[], dict[str, Any]]) -> None:
        """A training step ended, or training diverged.

        Args:
            progress: the key `run.training`; called only when it is written.
        """
        self._training = progress
        if time.monotonic() - self._written > max(LEAST_SECONDS, COST * self._took):
            self.write("running")

    def end(self, stale: Collection[str]) -> dict[str, Any]:
        """The run ends without an error; the results.

        Args:
            stale: stages that are not current.
        """
        self._stage, self._training = "", None
        return self.write("incomplete" if stale else "finished")

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Record an error or an interruption of the running stage before it is raised."""
        try:
            yield
        except KeyboardInterrupt:
            self._write_last("interrupted")
            raise
        except VerificationError as error:  # what was measured is a part of the results
            self._error, self._extra = described_error(error, self._stage), error.results or {}
            error.results = self._write_last("failed") or error.results
            raise
        except Exception as error:
            self._error = described_error(error, self._stage)
            self._write_last("failed")
            raise

    def write(self, state: str) -> dict[str, Any]:
        """Write results.json and report.html."""
        began = time.monotonic()
        results = self._write(self._keys(state))
        self._written = time.monotonic()
        self._took = self._written - began
        return results

    def _write_last(self, state: str) -> dict[str, Any] | None:
        try:
            return self.write(state)
        except Exception:  # the first error is the one to report
            return None

    def _keys(self, state: str) -> dict[str, Any]:
        if self._began is None:  # nothing ran
            return self._kept(state)
        is_over = state != "running"
        run = {
            "state": state,
            "command": self._command,
            "started": self._started,
            "updated": _now(),
            **({"finished": _now()} if is_over else {}),
            "elapsed_seconds": time.monotonic() - self._began,
            "peak_rss_bytes": peak_rss_bytes(),
            "stage": self._stage,
            "plan": [stage.name for stage in self._plan],
            "versions": versions(),
            "machine": machine(),
            **({"training": self._training()} if self._training is not None else {}),
        }
        found: dict[str, Any] = {**self._extra, "run": run}
        return found | ({"error": self._error} if self._error else {})

    def _kept(self, state: str) -> dict[str, Any]:
        """What an earlier run recorded, with the state as it is now."""
        run = self._before.get("run")
        if state == "finished" or not isinstance(run, dict):
            kept = run if isinstance(run, dict) else {}
            kept = {key: value for key, value in kept.items() if key != "training"}
            return {"run": {**kept, "state": state, "stage": ""}}
        return self._before


def described_error(error: BaseException, stage: str) -> dict[str, Any]:
    """The key `error` of results.json."""
    remedy = next((words for kind, words in REMEDIES if isinstance(error, kind)), None)
    if is_out_of_memory(error):
        remedy = (
            "Free memory, or use less: a smaller model, smaller data.sequence_tokens or "
            "adapters.batch_sequences, or gradient_checkpointing: true."
        )
    elif remedy is None:
        remedy = (
            "Free space, or correct the permissions, if the message says so. Otherwise run the "
            "command again with --debug and report the traceback."
            if isinstance(error, OSError | QwloraError)
            else "This may be a bug: run the command again with --debug and report the traceback."
        )
    again = "Then run the same command. Finished stages are not repeated."
    name = type(error).__name__
    found = {
        "class": name,
        "message": without_folder(str(error) or name),
        "stage": stage,
        "remedy": [remedy, again],
    }
    if isinstance(error, QwloraError):
        known = next(c for c in type(error).__mro__ if c.__module__ == QwloraError.__module__)
        found["docs"] = f"docs/errors/{known.__name__}.md"
    return found


def without_folder(text: str) -> str:
    """`text` without the paths of the working and home folders: reports are passed on."""
    for folder, short in ((str(Path.cwd()), "."), (str(Path.home()), "~")):
        if len(folder) > 1:
            text = text.replace(folder, short)
    return text


def versions() -> dict[str, str]:
    """Releases of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The machine, without its name."""
    found: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
    }
    if name := processor_name():
        found["processor"] = name
    with contextlib.suppress(OSError, ValueError):  # not Linux
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
