"""The code of docs/python.md, docs/results.md and an exported README runs, and computes what it
should."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qwlora
from conftest import byte_tokenizer, tiny_model
from docs.snippets import ROOT
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe
from qwlora.targets.proof.readme import usage

pytestmark = pytest.mark.usefixtures("shared_captures")
PAGE = (ROOT / "docs/python.md").read_text()


def examples(section: str) -> list[str]:
    (text,) = re.findall(rf"^## {section}\n(.*?)(?:^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_result_of_a_job_generates_and_its_file_computes_the_same(
    tmp_path: Path, recipe_for: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = recipe_for("one-layer llama", adapters=[{"name": "support", "rank": 4, "steps": 6}])
    narrow = ("simulation.activation_bitwidth=8", "simulation.adapter_weights=w4-channel")
    recipe = load_recipe(path, narrow)
    run(recipe, tmp_path / "out", ("quantize", "train", "calibrate", "export"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in examples("The result of a job"):
        exec(compile(code, "python.md", "exec"), names)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/results.md").read_text(), re.DOTALL)
    exec(compile(code, "results.md", "exec"), {})
    layers = names["simulation"].values(names["inputs"])
    assert {path.stem for path in Path("layers/simulated").iterdir()} == layers.keys()
    for name, value in layers.items():
        assert np.array_equal(np.load(f"layers/simulated/{name}.npy"), value.numpy())
    readme = usage("onnx", "out/export/onnx/base", "out/export/onnx/support")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(compile(code, "README.md", "exec"), names)
    start = names["tokenizer"].decode(names["inputs"]["input_ids"][0])
    printed = capsys.readouterr().out.splitlines()
    assert [line.startswith(start) and line != start for line in printed] == [True, True, False]
    with torch.no_grad():
        ids = names["inputs"]["input_ids"]
        adapted = qwlora.load_adapter(qwlora.load_base("out/base"), "out/adapters/support").eval()
        assert torch.equal(names["base"](ids).logits, qwlora.load_base("out/base")(ids).logits)
        assert torch.equal(names["adapted"](ids).logits, adapted(ids).logits)
    tokens = torch.from_numpy(names["ids"])
    (prompt,) = re.findall(r'tokenizer\("(.*?)"', code)
    assert tokens.shape[1] == len(names["tokenizer"](prompt).input_ids) + 20
    expected = names["simulation"].logits(tokens[:, :-1])[:, -1:]  # of the whole sequence
    assert float((torch.from_numpy(names["logits"]) - expected).abs().max()) < 0.02 * float(
        expected.abs().max()
    )


def test_python_example_runs_and_proves_its_file(
    tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, balanced = examples("Your own training loop")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = tiny_model("llama", layers=1)
    first = torch.randint(0, 256, (1, 32)).repeat(2, 1)
    names: dict[str, Any] = {"model": model, "tokenizer": byte_tokenizer(), "batches": [first] * 8}
    before = model(input_ids=first, labels=first).loss.item()
    exec(compile(code, "python.md", "exec"), names)
    with torch.no_grad():
        assert float(names["model"](input_ids=first, labels=first).loss) < before
    assert capsys.readouterr().out.splitlines() == [row.sentence for row in names["rows"]]
    assert all(row.passed for row in names["rows"])
    saved = qwlora.load_adapter(qwlora.load_base("base"), "adapter")
    trained = names["model"].get_base_model()
    assert torch.equal(trained(first[:, :4]).logits, saved(first[:, :4]).logits)
    assert (tmp_path / "files" / "session_options.json").exists()
    (tmp_path / "text.txt").write_text((ROOT / "README.md").read_text())
    names |= {"source": str(checkpoints["one-layer llama"]), "data": "text.txt"}
    exec(compile(balanced, "python.md", "exec"), names)
    adapted, held_out = qwlora.logits_of(names["model"]), names["text"].held_out

    def divergence() -> float:
        reference = qwlora.logits_of(names["floats"])
        scores = qwlora.score_tokens(adapted, held_out, reference=reference)
        return float(scores.to_json()["kl"]["mean"])

    with names["model"].disable_adapter():
        base = divergence()
    assert 0 < divergence() < base
