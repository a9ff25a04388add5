"""What model cards say about loading the files of a target."""

from __future__ import annotations

import pytest

from qwlora.export.registry import TARGETS
from qwlora.export.target import GraphTarget, UseCasesTarget


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_says_how_its_files_are_loaded(target: str) -> None:
    with_adapter = TARGETS[target].loading("the/base", "the/adapter")
    alone = TARGETS[target].loading("the/base", None)
    if not isinstance(TARGETS[target], UseCasesTarget):  # where everything is in one folder
        assert "the/adapter" in with_adapter
    assert with_adapter.count("```") % 2 == alone.count("```") % 2 == 0
    if not isinstance(TARGETS[target], GraphTarget):
        assert "the/base" in with_adapter
        assert "the/base" in alone
    assert "the/adapter" not in alone
