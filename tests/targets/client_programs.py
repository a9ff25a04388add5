"""Tests that need a program which exported files are for, and which `make test` does not install.

They have the mark `client`, and a session of nox of the same name has all programs. There a test
that is skipped is a failure (conftest.py).
"""

from collections.abc import Iterable
from typing import Any

import pytest

from qwlora.targets.registry import TARGETS

INSTALLED = ("hf", "onnx")  # extras of this package that `dev` contains
TARGETS_OF_CLIENTS = {name for name, target in TARGETS.items() if target.extra not in INSTALLED}


def with_clients(cases: Iterable[Any]) -> list[Any]:
    """Cases for `parametrize`: names of targets, or tuples that begin with one."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = [pytest.mark.client] if values[0] in TARGETS_OF_CLIENTS else []
        found.append(pytest.param(*values, marks=marks))
    return found
