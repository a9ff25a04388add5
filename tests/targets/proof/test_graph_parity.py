"""What is measured of graphs with a key-value cache: figures, and tokens that count."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from qwlora.data.sequences import IGNORED, Sequences
from qwlora.errors import MissingExtraError
from qwlora.system import strict_json
from qwlora.targets.npu import qnn
from qwlora.targets.proof.checks import LIMITS, Parity, verdict
from qwlora.targets.proof.prove import fitting
from qwlora.targets.proof.reference import compare_first, make_reference
from qwlora.targets.registry import TARGETS
from targets.proofs import measure_logits

GENERATOR = torch.Generator().manual_seed(7)
IDS = torch.randint(0, 16, (2, 12), generator=GENERATOR)
LOGITS = torch.randn(1, 12, 16, generator=GENERATOR)
SAYS = {"adapter": lambda ids: LOGITS}
REFERENCE = make_reference(SAYS, Sequences(IDS[:1], IDS[:1]), SAYS)
PLACED = {"partitions": 2, "cpu_nodes": 3, "cpu_names": ["a", "b", "c"]}


def replace_qnn(monkeypatch: pytest.MonkeyPatch, model: type) -> Callable[[Any], Parity]:
    """The comparison of a qnn bundle with a reference, which runs `model` without files and
    emulator."""
    parity, files = qnn.QnnModel.parity, SimpleNamespace(folder=Path(), adapter=Path("first"))
    for name, fake in (("QnnModel", model), ("_devices", list)):
        monkeypatch.setattr(qnn, name, fake)
    return lambda reference: parity(files, partial(compare_first, reference), LIMITS)  # type: ignore[arg-type]


def parity_of(logits: torch.Tensor) -> Parity:
    return measure_logits(lambda ids: logits, REFERENCE)


def test_results_of_equal_logits_are_finite() -> None:
    found = verdict(parity_of(LOGITS).checks)
    strict_json.dumps(found)
    assert found["passed"]
    assert [check["value"] for check in found["checks"]] == [0.0, 1.0, pytest.approx(0, abs=1e-6)]


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_qnn_bundle_is_compared_on_the_cpu_and_on_the_htp(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        def __init__(self, *arguments: Any, htp: bool, **options: Any):
            self.logits = lambda ids, steps: LOGITS + 0.1 * htp * LOGITS.flip(1)

        def placement(self) -> dict[str, dict[str, Any]]:
            return {"prefill": {"partitions": 1, "cpu_nodes": 0}, "decode": PLACED}

    compare = replace_qnn(monkeypatch, Model)
    if not is_installed:
        absent = mock.Mock(side_effect=MissingExtraError("qwlora[qnn]"))
        monkeypatch.setattr(qnn, "_devices", absent)
    parity = compare(REFERENCE)
    problems = parity.problems
    if not is_installed:
        assert problems == []
        assert parity.figures["not_run"] == "qwlora[qnn]"
        return
    assert parity.figures["exact"]["adapter"] == parity.figures["htp"] != parity.figures["cpu"]
    assert any("on the HTP" in problem for problem in problems)
    assert "partitions of graph decode on the HTP: 2 (limit: at most 1)" in problems
    assert "nodes of graph decode on the CPU (of a, b, c): 3 (limit: at most 0)" in problems
    assert not any("prefill" in problem for problem in problems)


@pytest.mark.parametrize(
    ("prompt", "rows", "counted"),
    [((4, 10), [0], 4), ((9, 10), [0, 1], 14)],
    ids=["one answer fits", "no answer fits"],
)
def test_masked_tokens_do_not_count_where_the_context_cuts_a_sequence(
    prompt: tuple[int, int],
    rows: list[int],
    counted: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    labels = IDS.clone()
    for row, tokens in enumerate(prompt):
        labels[row, :tokens] = IGNORED
    graphs = {
        "prompt": {"tokens": 4, "context": 6},
        "token": {"tokens": 1, "context": 8},
    }
    folder = tmp_path / "export" / "qairt"
    folder.mkdir(parents=True)
    (folder / "graphs.json").write_text(json.dumps({"graphs": graphs}))
    text = fitting(Sequences(IDS, labels), TARGETS["qairt"].parts(folder, "first"))
    assert torch.equal(text.input_ids, IDS[rows, :8])
    assert int((text.labels[:, 1:] != IGNORED).sum()) == counted
