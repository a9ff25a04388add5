"""One session for a base and adapters of other layers, ranks and scalings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import packed_model
from qwlora import Scheme, Schemes, export, simulate_adapters, verify
from qwlora.errors import CaptureError, ExportError
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.targets.onnx.onnx import Onnx, export_onnx, write_adapter, write_switchable
from qwlora.targets.onnx.onnx_runtime import OnnxModel
from qwlora.targets.proof.contents import ADAPTER_FILE
from qwlora.targets.proof.folder import is_of_base
from qwlora.targets.target import ExportedGraph

IDS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS[:2, :12], "attention_mask": torch.ones_like(IDS[:2, :12])}
Bundle = tuple[Path, AdapterSimulations]
WIDE = ["q_proj", "o_proj", "down_proj", "up_proj"]


def simulated(*shapes: dict[str, Any]) -> AdapterSimulations:
    """A one-layer Llama with random 4-bit adapters `wide` and `narrow`."""
    model: Any = packed_model("llama", layers=1)
    model.set_attn_implementation("eager")
    torch.manual_seed(1)
    for name, shape in zip(("wide", "narrow"), shapes, strict=False):
        config = LoraConfig(**shape, init_lora_weights=False)
        if name == "wide":
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    schemes = Schemes(Scheme(16), adapter_weights=Scheme(4))
    made = simulate_adapters(model.eval(), BATCH, schemes)
    made.calibrate([BATCH])
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Folders of a base and of adapters, and their simulations by name."""
    folder = tmp_path_factory.mktemp("bundle")
    wide = {"target_modules": WIDE, "r": 4, "lora_alpha": 8}
    narrow = {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 16}
    made = simulated(wide, {**narrow, "use_rslora": True})
    export(made, "onnx", folder)
    return folder, made


def test_one_session_computes_the_base_and_every_adapter(bundle: Bundle, tmp_path: Path) -> None:
    """With the bits of separate sessions and of whole models, and token by token with a cache."""
    folder, made = bundle
    rows = verify(folder, made, IDS)
    assert [row.sentence for row in rows if not row.passed] == []
    for what in ("after other adapters were active", "one by one with the cache"):
        named = {row.what.partition(":")[0] for row in rows if what in row.what}
        assert named >= {"wide", "narrow"}
    assert {part.name for part in folder.iterdir()} == {"base", "wide", "narrow"}
    assert (folder / "wide" / ADAPTER_FILE).is_file()
    together, alone = OnnxModel(folder / "base"), dict[str, torch.Tensor]()
    for name in ("wide", "narrow", "base", "wide", "base", "narrow"):
        place = None if name == "base" else folder / name
        together.use(place)
        if name not in alone:
            session = OnnxModel(folder / "base")
            session.use(place)
            alone[name] = session.logits(IDS)
        assert torch.equal(together.logits(IDS), alone[name])
    for other in ("base", "narrow"):
        assert (alone["wide"] - alone[other]).abs().max() > 0.1
    export_onnx(made["wide"].graph(), tmp_path)
    assert torch.equal(OnnxModel(tmp_path).logits(IDS), alone["wide"])


def test_a_model_without_a_cache_is_written_for_whole_sequences(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CaptureError("Recurrent returns no past_key_values")

    monkeypatch.setattr("qwlora.simulation.kv_cache_graph.capture_cached", refuse)
    folder, made = bundle
    reason = Onnx().write_base(ExportedGraph(made["base"], {}, {}), tmp_path)
    assert reason == "Recurrent returns no past_key_values"
    runtime, same = OnnxModel(tmp_path), OnnxModel(folder / "base")
    assert (runtime.has_cache, same.has_cache) == (False, True)
    assert [value.name for value in runtime.session.get_inputs()] == ["input_ids", "attention_mask"]
    (tmp_path / "wide").mkdir()
    write_adapter(made["wide"].graph(), tmp_path, tmp_path / "wide")
    for name in ("base", "wide"):
        runtime.use(None if name == "base" else tmp_path / name)
        same.use(None if name == "base" else folder / name)
        assert torch.equal(runtime.logits(IDS), same.logits(IDS))
        for ids in (IDS[:1], IDS[:1, :1]):
            assert runtime.decode(ids, 2) == same.decode(ids, 2)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_an_adapter_on_an_embedding_is_switched(tmp_path: Path) -> None:
    made = simulated({"target_modules": ["q_proj", "embed_tokens"], "r": 4})
    export(made, "onnx", tmp_path)
    assert [row.sentence for row in verify(tmp_path, made, IDS) if not row.passed] == []
    assert is_of_base(tmp_path, "wide")
    (tmp_path / "wide" / "model.encodings").unlink(missing_ok=True)  # which is not loaded
    assert is_of_base(tmp_path, "wide")
    (tmp_path / "wide" / ADAPTER_FILE).write_text("changed")
    assert not is_of_base(tmp_path, "wide")


def test_what_the_base_has_no_place_for_is_refused_by_name(bundle: Bundle, tmp_path: Path) -> None:
    folder, made = bundle
    other = simulated({"target_modules": ["q_proj", "gate_proj"], "r": 4})["wide"]
    with pytest.raises(ExportError, match=r"gate_proj.add, .*base does not.*target_modules"):
        write_adapter(other.graph(), folder / "base", tmp_path)
    assert not list(tmp_path.iterdir())
    write_switchable(made["base"].graph(), tmp_path, {}, base_activations=False)
    other = simulated({"target_modules": WIDE, "r": 4, "lora_alpha": 8})["wide"]
    with pytest.raises(ExportError, match=r"is not that of the base; export both again"):
        write_adapter(other.graph(), tmp_path, tmp_path)
