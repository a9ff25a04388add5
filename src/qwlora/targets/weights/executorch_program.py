"""ExecuTorch's own runtime for Python, in a separate process.

ExecuTorch trusts its programs: one damaged word can crash its process, which here is not the
caller's. This is no sandbox: code that takes over the process has the user's rights. The processes
exchange JSON and safetensors, no pickle. Other targets run in the caller's process: none of their
files, damaged in the same ways, crashed it (docs/log/reliability.md).
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
        path = json.dumps([place for place in sys.path if place])
        command = [sys.executable, "-P", "-c", _START, path, str(theirs.fileno()), str(self._file)]
        nowhere: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with theirs:  # in a new session, so that Ctrl-C reaches only the caller
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], start_new_session=True, **nowhere
            )
        weakref.finalize(self, _end, self._process, self._pipe)
        self._answer()

    def switch_to(self, adapter: Path | None) -> None:
        self._adapter = "" if adapter is None else str(adapter.absolute())

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        return self.extend(ids, {})[0]

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        dropped, self._dropped[:] = [*self._dropped], []
        known = {"adapter": self._adapter, "past": past.get("number", 0), "dropped": dropped}
        answer, tensors = self._answer(known, {"ids": ids.contiguous()})
        cache = _Cache(number=answer["cache"])
        weakref.finalize(cache, self._dropped.append, cache["number"]).atexit = False
        return tensors["logits"], cache

    def _answer(self, values: Any = None, tensors: Mapping[str, Tensor] | None = None) -> Any:
        """The answer of `_Program.extend`; without arguments, that the program is loaded.

        Raises:
            ExportError: ExecuTorch refused the program, crashed, or took 10 minutes.
        """
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
        except BaseException:  # interrupted: the next call would get this answer
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
    pipe.send_bytes(json.dumps(values).encode())
    pipe.send_bytes(save(dict(tensors)))


def _receive(pipe: Any) -> tuple[Any, dict[str, Tensor]]:
    return json.loads(pipe.recv_bytes()), load(pipe.recv_bytes())


def serve(descriptor: str, file: str) -> None:
    """Answer the caller until it closes the pipe."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected: no dump of memory
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
    """The program of a base, with adapters and caches. Caches stay in this process: for a long
    text, they are larger than everything that is sent."""

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
        self._caches, self._made = {0: empty}, 0

    def extend(
        self, ids: Tensor, past: int, adapter: str, dropped: list[int]
    ) -> tuple[Tensor, int]:
        """Logits of new tokens, and the number of the cache that includes them.

        Args:
            past: number of a cache; 0: none.
            adapter: folder of the adapter; empty: the base alone.
            dropped: numbers of caches that are no longer needed.
        """
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
            logits, *cache = (output.clone() for output in outputs)  # the next call overwrites them
            parts.append(logits)
        self._made += 1
        self._caches[self._made] = cache
        return torch.cat(parts, 1), self._made


def _factors(file: Path) -> list[Tensor]:
    """The tensors of an adapter, as inputs."""
    tensors = load_file(file)
    return [tensors[name] for name in sorted(tensors)]
