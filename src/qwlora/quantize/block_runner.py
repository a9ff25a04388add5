"""Run many batches through one model, block by block: all batches pause before a block, so that it
can be observed and replaced before they continue.

Each batch has a thread that runs the model's own forward, so nothing is assumed about how blocks
are chained: masks, position tables and other arguments arrive as the model passes them. A block's
forward is replaced by a gate. Only one thread runs at a time.

    with BlockRunner(model, blocks, batches) as runner:
        while block := runner.advance():      # every batch has arrived at `block`
            for result in runner.repeat():    # run it as it is, for every batch
                ...
            ...replace it...

Held in memory: the hidden state of each batch, once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from qwlora.errors import CalibrationError
from qwlora.nn.replaced import replaced


class _Stop(BaseException):
    """Raised in a paused batch to end it."""


class _Batch:
    """One batch and the thread that runs it."""

    def __init__(self, run: Callable[[], Any]):
        self.at: str | None = None
        self.failure: BaseException | None = None
        self.stopped = False
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._call: Callable[[], Any] | None = None
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Continue to the next gate, or to the end."""
        self.at = None
        self._go.release()
        self._paused.acquire()
        if self.failure is not None:
            raise self.failure

    def repeat(self) -> Any:
        """Run the block that the batch has arrived at, and stay before it."""
        assert self._call is not None
        return self._call()

    def stop(self) -> None:
        self.stopped = True
        self._go.release()
        self._thread.join()

    def wait_at(self, name: str, call: Callable[[], Any]) -> None:
        """Called by the gate, in the batch's thread."""
        self.at, self._call = name, call
        self._paused.release()
        self._go.acquire()
        self._call = None
        if self.stopped:
            raise _Stop

    def _run(self, run: Callable[[], Any]) -> None:
        self._go.acquire()
        try:
            if not self.stopped:
                with torch.no_grad():
                    run()
        except _Stop:
            pass
        except BaseException as error:  # raised again by `resume`
            self.failure = error
        self._paused.release()


class BlockRunner:
    """A model with gates before the modules named in `blocks`; use as a context manager.

    Raises:
        CalibrationError: the batches do not reach the blocks in one order.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Mapping[str, Any]]
    ):
        self.model = model
        self._waiting = set(blocks)
        self._current: _Batch | None = None
        self._gated: dict[str, AbstractContextManager[None]] = {}
        for name in blocks:
            self._gate(name, model.get_submodule(name))
        self.batches = [_Batch(partial(model, **batch)) for batch in batches]

    def __enter__(self) -> BlockRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for batch in self.batches:
            batch.stop()
        for name in list(self._gated):
            self._open(name)

    def advance(self) -> str | None:
        """Let every batch run to the next block that was not visited yet; returns its name, or None
        when all batches have left the model.
        """
        for batch in self.batches:
            self._current = batch
            batch.resume()
        places = {batch.at for batch in self.batches}
        if len(places) > 1:
            raise CalibrationError(
                "the calibration batches do not run through the model's blocks in the same order: "
                f"some have arrived at {', '.join(map(str, places))}"
            )
        (place,) = places
        if place is not None:
            self._waiting.discard(place)
            self._open(place)
        return place

    def repeat(self) -> Iterator[Any]:
        """Run the block that all batches have arrived at, one batch after the other, and stay
        before it. Yields the result for each batch, with gradients if the caller has enabled them.
        """
        self._current = None
        for batch in self.batches:
            yield batch.repeat()

    def _gate(self, name: str, module: nn.Module) -> None:
        inner = module.forward

        def gate(*args: Any, **kwargs: Any) -> Any:
            if name in self._waiting and self._current is not None:
                self._current.wait_at(name, partial(module, *args, **kwargs))
            now = self.model.get_submodule(name)
            return inner(*args, **kwargs) if now is module else now(*args, **kwargs)

        self._gated[name] = replaced(module, gate)
        self._gated[name].__enter__()

    def _open(self, name: str) -> None:
        """Remove the gate."""
        self._gated.pop(name).__exit__(None, None, None)
