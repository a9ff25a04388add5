"""docs/support.md says what the code does."""

import pytest

from targets.client_programs import TARGETS_OF_CLIENTS
from targets.support_matrix import ARCHITECTURES, WEIGHTS, cell, outcome, scheme_table, written

# what is quickest to show to be out of date, in every run; the rest takes minutes
FAST = {("Llama", "hf"), ("GPT-2", "hf"), ("Mixtral", "hf")}


def marks(architecture: str, name: str) -> list[pytest.MarkDecorator]:
    slow = [] if (architecture, name) in FAST else [pytest.mark.slow]
    return [*slow, *([pytest.mark.client] if name in TARGETS_OF_CLIENTS else [])]


CASES = [
    pytest.param(architecture, name, marks=marks(architecture, name))
    for architecture in ARCHITECTURES
    for name in WEIGHTS
]


def test_the_table_of_schemes_is_up_to_date() -> None:
    assert scheme_table() in written("Schemes")


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_the_table_of_architectures_is_what_runs(architecture: str, name: str) -> None:
    assert outcome(architecture, name) == cell(architecture, name)
