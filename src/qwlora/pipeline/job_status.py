"""What a run of a job is doing: the keys `run` and `error` of results.json, and when to write it.

results.json and report.html are written when a stage begins or ends, when the run ends, and while
an adapter is trained: at most every 10 seconds, and so that writing takes less than 1% of the time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qwlora.errors import QwloraError, remedy_of
from qwlora.pipeline.stage import Stage
from qwlora.system.machine import machine, peak_rss_bytes, versions

LEAST_SECONDS = 10.0  # between two writes while training
COST = 100  # times the duration of a write, which then takes 1% of the time


class JobStatus:
    """The state of one run.

    Args:
        write: writes results.json and report.html with the given keys added.
        before: the status of the last run, which stays if no stage runs.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], dict[str, Any]],
        plan: Sequence[Stage],
        command: str,
        before: dict[str, Any],
    ):
        self._write, self._before = write, before
        self._run: dict[str, Any] = {"command": command, "plan": [stage.name for stage in plan]}
        self._extra: dict[str, Any] = {}  # other keys
        self._training: Callable[[], dict[str, Any]] | None = None
        self._began: float | None = None
        self._written, self._took = 0.0, 0.0

    def begin(self, stage: str) -> None:
        """A stage begins; the report shows it as running."""
        if self._began is None:
            self._began, self._run["started"] = time.monotonic(), _now()
        self._run["stage"], self._training = stage, None
        self.write("running")

    def train(self, progress: Callable[[], dict[str, Any]]) -> None:
        """A training step ended, or training diverged. `progress` gives the key `run.training`."""
        self._training = progress
        if time.monotonic() - self._written > max(LEAST_SECONDS, COST * self._took):
            self.write("running")

    def fail(self, error: Exception, stage: str) -> dict[str, Any]:
        """All stages ran, but a check failed; the results."""
        self._run["stage"], self._training = "", None
        self._extra = {"error": described_error(error, stage)}
        return self.write("failed")

    def end(self, stale: Collection[str]) -> dict[str, Any]:
        """The run ends without an error; the results."""
        self._run["stage"], self._training = "", None
        return self.write("incomplete" if stale else "finished")

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Record an error or an interruption of the running stage before it is raised."""
        try:
            yield
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, Exception):
                self._extra = {"error": described_error(error, self._run["stage"])}
            with contextlib.suppress(Exception):  # the first error is the one to report
                self.write("failed" if self._extra else "interrupted")
            raise

    def write(self, state: str) -> dict[str, Any]:
        began = time.monotonic()
        results = self._write(self._keys(state))
        self._written = time.monotonic()
        self._took = self._written - began
        return results

    def _keys(self, state: str) -> dict[str, Any]:
        if self._began is None:  # nothing ran: what the last run recorded, with the state as it is
            if state != "finished" and "run" in self._before:
                return self._before
            kept = {k: v for k, v in self._before.get("run", {}).items() if k != "training"}
            return {"run": {**kept, "state": state, "stage": ""}}
        run = {
            **self._run,
            "state": state,
            "updated": _now(),
            "elapsed_seconds": time.monotonic() - self._began,
            "peak_rss_bytes": peak_rss_bytes(),
            "versions": versions(),
            "machine": machine(),
        }
        if state != "running":
            run["finished"] = _now()
        if self._training is not None:
            run["training"] = self._training()
        return {**self._extra, "run": run}


def described_error(error: BaseException, stage: str) -> dict[str, Any]:
    """The key `error` of results.json, without paths of the working and home folders."""
    message = str(error) or type(error).__name__
    for folder, short in ((str(Path.cwd()), "."), (str(Path.home()), "~")):
        if len(folder) > 1:
            message = message.replace(folder, short)
    again = "Then run the same command. Finished stages are not repeated."
    described: dict[str, Any] = {"class": type(error).__name__, "message": message, "stage": stage}
    described["remedy"] = [remedy_of(error), again]
    if isinstance(error, QwloraError):
        known = next(c for c in type(error).__mro__ if c.__module__ == QwloraError.__module__)
        described["docs"] = f"docs/errors/{known.__name__}.md"
    return described


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
