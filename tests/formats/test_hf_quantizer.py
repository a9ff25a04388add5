"""transformers and PEFT load a base folder as the packed model, or stop with one clear error."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from conftest import byte_tokenizer, packed_model, text
from docs.snippets import ROOT, blocks
from formats.models import IDS, logits
from qwlora import fingerprint, load_adapter, load_base, save_adapter, save_base
from qwlora.errors import SourceError
from qwlora.formats.base_folder import QwloraConfig
from qwlora.nn.packed_layer import packed_layers


def same(model: Any, expected: Any) -> bool:
    """Whether both compute the same, on the same base."""
    is_same_base = fingerprint(model) == fingerprint(expected)
    return is_same_base and torch.equal(logits(model), logits(expected))


def adapted(model: PreTrainedModel) -> PeftModel:
    """With a random adapter that is not zero."""
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base to read only."""
    folder = tmp_path_factory.mktemp("base")
    save_base(packed_model(), folder, byte_tokenizer(), source="somewhere")
    return folder


def test_what_cannot_be_honored_is_refused(base: Path, checkpoints: dict[str, Path]) -> None:
    on_disk = {"model": "disk", "lm_head": "cpu"}
    for kind, settings, facts in (
        (AutoModelForCausalLM, {"device_map": on_disk}, "on disk.*max_"),
        (AutoModelForCausalLM, {"tp_plan": "auto"}, "tp_plan.*device_map"),
        (AutoModel, {}, "LlamaForCausalLM, not a LlamaModel"),
    ):
        with pytest.raises(SourceError, match=facts):
            kind.from_pretrained(base, **settings)
    with pytest.raises(SourceError, match=r"qwlora\.quantize_"):
        kind.from_pretrained(checkpoints["llama"], quantization_config=QwloraConfig())
    model = AutoModelForCausalLM.from_pretrained(base, rms_norm_eps=0.1)
    assert fingerprint(model) != fingerprint(load_base(base))  # another base


def in_a_new_process(code: str) -> str:
    """What the code prints; the test fails if it raises."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_loading_without_qwlora_says_what_to_install_and_import(base: Path, tmp_path: Path) -> None:
    save_adapter(adapted(load_base(base)), tmp_path)
    code = f"""
import sys
finders = list(sys.meta_path)
import qwlora
print(sys.meta_path == finders)
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, pipeline
for load in (
    lambda: AutoModelForCausalLM.from_pretrained({str(base)!r}),
    lambda: AutoModelForCausalLM.from_pretrained({str(base)!r}, ignore_mismatched_sizes=True),
    lambda: AutoPeftModelForCausalLM.from_pretrained({str(tmp_path)!r}),
    lambda: pipeline("text-generation", {str(base)!r}),
):
    try:
        load()
    except ValueError as error:
        print("pip install qwlora" in str(error) and "import qwlora.hf" in str(error))
    else:
        print("loaded")
import qwlora.hf
print(type(AutoModelForCausalLM.from_pretrained({str(base)!r}).model.layers[0].mlp.up_proj))
"""
    *refused, loaded = in_a_new_process(code).splitlines()
    assert refused == ["True"] * 5
    assert "PackedLinear" in loaded


@pytest.mark.slow
@pytest.mark.parametrize("call", ["load_base({base!r})", "register_with_transformers()"])
def test_transformers_loads_a_base_after(base: Path, call: str) -> None:
    code = f"""
import qwlora
qwlora.{call.format(base=str(base))}
from transformers import pipeline
print(type(pipeline("text-generation", {str(base)!r}).model.model.layers[0].mlp.up_proj))
"""
    assert "PackedLinear" in in_a_new_process(code)


@pytest.mark.parametrize("load", [None, load_base, AutoModelForCausalLM.from_pretrained])
def test_save_pretrained_writes_what_save_base_does(base: Path, tmp_path: Path, load: Any) -> None:
    model = load(base) if load else packed_model()
    model.save_pretrained(tmp_path)
    for name in ("base.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (base / name).read_bytes()
    records = [json.loads((folder / "base.json").read_text()) for folder in (tmp_path, base)]
    for key in ("fingerprint", "layers", "tensors", "class", "format"):
        assert records[0][key] == records[1][key]
    assert records[0]["source"] == ("somewhere" if load else "")
    byte_tokenizer().save_pretrained(tmp_path)
    assert same(load_base(tmp_path), load_base(base))
    model.generation_config = None  # as some callers do
    save_base(model, tmp_path / "saved")
    assert not (tmp_path / "saved" / "generation_config.json").exists()
    save_adapter(adapted(model), tmp_path / "adapter")  # names the base, not the float model
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "saved")


def test_a_copy_saves_itself(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    copied = copy.deepcopy(model)
    copied.model.norm.weight.data[0] += 1
    ignored = ("state_dict", "variant", "push_to_hub", "distributed_checkpoint")
    with pytest.raises(SourceError, match=", ".join(ignored)):
        copied.save_pretrained(tmp_path / "new", **dict.fromkeys(ignored, True))
    copied.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()
    copied.save_pretrained(tmp_path)
    assert fingerprint(load_base(tmp_path)) == fingerprint(copied) != fingerprint(model)


def test_floats_and_an_added_adapter_are_saved_as_ever(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = load_base(base)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    model = load_base(base)
    for name, layer in packed_layers(model).items():
        model.set_submodule(name, nn.Linear(*layer.tensor.shape[::-1], bias=False))
    model.save_pretrained(tmp_path / "floats", max_shard_size="10KB")
    assert len([*(tmp_path / "floats").glob("model-*.safetensors")]) > 1
    assert not [*tmp_path.glob("*/base.*")]


@pytest.mark.parametrize("load", [load_base, AutoModelForCausalLM.from_pretrained])
def test_an_adapter_folder_loads_with_its_packed_base(base, tmp_path, monkeypatch, load) -> None:
    monkeypatch.chdir(base.parent)
    save_adapter(adapted(load(Path(base.name))), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name  # as given: equal runs, equal bytes
    trained = adapted(load(base))
    save_adapter(trained, tmp_path)
    monkeypatch.chdir(tmp_path)
    for kind in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        loaded = kind.from_pretrained(tmp_path)
        assert packed_layers(loaded)
        assert same(loaded, trained)
        assert not torch.equal(logits(loaded), logits(load_base(base)))


TRAINING: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": []}
TRAINING |= {"learning_rate": 2e-2, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
ADAPTER = LoraConfig(r=2, target_modules="all-linear")


def check_training(trainer: Trainer, folder: Path) -> None:
    """The trainer changes the adapter and not the base, and the saved adapter is the trained one."""
    identity, before = fingerprint(trainer.model), logits(trainer.model)
    trainer.train()
    assert fingerprint(trainer.model) == identity
    assert not torch.equal(logits(trainer.model), before)
    save_adapter(trainer.model, folder)
    assert same(AutoPeftModelForCausalLM.from_pretrained(folder), trainer.model)


def test_trainer_trains_an_adapter_and_not_the_base(base: Path, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), dataloader_pin_memory=False, **TRAINING)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(AutoModelForCausalLM.from_pretrained(base), arguments)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), ADAPTER)
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    check_training(Trainer(model, arguments, train_dataset=rows), tmp_path / "adapter")


@pytest.mark.client
def test_dpo_of_trl_trains_an_adapter_with_the_base_as_reference(
    base: Path, tmp_path: Path
) -> None:
    """The pages below train with SFT."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pair = {"prompt": "the grid", "chosen": " holds", "rejected": " is gone"}
    settings = {"bf16": False, "max_length": 32, "logging_steps": 1, **TRAINING}
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=DPOConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_list([pair] * 8),
        processing_class=byte_tokenizer(),
        peft_config=ADAPTER,
    )
    check_training(trainer, tmp_path / "adapter")
    margins = [row["rewards/margins"] for row in trainer.state.log_history[:-1]]
    assert margins[0] == 0  # equal until the adapter has learned
    assert margins[-1] > 0


@pytest.mark.client
def test_the_page_trains_an_adapter_with_trl(base, tmp_path, monkeypatch) -> None:
    from datasets import Dataset

    page = ROOT / "docs/coming-from.md"
    (code,) = [b.text for b in blocks(page) if b.language == "python"]
    folder = shutil.copytree(base, tmp_path / code.partition('SFTTrainer("')[2].partition('"')[0])
    monkeypatch.chdir(tmp_path)
    rows = [{"text": text(seed, 12)} for seed in range(8)]
    names: dict[str, Any] = {"dataset": Dataset.from_list(rows)}
    exec(compile(code, str(page), "exec"), names)
    trained = names["trainer"].model
    assert fingerprint(trained) == fingerprint(load_base(folder))
    saved = get_peft_model_state_dict(load_adapter(load_base(folder), "adapter"))
    torch.testing.assert_close(saved, get_peft_model_state_dict(trained), rtol=0, atol=0)
    assert all(tensor.any() for tensor in saved.values())  # lora_B starts at zero


@pytest.mark.client
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # the harness does
def test_the_evaluation_harness_loads_a_base(base: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(base), device="cpu", batch_size=1, dtype="float32")
    assert same(harness.model, load_base(base))


def test_files_that_the_hub_cache_lacks_are_downloaded(base, tmp_path, monkeypatch) -> None:
    """transformers downloads config.json and the weights; checking needs base.json and more."""
    repository, revision = tmp_path / "models--owner--name", "a1b2" * 10
    snapshot = Path(shutil.copytree(base, repository / "snapshots" / revision))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    wanted = {"base.json", "tokenizer.json", "tokenizer_config.json"}
    for name in wanted:
        (snapshot / name).unlink()
    asked = []

    def download(repository: str, **settings: Any) -> None:
        asked.append((repository, settings["revision"], settings["cache_dir"]))
        for name in settings["allow_patterns"]:
            shutil.copy(base / name, snapshot)
            wanted.remove(name)

    monkeypatch.setattr("qwlora.formats.base_folder.snapshot_download", download)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained("owner/name", **where)
    assert set(asked) == {("owner/name", revision, tmp_path)}
    assert not wanted
    assert model.name_or_path == "owner/name"
    assert same(model, load_base(base))
