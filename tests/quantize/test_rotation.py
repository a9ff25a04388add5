"""A rotated model computes the same, and is a base like any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import VOCABULARY, Job, packed_model, tiny_model
from qwlora import load_base, rotate_
from qwlora.errors import CaptureError, RecipeError
from qwlora.quantize.rotation import Rotation

IDS = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
EXAMPLE = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "head_dim": 12}
SMALL |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"pad_token_id": 257}  # a width of 16 x 3


def model_of(kind: str, **settings: Any) -> Any:
    """A small random model of an architecture whose norms have gains other than one."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL | settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return with_gains(model)


@torch.no_grad()
def with_gains(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 2.0)
        elif parameter.ndim > 1:
            parameter.mul_(4)
        else:  # a bias
            parameter.normal_()
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**EXAMPLE).logits


@pytest.mark.parametrize("width", [1, 2, 9, 12, 64, 576])
def test_a_rotation_is_orthogonal_and_spreads_one_channel(width: int) -> None:
    q = Rotation.random(width, seed=0)(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64))
    if width >= 64:
        assert q.abs().max() < 0.5
        signs = [Rotation.random(width, seed).signs.tolist() for seed in (0, 0, 1)]
        assert signs[0] == signs[1] != signs[2]


BUILDERS: dict[str, Callable[[], Any]] = {
    "Llama, tied": lambda: with_gains(tiny_model("llama")),
    "Qwen3, norms of heads": lambda: with_gains(tiny_model("qwen3", layers=1)),
    "Qwen2, biases": lambda: model_of("Qwen2"),
    "Gemma, 1 + w and a scaled embedding": lambda: model_of("Gemma"),
    "Phi3, fused layers": lambda: model_of("Phi3"),
    "Granite, scaled branches": lambda: model_of("Granite", residual_multiplier=0.3),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_outputs_stay_the_same_and_the_weights_do_not(name: str) -> None:
    model = BUILDERS[name]()
    before, is_tied = logits(model), model.config.tie_word_embeddings
    weights = {path: parameter.clone() for path, parameter in model.named_parameters()}
    report = rotate_(model, EXAMPLE, seed=3)
    torch.testing.assert_close(logits(model), before, atol=1e-4 * before.abs().max(), rtol=0)
    assert report.difference < 1e-4
    for path in (*report.readers, *report.writers):
        old = weights.get(f"{path}.weight")
        assert old is None or not torch.equal(old, model.get_submodule(path).weight), path
    assert report.untied == (("lm_head",) if is_tied else ())
    linear = sum(type(module) is nn.Linear for module in model.modules())
    assert len(set(report.readers) | set(report.writers)) == linear + 1  # and the embedding
    assert len(report.heads) == (0 if "fused" in name else model.config.num_hidden_layers)


def test_a_rotated_model_is_saved_and_loaded_with_its_head(tmp_path: Path) -> None:
    """The head was tied and is not any more. The job below saves a base."""
    model = with_gains(tiny_model("llama"))
    rotate_(model, EXAMPLE)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


class WithVision(nn.Module):
    """A language model beside a part that its tokens do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.language, self.vision = tiny_model("llama", layers=1), nn.Linear(8, 64).eval()
        self.eval()

    def forward(self, **arguments: Any) -> Any:
        return self.language(**arguments)


def test_an_adapter_is_rotated_with_its_model() -> None:
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llama", layers=1), config).eval()
    before = logits(model)
    rotate_(model, EXAMPLE)
    torch.testing.assert_close(logits(model), before, atol=1e-4 * before.abs().max(), rtol=0)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), before, atol=0.1)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
COUNTED = {"kv_channels": 12, "num_local_experts": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny_model("gpt2", layers=1), r"transformer\.h\.0\.ln_1 is a LayerNorm"),
        (lambda: model_of("Gemma2"), r"norm model\.layers\.0\.post_\w+_layernorm is between"),
        (
            lambda: model_of("Qwen3Moe", **EXPERTS),
            r"0\.mlp.* reads the norm model\.layers\.0\.post",
        ),
        (
            lambda: model_of("JetMoe", **COUNTED),
            r"model\.layers\.0\S+ has tensors .*rotation: null",
        ),
        (WithVision, r"do not reach vision\.bias, vision\.weight"),
        (lambda: tiny_model("llama").bfloat16(), r"embed_tokens\.weight .*model\.float\(\)"),
        (lambda: packed_model("llama", layers=1), r"q_proj\S* holds integers already"),
    ],
    ids=["LayerNorm", "post-norm", "experts", "counted experts", "vision", "half", "packed"],
)
def test_what_cannot_be_rotated_is_named_and_unchanged(
    build: Callable[[], Any], message: str
) -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CaptureError, match=message):
        rotate_(model, EXAMPLE)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_job_on_a_rotated_base(job_for: Callable[..., Job], checkpoints: dict[str, Path]) -> None:
    base = {"solver": "rtn", "weights": "w8-channel", "rotation": "hadamard"}
    job = job_for("one-layer llama", base=base, export={"targets": ["hf"]})
    rotation = job.run("quantize")["base"]["rotation"]
    assert (rotation["width"], rotation["heads"], rotation["untied"]) == (64, 1, ["lm_head"])
    floats = AutoModelForCausalLM.from_pretrained(checkpoints["one-layer llama"]).eval()
    base_logits, float_logits = logits(load_base(job.out / "base")), logits(floats)
    assert (base_logits - float_logits).norm() < 0.05 * float_logits.norm()
    job.run("quantize", changes=["base.rotation=null"])
    assert job.done == ["quantize"]
    with pytest.raises(RecipeError, match=r"base\.rotation .* solver keep"):
        job.run(changes=["base={solver: keep, rotation: hadamard}"])
