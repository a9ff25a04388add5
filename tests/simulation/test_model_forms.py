"""Models and batches in the forms that users have them: classifiers, meta tensors, DataLoaders, labels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    LlamaPreTrainedModel,
)

import qwlora
from conftest import packed_model, tiny_model
from qwlora.errors import CalibrationError, CaptureError, GridError, SourceError
from qwlora.graph.capture import capture
from qwlora.targets.proof.compare import is_language_model
from simulation.tiny_architectures import inputs, make

IDS = torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def simulation() -> qwlora.Simulation:
    """Of a language model; labels are left out of its graph."""
    model = packed_model("llama", layers=1)
    made = qwlora.simulate(model, {"input_ids": IDS, "attention_mask": MASK, "labels": IDS})
    assert made.captured.interface.inputs == ("input_ids", "attention_mask")
    assert made.captured.interface.outputs == ("logits",)
    return made


def test_a_classifier_is_saved_and_loaded_as_its_own_class(tmp_path: Path) -> None:
    config = LlamaConfig(**{**tiny_model("llama").config.to_diff_dict(), "num_labels": 3})
    model = LlamaForSequenceClassification(config).eval()
    assert not is_language_model(capture(model, {"input_ids": IDS}).interface)
    qwlora.quantize_(model, "w4-block32", "rtn")
    identity = qwlora.save_base(model, tmp_path / "new" / "base", source="tiny")
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"])
    adapted = get_peft_model(model, lora).eval()
    qwlora.save_adapter(adapted, tmp_path / "adapter")
    base = qwlora.load_base(tmp_path / "new" / "base")
    assert type(base) is LlamaForSequenceClassification
    assert qwlora.fingerprint(base) == identity
    again = qwlora.load_adapter(base, tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, adapted(IDS).logits)


def test_a_model_of_any_class_is_loaded_into_the_one_that_the_caller_builds(tmp_path: Path) -> None:
    class Scorer(LlamaPreTrainedModel):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model = LlamaModel(config)
            self.score = nn.Linear(64, 3)

    model = Scorer(tiny_model("llama").config).eval()
    qwlora.quantize_(model, "w4-block32", "rtn")
    identity = qwlora.save_base(model, tmp_path / "base", source="tiny")
    with pytest.raises(SourceError, match=r"Scorer.*not from transformers.*model="):
        qwlora.load_base(tmp_path / "base")
    loaded = qwlora.load_base(tmp_path / "base", model=Scorer(model.config))
    assert qwlora.fingerprint(loaded) == identity
    assert torch.equal(loaded.score.weight, model.score.weight)
    smaller = Scorer(tiny_model("llama", layers=1).config)
    with pytest.raises(GridError, match=r"model\.layers\.1"):
        qwlora.load_base(tmp_path / "base", model=smaller)

    class Mine(LlamaForCausalLM):  # is loaded as the class of transformers
        pass

    mine = Mine(tiny_model("llama").config)
    qwlora.quantize_(mine, "w4-block32", "rtn")
    qwlora.save_base(mine, tmp_path / "mine", source="tiny")
    assert type(qwlora.load_base(tmp_path / "mine")) is LlamaForCausalLM


def test_a_module_without_a_configuration_is_built_on_the_meta_device(tmp_path: Path) -> None:
    def build(channels: int = 8) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, channels, 3), nn.Flatten(), nn.Linear(128, 10))

    model, image = build().eval(), torch.randn(2, 3, 6, 6)
    qwlora.quantize_(model, "w4-channel", "rtn")
    identity = qwlora.save_base(model, tmp_path)
    with torch.device("meta"):
        loaded = qwlora.load_base(tmp_path, model=build())
    assert qwlora.fingerprint(loaded) == identity
    assert torch.equal(loaded(image), model(image))
    with pytest.raises(SourceError, match=r"0\.weight is float \[8, 3, 3, 3\], not float \[4"):
        qwlora.load_base(tmp_path, model=build(4))


def test_a_base_and_adapters_of_diffusers(tmp_path: Path) -> None:
    model = make("Stable Diffusion UNet")
    batch = inputs("Stable Diffusion UNet")
    qwlora.quantize_(model, "w4-channel", "rtn")
    model.save_pretrained(tmp_path / "base")
    identity = qwlora.fingerprint(model)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    model.add_adapter(lora, "first")
    qwlora.save_adapter(model, tmp_path / "first", adapter="first")
    model.save_pretrained(tmp_path / "again")  # without the adapter
    assert qwlora.fingerprint(qwlora.load_base(tmp_path / "again")) == identity
    base = qwlora.load_base(tmp_path / "base")
    assert type(base) is type(model)
    assert not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert qwlora.fingerprint(base) == identity
    again = qwlora.load_adapter(base, tmp_path / "first", adapter_name="first").eval()
    assert torch.equal(again(**batch).sample, model(**batch).sample)


def test_models_on_the_meta_device_are_refused_by_their_tensors(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_model("llama").config).eval()
    for error, call in (
        (GridError, lambda: qwlora.quantize_(model, "w4-block32", "rtn")),
        (CaptureError, lambda: capture(model, {"input_ids": IDS})),
    ):
        with pytest.raises(error, match=r"model.embed_tokens.weight.* and \d+ more .*meta device"):
            call()
    partly = packed_model("llama")
    partly.model.norm.to("meta")
    with pytest.raises(SourceError, match=r"model\.norm\.weight are on the meta device"):
        qwlora.save_base(partly, tmp_path / "base")
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    "batches",
    [
        [{"input_ids": IDS, "attention_mask": MASK, "labels": IDS}],
        DataLoader(TensorDataset(IDS, MASK), batch_size=4),
        DataLoader(TensorDataset(IDS), batch_size=4),
        DataLoader(IDS, batch_size=4),  # type: ignore[arg-type] # a tensor is indexed like a dataset
    ],
    ids=["dicts with labels", "pairs", "lists of one", "tensors"],
)
def test_calibration_takes_what_loaders_give(simulation: qwlora.Simulation, batches: Any) -> None:
    report = simulation.calibrate(batches)
    found = simulation.encodings
    simulation.calibrate([{"input_ids": IDS, "attention_mask": MASK}])
    assert report.tokens % IDS.numel() == 0
    assert all(torch.equal(e.scale, found[name].scale) for name, e in simulation.encodings.items())


def test_gptq_takes_what_a_dataloader_gives() -> None:
    dicts = [{"input_ids": row[None]} for row in IDS]
    prints = set()
    for calibration in (IDS, DataLoader(TensorDataset(IDS)), dicts):
        model = tiny_model("llama", layers=1)
        qwlora.quantize_(model, "w4-block32", "gptq", calibration=calibration)
        prints.add(qwlora.fingerprint(model))
    assert len(prints) == 1


LORA = [
    qwlora.PlacementRule("*.q_proj.mul", minimum=-1.0, maximum=2.0),
    qwlora.PlacementRule("*.lora_A.weight", of="weights", bitwidth=4),
    qwlora.PlacementRule("*.down_proj.lora_B.linear", bitwidth=8),
]


def test_a_base_takes_example_inputs_as_batches_and_schemes_with_rules_for_adapters() -> None:
    model, schemes = packed_model("llama", layers=1), qwlora.Schemes(rules=LORA)
    for example, names in ((IDS, ("input_ids",)), ((IDS, MASK), ("input_ids", "attention_mask"))):
        assert qwlora.simulate(model, example, schemes).inputs == names
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    made = qwlora.simulate(adapted, [IDS, MASK], schemes)  # through PEFT's wrapper
    assert (made.inputs, made.placement.unused_rules) == (("input_ids", "attention_mask"), {})
    with pytest.raises(CaptureError, match=r"3 tensors.*2 inputs \(input_ids, attention_mask\)"):
        made.observe([(IDS, MASK, IDS)])
    wrong: dict[str, Any] = {
        "is a str": "text",
        "is a list": [1, 2],
        "tensor 1": (IDS, IDS),  # is no mask
        "float32": {"input_ids": IDS.float()},
    }
    for said, example in wrong.items():
        with pytest.raises(CaptureError, match=rf"(example_inputs|input_ids).*{said}"):
            qwlora.simulate(model, example)
    for match in ("*.q_proj.mol", "*.norm.mul_9", "*.lora_C.weight"):
        rules = [*LORA, qwlora.PlacementRule(match, bitwidth=8)]
        with pytest.raises(CalibrationError, match=r"1 placement rules") as caught:
            qwlora.simulate(model.eval(), IDS, qwlora.Schemes(rules=rules))
        assert repr(match) in str(caught.value)
