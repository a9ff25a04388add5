"""The program on docs/aimet-guide.md does what AIMET's guide says, step by step."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import qwlora
from conftest import text
from qwlora.formats.aimet_encodings import EncodingsFile, read_encodings, write_encodings
from qwlora.formats.aimet_encodings.grids import entry_of
from qwlora.nn.packed_layer import packed_layers

PAGE = Path(__file__).parents[2] / "docs" / "aimet-guide.md"


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
def program(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every name that the page's program defines."""
    folder = tmp_path_factory.mktemp("guide")
    names: dict[str, Any] = {
        "model_id": str(checkpoints["one-layer llama"]),
        "texts": [text(seed, 12) for seed in range(4)],
        "out": str(folder / "out"),
        **rounded_checkpoint(checkpoints["one-layer llama"], folder / "rounded"),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 9
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_precomputed_encodings_give_the_same_integers(program: Any) -> None:
    assert qwlora.fingerprint(program["precomputed"]) == program["frozen"]


def test_training_moves_the_adapter_and_not_the_base(program: Any) -> None:
    assert qwlora.fingerprint(program["model"]) == program["frozen"]
    assert len(program["trained"]) == 4  # two factors of two layers
    factors = [p for n, p in program["model"].named_parameters() if "lora_B" in n]
    assert all(bool(factor.any()) for factor in factors)


def test_grids_are_those_that_were_asked_for(program: Any) -> None:
    encodings = program["simulation"].encodings
    for name, encoding in program["simulation"].base_encodings.items():
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


def test_what_is_delivered_computes_what_was_simulated(program: Any) -> None:
    """Again after an export of other graphs into the same folder, which replaces all files."""
    simulation, example = program["simulation"], program["example"]
    out = Path(program["out"], "aimet")
    assert program["rows"]
    assert all(row.passed for row in program["rows"])
    assert [*out.glob("*_cl1024.aimet/*")]
    qwlora.export(simulation, "aimet", out, sample=example, graphs=[8, 1], context=[16])
    assert {f.parent.name for f in out.rglob("*.onnx")} >= {"prompt_ar8_cl16.aimet"}
    assert not [f for f in out.rglob("*cl1024*/*") if f.is_file()]
    assert all(row.passed for row in qwlora.verify(out, simulation, example["input_ids"]))


def test_an_adapter_is_trained_through_the_bases_grids_and_keeps_them(program: Any) -> None:
    known, graph = program["known"], program["graph"]
    assert qwlora.fingerprint(program["base"]) == program["frozen"]
    assert {encoding.scheme.bitwidth for encoding in known.values()} == {8}
    fixed = {name for name, q in graph.simulation.quantizers.items() if q.fixed}
    assert fixed == set(known)
    encodings = program["through"].encodings
    assert all(encodings[name].equals(encoding) for name, encoding in known.items())
    added = program["through"].activation_encodings.keys() - known
    layers = ("q_proj", "v_proj")
    assert {name.split(".")[4] for name in added} == set(layers)
    ids, base = program["inputs"][0]["input_ids"], program["base"]
    simulated = base.loss_function(program["through"].logits(ids), ids, base.config.vocab_size)
    assert float(simulated) < program["graph_losses"][0]
    saved = read_encodings(Path(program["out"]) / "qwa" / "simulation.encodings")
    assert {entry.name for entry in saved.encodings} >= {*known, *added}
