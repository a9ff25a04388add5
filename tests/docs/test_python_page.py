"""The programs of docs/python.md, docs/results.md, docs/aimet-guide.md and an exported README run, and
compute what they should."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import qwlora
from conftest import byte_tokenizer, text, tiny_model
from docs.snippets import ROOT
from qwlora.formats.aimet_encodings import EncodingsFile, read_encodings, write_encodings
from qwlora.formats.aimet_encodings.grids import entry_of
from qwlora.nn.packed_layer import packed_layers
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe
from qwlora.targets.proof.readme import usage

pytestmark = pytest.mark.usefixtures("shared_captures")


def programs(page: str, section: str = "") -> list[str]:
    """The blocks of Python of a page, or of a section of it."""
    content = (ROOT / "docs" / page).read_text()
    if section:
        content = content.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", content, re.DOTALL)


def execute(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "page", "exec"), names)


def test_the_result_of_a_job_generates(tmp_path, recipe_for, monkeypatch, capsys) -> None:
    """And its file computes the same."""
    path = recipe_for("one-layer llama", adapters=[{"name": "support", "rank": 4, "steps": 6}])
    narrow = ("simulation.activation_bitwidth=8", "simulation.adapter_weights=w4-channel")
    recipe = load_recipe(path, narrow)
    run(recipe, tmp_path / "out", ("quantize", "train", "calibrate", "export"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in programs("python.md", "The result of a job"):
        execute(code, names)
    (code,) = programs("results.md")
    execute(code, {})
    layers = names["simulation"].values(names["inputs"])
    assert {path.stem for path in Path("layers/simulated").iterdir()} == layers.keys()
    for name, value in layers.items():
        assert np.array_equal(np.load(f"layers/simulated/{name}.npy"), value.numpy())
    readme = usage("onnx", "out/export/onnx/base", "out/export/onnx/support")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    execute(code, names)
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
    difference = (torch.from_numpy(names["logits"]) - expected).abs().max()
    assert float(difference) < 0.02 * float(expected.abs().max())


def test_an_own_training_loop_proves_its_file(tmp_path, checkpoints, monkeypatch, capsys) -> None:
    code, balanced = programs("python.md", "Your own training loop")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = tiny_model("llama", layers=1)
    first = torch.randint(0, 256, (1, 32)).repeat(2, 1)
    names: dict[str, Any] = {"model": model, "tokenizer": byte_tokenizer(), "batches": [first] * 8}
    before = model(input_ids=first, labels=first).loss.item()
    execute(code, names)
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
    execute(balanced, names)
    adapted, held_out = qwlora.logits_of(names["model"]), names["text"].held_out

    def divergence() -> float:
        reference = qwlora.logits_of(names["floats"])
        scores = qwlora.score_tokens(adapted, held_out, reference=reference)
        return float(scores.to_json()["kl"]["mean"])

    with names["model"].disable_adapter():
        base = divergence()
    assert 0 < divergence() < base


def rounded_checkpoint(checkpoint: Path, folder: Path) -> dict[str, str]:
    """A model whose weights lie on the grid of the page's first step, and AIMET's file of it."""
    quantized = AutoModelForCausalLM.from_pretrained(checkpoint)
    qwlora.quantize_(quantized, "w4-channel", solver="rtn")
    layers = packed_layers(quantized)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for path, layer in layers.items():
        model.get_submodule(path).weight.data = layer.weight.clone()
    model.save_pretrained(folder)
    entries = tuple(entry_of(f"{p}.weight", layer.encoding, "2.0.0") for p, layer in layers.items())
    write_encodings(EncodingsFile("2.0.0", entries), folder / "model.encodings")
    return {"folder": str(folder), "encodings": str(folder / "model.encodings")}


@pytest.fixture(scope="module")
def guide(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every name that the program of docs/aimet-guide.md defines."""
    folder = tmp_path_factory.mktemp("guide")
    names: dict[str, Any] = {
        "model_id": str(checkpoints["one-layer llama"]),
        "texts": [text(seed, 12) for seed in range(4)],
        "out": str(folder / "out"),
        **rounded_checkpoint(checkpoints["one-layer llama"], folder / "rounded"),
    }
    for code in programs("aimet-guide.md"):
        execute(code, names)
    return names


def test_training_moves_the_adapter_and_not_the_base(guide: Any) -> None:
    assert qwlora.fingerprint(guide["precomputed"]) == guide["frozen"]  # encodings of a file
    assert qwlora.fingerprint(guide["model"]) == guide["frozen"]
    assert len(guide["trained"]) == 4  # two factors of two layers
    factors = [p for n, p in guide["model"].named_parameters() if "lora_B" in n]
    assert all(bool(factor.any()) for factor in factors)


def test_grids_are_those_that_were_asked_for(guide: Any) -> None:
    encodings = guide["simulation"].encodings
    for name, encoding in guide["simulation"].base_encodings.items():
        assert encodings[name] is encoding  # calibration keeps them
    bits = {name: encoding.scheme.bitwidth for name, encoding in encodings.items()}
    layer = "model.layers.0.self_attn"
    assert bits[f"{layer}.q_proj.weight"] == 4
    assert bits[f"{layer}.q_proj.lora_A.weight"] == bits[f"{layer}.q_proj.lora_B.weight"] == 8
    assert bits[f"{layer}.q_proj.lora_A.linear"] == bits[f"{layer}.v_proj.lora_B.linear"] == 8
    assert bits[f"{layer}.q_proj.mul"] == bits[f"{layer}.v_proj.mul"] == 8
    assert bits[f"{layer}.q_proj.linear"] == bits[f"{layer}.softmax"] == 16
    scaled = encodings[f"{layer}.q_proj.mul"]
    low = float(scaled.offset * scaled.scale)
    high = float((scaled.offset + 2**8 - 1) * scaled.scale)
    assert (low, high) == pytest.approx((-1, 2), abs=0.01)


def test_what_is_delivered_computes_what_was_simulated(guide: Any) -> None:
    """Again after an export of other graphs into the same folder, which replaces all files."""
    simulation, example = guide["simulation"], guide["example"]
    out = Path(guide["out"], "aimet")
    assert guide["rows"]
    assert all(row.passed for row in guide["rows"])
    assert [*out.glob("*_cl1024.aimet/*")]
    qwlora.export(simulation, "aimet", out, sample=example, graphs=[8, 1], context=[16])
    assert {f.parent.name for f in out.rglob("*.onnx")} >= {"prompt_ar8_cl16.aimet"}
    assert not [f for f in out.rglob("*cl1024*/*") if f.is_file()]
    assert all(row.passed for row in qwlora.verify(out, simulation, example["input_ids"]))


def test_an_adapter_is_trained_through_the_bases_grids_and_keeps_them(guide: Any) -> None:
    known, graph = guide["known"], guide["graph"]
    assert qwlora.fingerprint(guide["base"]) == guide["frozen"]
    assert {encoding.scheme.bitwidth for encoding in known.values()} == {8}
    fixed = {name for name, q in graph.simulation.quantizers.items() if q.fixed}
    assert fixed == set(known)
    encodings = guide["through"].encodings
    assert all(encodings[name].equals(encoding) for name, encoding in known.items())
    added = guide["through"].activation_encodings.keys() - known
    layers = ("q_proj", "v_proj")
    assert {name.split(".")[4] for name in added} == set(layers)
    ids, base = guide["inputs"][0]["input_ids"], guide["base"]
    simulated = base.loss_function(guide["through"].logits(ids), ids, base.config.vocab_size)
    assert float(simulated) < guide["graph_losses"][0]
    saved = read_encodings(Path(guide["out"]) / "qwa" / "simulation.encodings")
    assert {entry.name for entry in saved.encodings} >= {*known, *added}
