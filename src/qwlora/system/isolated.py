"""An object in a process of its own: for native libraries that trust the files that they load.

    program = Isolated("module:Class", file)                  makes Class(file) there
    values, tensors = program.call("run", tensors, rank=4)    calls its method `run`

A damaged file may then end that process, not the caller's. It is no sandbox: what takes over the
process has the rights of the user. Both ends send JSON and safetensors, no pickle.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.errors import ExportError, QwloraError, described, shortened
from qwlora.system.machine import peak_rss_bytes

if TYPE_CHECKING:
    from torch import Tensor

_SECONDS = 600.0  # of one call; loading a program of several GB takes the longest
# With the caller's modules, but without the current folder, which may be a stranger's.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from qwlora.system.isolated import serve; serve(*sys.argv[2:])"
)


class Isolated:
    """The object, seen from the caller's process.

    Args:
        kind: `module:class` of it.
        file: what it is made of.

    Attributes:
        peak_bytes: most memory that its process had so far.

    Raises:
        ExportError: the class refuses the file, or the process ended.
    """

    def __init__(self, kind: str, file: Path):
        self._file, self.peak_bytes = file, 0
        self._pipe, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 # open as long as the process
        path = json.dumps([place for place in sys.path if place])
        command = [sys.executable, "-P", "-c", _START, path, str(theirs.fileno()), kind, str(file)]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the caller, which ends it
            )
        weakref.finalize(self, _end, self._process, self._pipe, self._log)
        self._answer()

    def call(
        self, method: str, tensors: Mapping[str, Tensor], **values: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the method returns: values that are JSON, and tensors.

        Raises:
            ExportError: the method raised an error, or the process ended or took 10 minutes.
        """
        return self._answer((method, values), tensors)

    def _answer(
        self, question: Any = None, tensors: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            if question is not None:
                _send(self._pipe, question, tensors or {})
            if not self._pipe.poll(_SECONDS):
                self._process.kill()
            values, answer = _receive(self._pipe)
        except (EOFError, OSError) as error:
            raise ExportError(f"{str(self._file)!r}: {self._end_in_words()}") from error
        if "error" in values:
            raise ExportError(values["error"])
        self.peak_bytes = values.pop("peak_bytes")
        return values, answer

    def _end_in_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().rpartition("\n")[2]
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        return (
            f"the process that ran it ended with {how}. The file is damaged, or memory is short: "
            f"export it again. Its last line: {shortened(last, 300) or 'none'}"
        )


def _end(process: subprocess.Popen[bytes], *opened: Any) -> None:
    process.kill()
    process.wait()
    for file in opened:
        file.close()


def _send(pipe: Any, values: Any, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save

    pipe.send_bytes(json.dumps(values).encode())
    pipe.send_bytes(save(dict(tensors)))


def _receive(pipe: Any) -> tuple[Any, dict[str, Tensor]]:
    from safetensors.torch import load

    return json.loads(pipe.recv_bytes()), load(pipe.recv_bytes())


def serve(descriptor: str, kind: str, file: str) -> None:
    """Answer the caller until it closes the pipe. Runs in the process of the object."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected: no dump of memory
    pipe, (module, _, name) = Connection(int(descriptor)), kind.partition(":")
    made, question, tensors = None, ("", {}), dict[str, Any]()
    while True:
        values, answer = dict[str, Any](), dict[str, Any]()
        try:
            if made is None:
                made = getattr(import_module(module), name)(Path(file))
            else:
                values, answer = getattr(made, question[0])(tensors, **question[1])
        except Exception as error:
            values = {"error": str(error) if isinstance(error, QwloraError) else described(error)}
        _send(pipe, {**values, "peak_bytes": peak_rss_bytes()}, answer)
        try:
            question, tensors = _receive(pipe)
        except EOFError:
            return
