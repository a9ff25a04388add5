"""Export and verification in one call, of targets of every layout; the registry of targets."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

import qwlora
from conftest import byte_tokenizer, packed_model, tiny_model
from qwlora.errors import CalibrationError, ExportError, MissingExtraError, SourceError
from qwlora.recipe.whole_recipe import Export
from qwlora.targets.proof.readme import usage
from qwlora.targets.registry import TARGETS

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


def test_a_model_that_the_runtime_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = type(TARGETS["mlx"].backend)
    monkeypatch.setattr(backend, "model_problem", lambda *_: "mlx-lm cannot build it")
    with pytest.raises(ExportError, match="target mlx: mlx-lm cannot build it"):
        qwlora.export(packed_model("llama", layers=1), "mlx", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


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
        qwlora.export(three_bits, "gguf", folder, tokenizer=byte_tokenizer())
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
        switched = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        training = [path for path, module in model.named_modules() if module.training]
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


OTHER_ADAPTERS: dict[str, Any] = {
    "q_proj.ia3_l.wrong:": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "lora_magnitude_vector.weight": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "input_layernorm.modules_to_save": LoraConfig(r=2, target_modules=["q_proj"]),
}
OTHER_ADAPTERS["q_proj.ia3_l.wrong:"].init_ia3_weights = False
OTHER_ADAPTERS["input_layernorm.modules_to_save"].modules_to_save = ["input_layernorm"]


@pytest.mark.parametrize("found", OTHER_ADAPTERS)
@pytest.mark.parametrize("target", ["onnx", "qnn"])
def test_adapters_of_more_than_factors_are_refused(target: str, found: str, tmp_path: Path) -> None:
    """Files for several adapters have no place for more: they would compute something else."""
    config = OTHER_ADAPTERS[found]
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


def test_what_does_not_fit_is_refused(simulation: qwlora.Simulation, tmp_path: Path) -> None:
    sizes: Any = {"graphs": [8, 8], "context": [8]}
    calls: list[tuple[str, Any, str]] = [
        ("onyx", {}, r"there is no target 'onyx'.*onnx"),
        ("hf", sizes, r"\[8, 8\]: .*once; context \[8\]: .*greater"),
        ("hf", {"opset": 17}, r"target hf has no opset 17"),
        ("mlx", {"embedding_bits": 16}, r"mlx has no embedding_bits 16 .*: 8, 32"),
        ("onnx", {}, "onnx takes what simulate_adapters returns, not Sim"),
        ("qnn", {"layout": "other"}, "layout"),
        ("aimet", {"layout": "genie"}, "layout"),
    ]
    for target, more, problem in calls:
        with pytest.raises(ExportError, match=problem):
            qwlora.export(simulation, target, tmp_path, **more)
    folders = {"first": tmp_path, "First": tmp_path}
    with pytest.raises(ExportError, match=r"called 'First', 'first'"):
        qwlora.export(packed_model("llama", layers=1), "hf", tmp_path / "bundle", folders)
    with pytest.raises(SourceError, match=r"no qwlora.json; write it with qwlora.export"):
        qwlora.verify(tmp_path, simulation, IDS)


def test_a_recipe_takes_every_registered_target_and_no_other() -> None:
    assert Export(targets=list(TARGETS)).targets == list(TARGETS)
    with pytest.raises(ValueError, match=r"(?s)targets.*onnx"):
        Export(targets=["gguf2"])


def test_a_missing_package_names_the_extra_of_the_target(tmp_path: Path) -> None:
    missing = replace(TARGETS["hf"], packages=("json", "not_there"))
    for act in (missing.require_packages, partial(missing.open, tmp_path, "first")):
        with pytest.raises(MissingExtraError, match=r"not_there.*qwlora\[hf\]"):
            act()
    with pytest.raises(MissingExtraError, match="not_there"):
        replace(TARGETS["mlx"], writers=("not_there",)).require_packages(to_write=True)
    TARGETS["mlx"].require_packages(to_write=True)  # nothing is needed to write


def test_where_the_files_of_each_layout_are(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "first"
    assert TARGETS["hf"].parts(tmp_path, "first") == {"base": base, "adapter": adapter}
    assert TARGETS["hf"].parts(tmp_path, "base") == {"base": base}
    assert TARGETS["onnx_each"].parts(tmp_path, "first") == {"files": adapter}
    assert TARGETS["qnn"].parts(tmp_path, "first") == {"files": tmp_path}


def test_registry_recipe_and_usage_load_neither_torch_nor_onnx() -> None:
    """So that a run in which nothing changed, which writes the cards, ends at once."""
    program = (
        "import sys, qwlora.recipe, qwlora.targets.registry, qwlora.targets.proof.readme as u;"
        "assert all(u.usage(name, 'b', 'a') for name in qwlora.targets.registry.TARGETS);"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers', 'mlx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"[]\n"


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("Qwen2VLForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
        ("OPTForCausalLM", "AutoModelForCausalLM"),
        ("os; import x", "AutoModelForCausalLM"),
    ],
)
def test_transformers_opens_a_base_with_its_class(kind: str, shown: str) -> None:
    lines = usage("hf", "the/base", None, kind=kind)
    assert f"from transformers import {shown}, AutoTokenizer" in lines
    assert f'{shown}.from_pretrained("the/base", dtype="float32")' in lines
