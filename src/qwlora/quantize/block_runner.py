"""Many batches through one model, all paused at the same place: how a model is quantized part by
part, each part on inputs that the parts before it made.

Each batch has a thread of its own that runs the model's own forward, so nothing is assumed about
how parts are chained: masks, position tables and other arguments that differ from part to part
arrive as the model passes them. A part's forward is replaced by a gate. Only one thread ever runs;
the others wait.

    with BlockRunner(model, parts, batches) as lockstep:
        while part := lockstep.advance():      # every batch stands before `part`
            for result in lockstep.repeat():   # run it as it is, for every batch
                ...
            ...change it...

What is held in memory is the hidden state of each batch, once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from qwlora.errors import CalibrationError


class _Stop(BaseException):
    """Ends a paused batch."""


class _Batch:
    """One batch on its way through the model."""

    def __init__(self, run: Callable[[], Any]):
        self.at: str | None = None
        self.failure: BaseException | None = None
        self.stopped = False
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._call: Callable[[], Any] | None = None
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Go on to the next gate, or to the end."""
        self.at = None
        self._go.release()
        self._paused.acquire()
        if self.failure is not None:
            raise self.failure

    def repeat(self) -> Any:
        """Run the part that the batch stands before, and stay there."""
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
        except BaseException as error:  # handed over to the thread that called `resume`
            self.failure = error
        self._paused.release()


class BlockRunner:
    """A model with gates before the modules named in `parts`; use as a context manager.

    Raises:
        CalibrationError: the batches do not meet the parts in one order.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[str], batches: Sequence[Mapping[str, Any]]
    ):
        self.model = model
        self._waiting = set(parts)
        self._current: _Batch | None = None
        self._gated: dict[str, tuple[nn.Module, Any]] = {}
        for name in parts:
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
        """Let every batch run to the next part that was not visited yet, and name it; None when all
        have left the model.
        """
        for batch in self.batches:
            self._current = batch
            batch.resume()
        places = {batch.at for batch in self.batches}
        if len(places) > 1:
            raise CalibrationError(
                "the calibration batches do not run through the model's parts in one order: some "
                f"stand at {', '.join(map(str, places))}"
            )
        (place,) = places
        if place is not None:
            self._waiting.discard(place)
            self._open(place)
        return place

    def repeat(self) -> Iterator[Any]:
        """Run the part that all batches stand before, for one of them after the other, and stay
        before it; gives what it makes of each, with gradients where the caller has them on.
        """
        self._current = None
        for batch in self.batches:
            yield batch.repeat()

    def _gate(self, name: str, module: nn.Module) -> None:
        own, inner = module.__dict__.get("forward"), module.forward

        def gate(*args: Any, **kwargs: Any) -> Any:
            if name in self._waiting and self._current is not None:
                self._current.wait_at(name, partial(module, *args, **kwargs))
            now = self.model.get_submodule(name)
            return inner(*args, **kwargs) if now is module else now(*args, **kwargs)

        module.forward = gate
        self._gated[name] = module, own

    def _open(self, name: str) -> None:
        """Take the gate away: batches inside go on as they would, later ones pass."""
        module, own = self._gated.pop(name)
        module.__dict__.pop("forward")
        if own is not None:  # somebody had replaced it
            module.forward = own
