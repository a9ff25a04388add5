"""Export and verification in one call, of targets of every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import BertConfig, BertForMaskedLM

import qwlora
from conftest import byte_tokenizer, packed_model, tiny_model
from qwlora.errors import CalibrationError, ExportError, SourceError

pytestmark = pytest.mark.usefixtures("shared_captures")
IDS = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def adapted(*names: str, seed: int = 1) -> Any:
    """A quantized base with adapters that differ."""
    model = packed_model("llama", layers=1)
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LORA, names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, LORA)
    return wrapped.eval()


def passed(rows: list[qwlora.Check]) -> bool:
    return bool(rows) and all(row.passed for row in rows)


@pytest.fixture(scope="module")
def simulation(shared_captures: None) -> qwlora.Simulation:
    made = qwlora.simulate(adapted("first"), BATCH)
    made.calibrate([BATCH])
    return made


def test_one_simulation(simulation: qwlora.Simulation, tmp_path: Path) -> None:
    qwlora.export(simulation, "onnx_each", tmp_path, tokenizer=byte_tokenizer())
    assert (tmp_path / "tokenizer.json").is_file()
    rows = qwlora.verify(tmp_path, simulation, [BATCH])
    assert passed(rows)
    assert any("layer" in row.what for row in rows)
    assert any("perplexity" in row.what for row in rows)
    with pytest.raises(SourceError, match=r"batches are not token ids.*of one length"):
        qwlora.verify(tmp_path, simulation, [BATCH, {"input_ids": IDS[:, 1:]}])
    other = qwlora.simulate(adapted("first", seed=2), BATCH)
    other.calibrate([BATCH])
    assert not passed(qwlora.verify(tmp_path, other, IDS))


def test_several_simulations_as_a_bundle(tmp_path: Path) -> None:
    made = qwlora.simulate_adapters(adapted("first", "second"), BATCH)
    made.calibrate([BATCH])
    qwlora.export(made, "onnx", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "first", "second"}
    rows = qwlora.verify(tmp_path, made, IDS)
    assert passed(rows)
    assert {row.what.partition(":")[0] for row in rows} == {"first", "second"}
    assert any("after other adapters were active" in row.what for row in rows)


def test_a_model_that_is_not_causal_decodes_nothing(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
    config = BertConfig(num_attention_heads=2, max_position_embeddings=32, vocab_size=256, **sizes)
    base = BertForMaskedLM(config).eval()
    qwlora.quantize_(base, "w4-block32", "rtn")
    lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    made = qwlora.simulate_adapters(get_peft_model(base, lora, "first").eval(), BATCH)
    made.calibrate([BATCH])
    qwlora.export(made, "onnx", tmp_path)
    assert passed(qwlora.verify(tmp_path, made, IDS))


def test_a_base_with_float_adapters(tmp_path: Path) -> None:
    model = packed_model("llama", layers=1)
    torch.manual_seed(1)
    with pytest.raises(ExportError, match=r"target hf takes the frozen base.*not Peft"):
        qwlora.export(get_peft_model(tiny_model("llama", layers=1), LORA), "hf", tmp_path)
    trained = get_peft_model(model, LORA, "first").eval()
    qwlora.save_adapter(trained, tmp_path / "trained", adapter="first")
    base = trained.unload()
    folder, adapters = tmp_path / "bundle", {"first": tmp_path / "trained"}
    three_bits = tiny_model("llama", layers=1)
    qwlora.quantize_(three_bits, "w3-block32", "rtn")
    with pytest.raises(ExportError, match=r"target gguf: .*GGUF has"):
        qwlora.export(three_bits, "gguf", folder)
    assert not folder.exists()
    qwlora.export(base, "hf", folder, adapters, byte_tokenizer())
    with pytest.raises(ExportError, match=r"bundle' already has a base\. Delete it"):
        qwlora.export(base, "hf", folder, adapters)
    loaded = qwlora.load_adapter(base, tmp_path / "trained")
    loaded.add_adapter("other", LORA)  # which the folder does not have
    with pytest.raises(SourceError, match="bundle' has no adapter default, other"):
        qwlora.verify(folder, loaded, IDS)
    (folder / "default").symlink_to("first")
    assert passed(qwlora.verify(folder, loaded, IDS))


def test_verify_leaves_the_callers_model_as_it_is(tmp_path: Path) -> None:
    """In training mode with dropout, with another adapter or none active; also if it raises."""
    model = adapted("first", "second")
    for name in ("first", "second"):
        qwlora.save_adapter(model, tmp_path / name, adapter=name)
    folder, folders = tmp_path / "bundle", {n: tmp_path / n for n in ("first", "second")}
    qwlora.export(packed_model("llama", layers=1), "hf", folder, folders, byte_tokenizer())
    for path, module in model.named_modules():
        module.training = path.endswith(("q_proj", "lora_dropout.first"))
        if "lora_dropout" in path and isinstance(module, torch.nn.ModuleDict):
            module["first"] = torch.nn.Dropout(0.5)
    model.set_adapter("second")
    model.base_model.disable_adapter_layers()

    def state() -> Any:
        layers = [m for m in model.modules() if hasattr(m, "disable_adapters")]
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        training = [path for path, module in model.named_modules() if module.training]
        switched = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
        return model.active_adapter, switched, trained, training

    before = state()
    assert passed(qwlora.verify(folder, model, IDS))
    assert state() == before
    with pytest.raises(SourceError, match=r"range from 509 to 754.*260 entries"):
        qwlora.verify(folder, model, IDS + 500)
    (folder / "first/adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(qwlora.QwloraError, match="first"):
        qwlora.verify(folder, model, IDS)
    assert state() == before


@pytest.mark.parametrize(
    ("target", "settings", "found"),
    [
        ("onnx", None, "q_proj.ia3_l.wrong:"),
        ("qnn", None, "q_proj.ia3_l.wrong:"),
        ("qnn", {"use_dora": True}, "lora_magnitude_vector.weight"),
        ("onnx", {"modules_to_save": ["input_layernorm"]}, "input_layernorm.modules_to_save"),
    ],
)
def test_adapters_with_more_than_factors_are_refused(
    target: str, settings: dict[str, Any] | None, found: str, tmp_path: Path
) -> None:
    """Files for several adapters have no place for more: they would compute something else."""
    config: Any = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    config.init_ia3_weights = False
    if settings is not None:
        config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
    model = get_peft_model(packed_model("llama", layers=1), config, "wrong").eval()
    made = qwlora.simulate_adapters(model, BATCH, qwlora.Schemes(policy="weights-only"))
    made.calibrate([BATCH])
    with pytest.raises(ExportError, match=rf"adapter wrong has .*{found}.*use target onnx_each"):
        qwlora.export(made, target, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_simulations_on_different_bases_are_refused(tmp_path: Path) -> None:
    made, twin = (qwlora.simulate_adapters(adapted("first", "second"), BATCH) for _ in range(2))
    made["second"] = twin["second"]
    made.calibrate([BATCH])
    twin["second"].origin.model.get_base_model().model.norm.weight.data.mul_(2)
    with pytest.raises(CalibrationError, match=r"the base of .* has changed"):
        qwlora.export(made, "onnx", tmp_path / "bundle")
    other = get_peft_model(packed_model("llama", seed=3, layers=1), LORA, "second").eval()
    made["second"] = qwlora.simulate_adapters(other, BATCH)["second"]
    with pytest.raises(CalibrationError, match="adapter second has another base"):
        qwlora.export(made, "onnx", tmp_path / "bundle")


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    folders = {"first": tmp_path, "First": tmp_path}
    with pytest.raises(ExportError, match=r"called 'First', 'first'.*another adapter"):
        qwlora.export(packed_model("llama", layers=1), "hf", tmp_path / "bundle", folders)


def test_what_does_not_fit_is_refused(simulation: qwlora.Simulation, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"there is no target 'onyx'.*onnx"):
        qwlora.export(simulation, "onyx", tmp_path)
    with pytest.raises(ExportError, match=r"\[8, 8\]: .*each once; context \[8\]: .*greater"):
        qwlora.export(simulation, "hf", tmp_path, graphs=[8, 8], context=[8])
    with pytest.raises(ExportError, match=r"target hf has no opset 17 \(it has: none\)"):
        qwlora.export(simulation, "hf", tmp_path, opset=17)
    with pytest.raises(ExportError, match="onnx takes what simulate_adapters returns, not Sim"):
        qwlora.export(simulation, "onnx", tmp_path)
    with pytest.raises(SourceError, match=r"no qwlora.json; write it with qwlora.export"):
        qwlora.verify(tmp_path, simulation, IDS)
