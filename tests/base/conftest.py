"""What tests of bases share."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

from qwlora.formats.base_folder import BaseWriter


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that a model still has when its base is finished, by name."""
    found: list[str] = []
    finish = BaseWriter.finish

    def watched(writer: BaseWriter, model: PreTrainedModel, *arguments: Any) -> str:
        found.extend(name for name, tensor in model.state_dict().items() if not tensor.is_meta)
        return finish(writer, model, *arguments)

    monkeypatch.setattr(BaseWriter, "finish", watched)
    return found
