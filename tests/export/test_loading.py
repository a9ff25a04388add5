"""What model cards say about loading the files of a target."""

from __future__ import annotations

import pytest

from qwlora.export.registry import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_says_how_its_files_are_loaded(target: str) -> None:
    known = TARGETS[target]
    with_adapter = known.backend.usage("the/base", "the/adapter")
    alone = known.backend.usage("the/base", None)
    if not known.has_cases:  # where everything is in one folder
        assert "the/adapter" in with_adapter
    assert with_adapter.count("```") % 2 == alone.count("```") % 2 == 0
    if known.has_base or known.has_cases:
        assert "the/base" in with_adapter
        assert "the/base" in alone
    assert "the/adapter" not in alone
