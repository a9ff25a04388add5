"""Recovery: the loss equals its definition and brings the model closer to the float model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from adapter.small_models import LOGIT_CHANGES, built
from conftest import ARCHITECTURES, tiny_model
from qwlora import quantize_
from qwlora.adapter.train import TrainingSettings, train_adapter
from qwlora.adapter.training_step import RecoveryLoss
from qwlora.errors import RecipeError
from qwlora.recipe import load_recipe

IDS = torch.randint(0, 250, (16, 24), generator=torch.Generator().manual_seed(0))


def pair(architecture: str) -> tuple[Any, PreTrainedModel]:
    teacher = tiny_model(architecture)
    model = copy.deepcopy(teacher)
    quantize_(model, "w2-block32-asymmetric", "rtn")
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config), teacher


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_distance_is_of_the_head_inputs(architecture: str) -> None:
    model, teacher = pair(architecture)
    with torch.no_grad():
        h, g = (m(IDS[:2], output_hidden_states=True).hidden_states[-1] for m in (model, teacher))
    with RecoveryLoss(model, teacher) as recovery:
        model(input_ids=IDS[:2], labels=IDS[:2])
        found = recovery.distance({"input_ids": IDS[:2], "labels": IDS[:2]})
    expected = float((h - g).square().sum() / g.square().sum())
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    assert found.requires_grad
    assert teacher(IDS[:1]).logits.shape[-1] == 260, "the float model runs through again"


def test_padding_does_not_count() -> None:
    model, teacher = pair("llama")

    def terms(ids: Tensor) -> tuple[Tensor, Tensor]:
        h, g = (m(ids, output_hidden_states=True).hidden_states[-1] for m in (model, teacher))
        return (h - g).square().sum(), g.square().sum()

    with torch.no_grad():
        (far, size), (other_far, other_size) = terms(IDS[:1]), terms(IDS[1:2, :10])
    recovery = RecoveryLoss(model, teacher)
    ids, labels = IDS[:2].clone(), IDS[:2].clone()
    ids[1, 10:], labels[1, 10:] = 0, -100  # padding
    labels[:, :4] = -100  # a question is outside the loss, but counts
    mask = (torch.arange(24) < torch.tensor([[24], [10]])).long()
    nothing = torch.full_like(ids, -100)  # one of several accumulated batches
    expected = float((far + other_far) / (size + other_size))
    cases = [({"labels": labels}, expected), ({"attention_mask": mask}, expected)]
    for more, distance in (*cases, ({"labels": nothing}, 0.0)):
        model(input_ids=ids)
        found = recovery.distance({"input_ids": ids, **more})
        assert float(found.detach()) == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize("name", LOGIT_CHANGES)
def test_models_that_change_their_logits_are_recovered(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    losses = []
    for loss in ("chunked_loss", "own_loss"):
        if loss == "own_loss":
            request.getfixturevalue(loss)
        teacher = built(name)
        model = copy.deepcopy(teacher)
        quantize_(model, "w2-block16-asymmetric", "rtn")
        config = LoraConfig(r=8, init_lora_weights=False, target_modules="all-linear")
        settings = TrainingSettings(2, 5e-3, 4, 1, "cosine", 30, 0)
        adapted, work = get_peft_model(model, config), tmp_path / loss
        losses.append(train_adapter(adapted, IDS, settings, work, teacher=teacher).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("divides", [False, True])
def test_accumulated_batches_are_one_batch(tmp_path: Path, divides: bool) -> None:
    losses = []
    for batch, accumulated in ((3, 1), (1, 4)):  # the text has only three of four
        model, teacher = pair("llama")
        model.get_base_model().accepts_loss_kwargs = not divides  # then the Trainer divides
        settings = TrainingSettings(1, 5e-3, batch, 0, "constant", 30, 0, accumulated)
        work = tmp_path / str(batch)
        losses += train_adapter(model, IDS[:1].repeat(3, 1), settings, work, teacher=teacher).losses
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_recovery_gets_closer_to_the_float_model(tmp_path: Path) -> None:
    distances = {}
    for name in ("base", "text", "recovery"):
        model, teacher = pair("llama")
        if name != "base":
            settings = TrainingSettings(30, 5e-3, 4, 1, "cosine", 30, 0)
            goal = teacher if name == "recovery" else None
            train_adapter(model, IDS, settings, tmp_path / name, teacher=goal)
        with torch.no_grad():
            off = model.eval()(IDS).logits - teacher(IDS).logits
        distances[name] = float(off.square().mean())
    assert distances["recovery"] < 0.8 * distances["base"]
    assert distances["recovery"] < 0.8 * distances["text"]


def test_refuses_recovery_without_floats(recipe_for: Any) -> None:
    back = [{"name": "back", "objective": "recovery"}]
    with pytest.raises(RecipeError, match=r"back: objective recovery .* need the float model"):
        load_recipe(recipe_for(adapters=back, base={"solver": "keep"}))
