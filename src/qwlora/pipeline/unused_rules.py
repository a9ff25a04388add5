"""Placement rules of a job that do nothing are found before anything is trained.

A rule may be about values that only some of the job's graphs have: an adapter's weights, which the base alone lacks, or layers that one adapter is on and the
next is not. So it is refused where it does nothing in any. Graphs are captured with adapters that are not trained yet, and no more of them than it takes
until every rule has done something.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from torch import nn

from qwlora.adapter.attach import LoraShape, attach, attach_existing
from qwlora.graph.capture import capture
from qwlora.recipe import Adapter
from qwlora.simulation.placement import Placement, refuse_idle

if TYPE_CHECKING:
    from qwlora.pipeline.context import Session


def refuse_idle_rules(session: Session, placements: Sequence[Placement] = ()) -> None:
    """See the module's text.

    Args:
        placements: of graphs of the job that are known.

    Raises:
        CalibrationError: rules do nothing in any graph of the job; all are named.
    """
    if not session.recipe.simulation.rules or _each_does_something(placements):
        return
    known = list(placements)
    for model in _models(session):
        captured = capture(model, session.example_inputs)
        known.append(session.schemes.placement(captured.program, captured.input_names))
        if _each_does_something(known):
            return
    refuse_idle(known)


def shape_of(adapter: Adapter) -> LoraShape:
    """What the recipe says of an adapter's layers."""
    return LoraShape(**{f.name: getattr(adapter, f.name) for f in fields(LoraShape)})


def _models(session: Session) -> Iterator[nn.Module]:
    """What the job captures: the base with each adapter as it starts, and alone where that is calibrated. One that goes on from another has its layers."""
    recipe = session.recipe
    for adapter in recipe.adapters:
        if recipe.start_of(adapter) is None:
            start, base = adapter.start, session.base()
            made = (
                attach(base, shape_of(adapter), recipe.seed)
                if start is None
                else attach_existing(base, start, adapter.unknown_base, recipe.seed)
            )
            yield made.eval()
    if recipe.workflow == "qwa-lora" or recipe.simulation.base_activations != "all":
        yield session.base()


def _each_does_something(placements: Sequence[Placement]) -> bool:
    return bool(placements) and not set.intersection(
        *(set(placement.idle) for placement in placements)
    )
