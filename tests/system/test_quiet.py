"""What other libraries print while our modules import them."""

import importlib
import logging
from typing import Any

import pytest

import qwlora


def test_torchao_is_silent_while_a_name_is_imported(monkeypatch, caplog) -> None:
    logger = logging.getLogger("torchao")
    caplog.set_level(logging.WARNING, "torchao")  # a command in this process may have changed it

    def imported(module: str) -> Any:
        logger.warning("Failed to load %s", module)
        logger.error("no such file")
        raise ImportError

    monkeypatch.setattr(importlib, "import_module", imported)
    with pytest.raises(ImportError):
        qwlora.__getattr__("simulate")
    logger.warning("later")  # the caller's own logging is as it was
    assert caplog.messages == ["no such file", "later"]
