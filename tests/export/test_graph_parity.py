"""What is measured of graphs with a key-value cache: figures, and tokens that count."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from qwlora import strict_json
from qwlora.data.sequences import IGNORED, Sequences
from qwlora.export import verify_qnn
from qwlora.export.graph_parity import compare_graphs
from qwlora.pipeline.results_table import print_summary
from qwlora.pipeline.stages import verify_stage

GENERATOR = torch.Generator().manual_seed(7)
IDS = torch.randint(0, 16, (2, 12), generator=GENERATOR)
LOGITS = torch.randn(1, 12, 16, generator=GENERATOR)


def replace_qnn(monkeypatch: pytest.MonkeyPatch, model: type) -> None:
    """Let `verify_qnn` run `model`, without files and emulator."""
    for name, fake in (
        ("QnnModel", model),
        ("check_bundle", lambda *arguments: None),
        ("require_emulator", lambda: None),
    ):
        monkeypatch.setattr(verify_qnn, name, fake)


def test_results_have_no_infinite_sqnr_and_the_table_needs_none() -> None:
    found = compare_graphs(LOGITS, LOGITS, LOGITS, IDS[:1]).to_json()
    strict_json.dumps(found)
    assert found["cpu"].keys() == {"perplexity", "top1_agreement"}
    assert "perturbed_sqnr" not in found
    console = Console(file=StringIO(), width=200)
    parity = {"aimet": {"first": {**found, "problems": []}}}
    print_summary({"recipe": "tiny", "parity": parity, "stages": {}}, console)
    assert "same likeliest token 100.00%" in console.file.getvalue()


def test_the_simulation_of_a_qnn_bundle_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, *arguments: Any, **options: Any):
            self.logits = lambda ids, steps: LOGITS + 0.01
            self.placement = dict

    ran: list[int] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        ran.append(1)
        return LOGITS

    replace_qnn(monkeypatch, Model)
    simulation: Any = SimpleNamespace(logits=logits, perturbed_logits=lambda ids: LOGITS)
    found = verify_qnn.verify_qnn(Path(), "first", simulation, IDS[:1])
    assert found.htp == found.cpu
    assert ran == [1]


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
    graphs = {"prefill": {"tokens": 4}, "decode": {"tokens": 1}}
    folder = tmp_path / "export" / "qairt"
    folder.mkdir(parents=True)
    (folder / "graphs.json").write_text(json.dumps({"context": 8, "graphs": graphs}))
    references: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(verify_stage, "_text_of", lambda *given: Sequences(IDS, labels))
    monkeypatch.setattr(verify_stage, "_prove", lambda *given: references.append(given[4]))

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return LOGITS[:, : ids.shape[1]]

    simulation: Any = SimpleNamespace(
        logits=logits, perturbed_logits=logits, origin=SimpleNamespace(model=None)
    )
    context: Any = SimpleNamespace(path=tmp_path)
    verify_stage._prove_simulated(context, "qairt", "first", simulation, tmp_path)
    (reference,) = references
    assert torch.equal(reference["ids"], IDS[rows, :8])
    assert int((reference["labels"][:, 1:] != IGNORED).sum()) == counted
