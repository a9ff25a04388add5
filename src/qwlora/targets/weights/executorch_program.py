"""ExecuTorch's own runtime for Python, in a separate process.

ExecuTorch trusts its programs: one damaged word can crash its process, which here is not the
caller's. This is no sandbox: code that takes over the process has the user's rights. Other targets
run in the caller's process: none of their files, damaged in the same ways, crashed it
(docs/log/reliability.md).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from qwlora.errors import ExportError, described, foreign_as
from qwlora.system.machine import peak_rss_bytes
from qwlora.targets.target import Runtime

MODEL, ADAPTER, NO_ADAPTER = "model.pte", "adapter.safetensors", "none.safetensors"
_SECONDS = 600.0  # limit of one call; loading a program of several GB takes the longest
# The caller's sys.path, but without the current folder, which may be a stranger's.
_START = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import serve; "
_START += "serve(*sys.argv[2:])"


class _Cache(dict[str, int]):
    """The number of a cache in ExecuTorch's process, which drops it after this is deleted."""


class ExecutorchRuntime(Runtime):
    """The program and the adapters in a folder."""

    switches = has_cache = True

    def __init__(self, folder: Path):
        self._file, self._adapter, self._dropped = folder.absolute() / MODEL, "", list[int]()
        self._pipe, theirs = Pipe()
        path = json.dumps([folder for folder in sys.path if folder])
        command = [sys.executable, "-P", "-c", _START, path, str(theirs.fileno()), str(self._file)]
        nowhere: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        # in a new session, so that Ctrl-C reaches only the caller
        with theirs:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], start_new_session=True, **nowhere
            )
        weakref.finalize(self, _end, self._process, self._pipe)
        self._answer()

    def switch_to(self, adapter: Path | None) -> None:
        self._adapter = "" if adapter is None else str(adapter.absolute())

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        dropped, self._dropped[:] = [*self._dropped], []
        request = {"adapter": self._adapter, "past": past.get("number", 0), "dropped": dropped}
        answer, tensors = self._answer(request, {"ids": ids.contiguous()})
        cache = _Cache(number=answer["cache"])
        weakref.finalize(cache, self._dropped.append, cache["number"]).atexit = False
        return tensors["logits"], cache

    def _answer(self, values: Any = None, tensors: Mapping[str, Tensor] | None = None) -> Any:
        """The answer of `_Program.extend`; without arguments, that the program is loaded."""
        try:
            if tensors is not None:
                _send(self._pipe, values, tensors)
            if not self._pipe.poll(_SECONDS):
                self._process.kill()
            answer, tensors = _receive(self._pipe)
        except (EOFError, OSError) as error:
            raise ExportError(
                f"{str(self._file)!r} ended ExecuTorch's process (exit code "
                f"{self._process.wait()}; -N: signal N). The file is damaged, so export it again; "
                "or memory ran out, or one call took more than 10 minutes"
            ) from error
        except BaseException:
            # Interrupted, by Ctrl-C: the next call would get the answer to this one.
            self._process.kill()
            raise
        if "error" in answer:
            raise ExportError(answer["error"])
        self.process_bytes = answer["peak_bytes"]
        return answer, tensors


def _end(process: subprocess.Popen[bytes], pipe: Any) -> None:
    process.kill()
    process.wait()
    pipe.close()


def _send(pipe: Any, values: Any, tensors: Mapping[str, Tensor]) -> None:
    # JSON and safetensors, no pickle: a stranger's program may have taken over the other process.
    pipe.send_bytes(json.dumps(values).encode())
    pipe.send_bytes(save(dict(tensors)))


def _receive(pipe: Any) -> tuple[Any, dict[str, Tensor]]:
    return json.loads(pipe.recv_bytes()), load(pipe.recv_bytes())


def serve(descriptor: str, file: str) -> None:
    """Answer the caller until it closes the pipe."""
    # A damaged program crashes this process as a matter of course: no dump of its memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe, loaded = Connection(int(descriptor)), None
    values, tensors = dict[str, Any](), dict[str, Any]()
    while True:
        answer, logits = dict[str, Any](), dict[str, Tensor]()
        try:
            if loaded is None:
                loaded = _Program(Path(file))
            else:
                logits["logits"], answer["cache"] = loaded.extend(**tensors, **values)
        except Exception as error:
            answer["error"] = described(error)
        try:
            _send(pipe, {**answer, "peak_bytes": peak_rss_bytes()}, logits)
            values, tensors = _receive(pipe)
        except (EOFError, OSError):
            return


class _Program:
    def __init__(self, file: Path):
        from executorch.runtime import Runtime as Library

        self._none = file.with_name(NO_ADAPTER)
        self._factors = {self._none: _factors(self._none)}
        with foreign_as(ExportError, f"ExecuTorch cannot load {str(file)!r}"):
            self._program = Library.get().load_program(file)
            self._forward = self._program.load_method("forward")
            about = self._forward.metadata
            count = about.num_inputs() - len(self._factors[self._none])
            sizes = [about.input_tensor_meta(number).sizes() for number in range(count)]
            self._tokens, self._past = sizes[0][1], sizes[3][2]
            empty = [torch.zeros(1, heads, 0, width) for _, heads, _, width in sizes[3:]]
        # Caches stay in this process: for a long text, they are larger than all that is sent.
        self._caches, self._last = {0: empty}, 0

    def extend(
        self, ids: Tensor, past: int, adapter: str, dropped: list[int]
    ) -> tuple[Tensor, int]:
        """Logits of new tokens, and the number of the cache that includes them. `past` is the
        number of a cache (0: none), `adapter` a folder (empty: none), `dropped` unused caches."""
        for number in dropped:
            del self._caches[number]
        file = Path(adapter, ADAPTER) if adapter else self._none
        factors = self._factors[file] = self._factors.get(file) or _factors(file)
        cache, parts = self._caches[past], list[Tensor]()
        for part in ids.split(self._tokens, dim=1):
            length, new = cache[0].shape[2], part.shape[1]
            if length > self._past:
                raise ExportError(f"the program holds {self._past} past tokens; use a shorter text")
            mask, positions = torch.ones(1, length + new), torch.arange(length, length + new)
            inputs = [part.contiguous(), mask.long(), positions[None], *cache, *factors]
            with foreign_as(ExportError, "ExecuTorch cannot run the program"):
                outputs = self._forward.execute(inputs)
            # clones, since the next call overwrites its outputs
            logits, *cache = (output.clone() for output in outputs)
            parts.append(logits)
        self._last += 1
        self._caches[self._last] = cache
        return torch.cat(parts, 1), self._last


def _factors(file: Path) -> list[Tensor]:
    tensors = load_file(file)
    return [tensors[name] for name in sorted(tensors)]
