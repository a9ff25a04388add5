"""Run many batches through one model, block by block. All batches pause before a block, so that you
can observe and replace it before they continue.

    with BlockRunner(model, blocks, batches) as runner:
        for block in runner:                  # every batch has arrived at `block`
            for result in runner.repeat():    # run it as it is, for every batch
                ...
            ...replace it...

"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from qwlora.errors import CalibrationError
from qwlora.graph.call_arguments import arguments_of
from qwlora.nn.temporary import evaluation_mode, replaced
from qwlora.system.device import device_of, moved, onednn_float32_matmul

Batches = Sequence[Mapping[str, Any]]
"""Keyword arguments of the model, batch by batch."""


class _Stop(BaseException):
    """Raised in a paused batch to end it."""


class _Batch(threading.Thread):
    # The thread runs the model's own forward, so blocks may be chained in any way, and get masks,
    # position tables and other arguments from the model. A generator cannot pause inside a
    # forward. Only one thread runs at a time. The blocks run in the caller's thread: every
    # computing thread has its own OpenMP workers, and 64 of them were slow (docs/log/solvers.md).
    def __init__(self, forward: Callable[[], Any]):
        super().__init__(daemon=True)
        self.at: str | None = None
        self.repeat: Callable[[], Any] | None = None  # runs the block that the batch is at
        self._finish: Callable[[], Any] | None = None  # the same, for the rest of the forward
        self._result: Any = None
        self._forward, self._stopped = forward, False
        self._failure: BaseException | None = None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def resume(self) -> None:
        """Run the block, and continue to the next gate, or to the end."""
        if self._finish is not None:
            with torch.no_grad():
                self._result = self._finish()
        self.at = self.repeat = self._finish = None
        self._go.release()
        self._paused.acquire()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        self._stopped = True
        self._go.release()
        self.join()

    def wait_at(self, name: str, repeat: Callable[[], Any], finish: Callable[[], Any]) -> Any:
        """Called by the gate, in the batch's thread. Returns the result of the block."""
        self.at, self.repeat, self._finish = name, repeat, finish
        self._paused.release()
        self._go.acquire()
        if self._stopped:
            raise _Stop
        result, self._result = self._result, None
        return result

    def run(self) -> None:
        try:
            self._go.acquire()
            if not self._stopped:
                with torch.no_grad():
                    self._forward()
        except _Stop:
            pass
        except BaseException as error:
            # `resume` raises it again, in the thread of the caller.
            self._failure = error
        self._paused.release()


class BlockRunner(ExitStack, Iterable[str]):
    """A model with gates before the modules named in `blocks`; use as a context manager."""

    def __init__(self, model: nn.Module, blocks: Iterable[str], batches: Batches):
        super().__init__()
        self.model = model
        self.enter_context(evaluation_mode(model))  # no dropout
        self.enter_context(onednn_float32_matmul(device_of(model)))
        self._current: _Batch | None = None
        self._gates: dict[str, ExitStack] = {}  # of the blocks that were not visited yet
        for name in blocks:
            module = model.get_submodule(name)
            self._gates[name] = self.enter_context(ExitStack())
            self._gates[name].enter_context(replaced(module, self._gate(name, module)))
        options = {"use_cache": False} if "use_cache" in arguments_of(model) else {}
        device = device_of(model)
        self.batches = [
            _Batch(partial(model, **{**moved(dict(batch), device), **options})) for batch in batches
        ]
        for batch in self.batches:
            self.callback(batch.stop)

    def __iter__(self) -> Iterator[str]:
        """Let every batch run to the next block and yield its name, until no block is left."""
        while True:
            for batch in self.batches:
                self._current = batch
                batch.resume()
            arrivals = {batch.at for batch in self.batches}
            if len(arrivals) > 1:
                raise CalibrationError(
                    "calibration batches reach the model's blocks in different orders: they "
                    f"are at {', '.join(map(str, arrivals))} now. Use batches of one kind"
                )
            (block,) = arrivals
            if block is None:
                return
            self._gates.pop(block).close()
            yield block
            # The rest of the model, often the head, takes as long as several blocks.
            if not self._gates:
                return

    def repeat(self) -> Iterator[Any]:
        """Run the block that all batches have arrived at, one batch after the other, and stay
        before it. Yields the results, with gradients if the caller has enabled them."""
        self._current = None
        for batch in self.batches:
            assert batch.repeat is not None
            yield batch.repeat()

    def _gate(self, name: str, module: nn.Module) -> Callable[..., Any]:
        inner = module.forward

        def gate(*args: Any, **kwargs: Any) -> Any:
            def finish() -> Any:
                # A block that is itself a layer may have been replaced by its packed layer.
                now = self.model.get_submodule(name)
                return inner(*args, **kwargs) if now is module else now(*args, **kwargs)

            if name in self._gates and self._current is not None:
                return self._current.wait_at(name, partial(module, *args, **kwargs), finish)
            return finish()

        return gate
