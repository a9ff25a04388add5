"""`reference: float`: every adapter is trained on the float model too, and compared with that."""

import math
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import Job, byte_tokenizer, tiny_model
from pipeline.conftest import stage_keys
from qwlora.adapter.train import Interrupted
from qwlora.grid.encoding import measure
from qwlora.grid.scheme import PerChannel, Scheme
from qwlora.pipeline.commands.manage_adapters import rename_adapter
from qwlora.pipeline.sources import Sources
from qwlora.pipeline.stages.job_context import JobContext
from qwlora.recipe import load_recipe
from qwlora.system.progress import untracked

VERBS = ("quantize", "train", "evaluate")
EXACT = {"compute": "float32"}  # auto is bfloat16 on some processors, which rounds more
SHORT = {"steps": 2, "warmup_steps": 0, **EXACT}


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def lossless(recipe_for: Any, tmp_path: Path) -> Job:
    """A job whose model lies on the grid of its base, so that packing changes nothing."""
    model, scheme = tiny_model("llama", layers=1), Scheme(8, granularity=PerChannel(0))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            module.weight.data = measure(module.weight.data, scheme).fake_quantize(module.weight)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    peft = {"continue_from": str(tmp_path / "peft"), "unknown_base": "accept"}
    adapters = [
        {"name": "first", "rank": 4, "dropout": 0.1, "steps": 4, "warmup_steps": 1, **EXACT},
        {"name": "second", "continue_from": "first", **SHORT},
        {"name": "foreign", **peft, "steps": 0},
    ]
    model_section = {"source": str(tmp_path / "model")}
    base = {"solver": "rtn", "weights": "w8-channel"}
    recipe = recipe_for(reference="float", model=model_section, base=base, adapters=adapters)
    return Job(recipe, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(a second time|is unverified)")
def test_where_packing_loses_nothing_the_adapter_is_the_one_of_the_float_model(
    lossless: Job, tmp_path: Path
) -> None:
    job, out = lossless, lossless.out
    references = out / ".qwlora" / "reference"

    def stopping(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if description == "training" and number == 2 and "first/float" in job.said[-1]:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    with pytest.raises(Interrupted):
        job.run(*VERBS, track=stopping)
    results = job.run(*VERBS)
    reference, perplexity = results["reference"], results["perplexity"]
    assert "train/first: skipped" in " ".join(job.said)
    assert reference["train"]["first"]["resumed_from_step"] == 2
    assert reference["train"]["first"]["losses"] == pytest.approx(
        results["train"]["first"]["losses"], rel=1e-5
    )
    for name in ("first", "second"):
        trained, expected = factors(out / "adapters" / name), factors(references / name)
        assert trained.keys() == expected.keys()
        for key, values in expected.items():
            torch.testing.assert_close(trained[key], values, rtol=1e-3, atol=1e-5)
        assert abs(reference["kl"]["adapted"][name]["mean"]) < 1e-6
        assert reference["top1"]["adapted"][name]["share"] == 1
        assert reference["perplexity_ratio"]["adapted"][name]["value"] == pytest.approx(1, 1e-5)
        assert perplexity["reference"][name] == pytest.approx(perplexity["adapted"][name], 1e-5)
        assert perplexity["reference"][name] < 0.99 * perplexity["float"]
    assert "adapted" not in results["kl"]  # which is the distance to the float model as loaded
    for key, values in factors(tmp_path / "peft").items():
        assert torch.equal(factors(references / "foreign")[key], values)
    # what PEFT makes of the files
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = PeftModel.from_pretrained(model, references / "second").eval()
    recipe = load_recipe(job.recipe)
    text = JobContext(recipe, Sources(recipe), out, untracked).text("second").evaluation.input_ids
    with torch.no_grad():
        loss = sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in text)
    assert perplexity["reference"]["second"] == pytest.approx(math.exp(loss / len(text)), 1e-4)

    rename_adapter(out, "second", "renamed")
    again = Job(out / "recipe.yaml", out)
    assert "renamed" in again.run(*VERBS)["reference"]["kl"]["adapted"]
    assert not again.done


def test_there_is_nothing_to_recover_on_the_float_model(recipe_for: Any, tmp_path: Path) -> None:
    recovered = {"name": "recovered", "objective": "recovery", "rank": 3, **SHORT}
    adapters = [recovered, {"name": "task", "continue_from": "recovered", **SHORT}]
    path = recipe_for("one-layer llama", reference="float", adapters=adapters)
    stages = stage_keys(path)
    assert "train/task/float" in stages
    assert not {"train/recovered/float", "evaluate/reference/recovered"} & stages.keys()
    recipe = load_recipe(path)
    context = JobContext(recipe, Sources(recipe), tmp_path, untracked)
    model = context.untrained(recipe.adapters[1], reference=True)
    assert model.peft_config["default"].r == 3
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
