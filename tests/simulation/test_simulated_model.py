"""The simulation behaves like the transformers model that it was made from."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteriaList

from conftest import EACH_ARCHITECTURE, tiny_model
from qwlora import quantize_, simulate
from qwlora.errors import CaptureError
from qwlora.simulation.simulation import Simulation
from simulation import tiny_architectures
from simulation.captured import adapted_layer as adapted
from simulation.captured import batch as batch_of

pytestmark = pytest.mark.usefixtures("shared_captures")


def batch(
    rows: int = 2, tokens: int = 12, seed: int = 0, positions: bool = False
) -> dict[str, Tensor]:
    more = {"position_ids": torch.arange(tokens).expand(rows, -1)} if positions else {}
    return batch_of(rows, tokens, seed) | more


def calibrated(model: nn.Module, positions: bool = False) -> Simulation:
    simulation = simulate(model, batch(positions=positions))
    simulation.calibrate([batch(seed=s, positions=positions) for s in range(3)])
    return simulation


@pytest.fixture(scope="module", params=EACH_ARCHITECTURE)
def pair(request: pytest.FixtureRequest) -> tuple[Simulation, PreTrainedModel]:
    simulation = calibrated(adapted(request.param), positions=True)
    return simulation, simulation.as_model()


def test_calls_give_an_output_of_simulated_logits(pair: tuple[Simulation, PreTrainedModel]) -> None:
    simulation, model = pair
    own = simulation.origin.model.get_base_model()
    given = batch(3, 9, seed=4)
    called = simulation(**batch(3, 9, seed=4, positions=True))
    expected, output = called.logits.detach(), model(**given)
    assert type(output) is type(called) is type(own(**given))
    assert torch.equal(output.logits, expected)
    assert torch.equal(model(given["input_ids"]).logits, expected)  # as lm-eval calls it
    assert torch.equal(model(**given, return_dict=False)[0], expected)
    assert not model.training
    assert not output.logits.requires_grad
    # what lm-eval 0.4.13 asks of it (`HFLM(pretrained=model)`)
    assert model.eval() is model
    assert model.tie_weights() is None
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.config.vocab_size == 260
    assert model.num_parameters() > 0


def test_loss_is_that_of_the_simulated_logits(pair: tuple[Simulation, PreTrainedModel]) -> None:
    _, model = pair
    given = batch(3, 9, seed=4)
    labels = given["input_ids"].clone()
    labels[:, :4] = -100
    output = model(**given, labels=labels)
    logits = output.logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    summed = model(**given, labels=labels, num_items_in_batch=torch.tensor(10))
    torch.testing.assert_close(summed.loss, expected * (labels != -100).sum() / 10)


def test_generate_is_an_argmax_loop(pair: tuple[Simulation, PreTrainedModel]) -> None:
    simulation, model = pair
    ids = batch(2, 5, seed=6)["input_ids"]
    expected = ids
    for _ in range(6):
        positions = torch.arange(expected.shape[1]).expand(len(ids), -1)
        logits = simulation(expected, torch.ones_like(expected), positions).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(model.generate(ids, **settings), expected)
    never = StoppingCriteriaList([lambda ids, scores, **_: torch.zeros(len(ids), dtype=torch.bool)])
    theirs = {"stopping_criteria": never, "pad_token_id": 257, "use_cache": True}  # of lm-eval
    theirs["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(model.generate(ids, **theirs, **settings), expected)
    assert torch.equal(model.generate(ids[:, :1], **settings)[:, :1], ids[:, :1])


def test_left_padding_changes_nothing(pair: tuple[Simulation, PreTrainedModel]) -> None:
    _, model = pair
    short, long = batch(1, 6, seed=1)["input_ids"], batch(1, 10, seed=2)["input_ids"]
    padded = torch.cat([torch.cat([torch.full((1, 4), 257), short], 1), long])
    mask = (torch.arange(10) >= torch.tensor([[4], [0]])).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    for row, alone in ((0, short), (1, long)):
        expected = model(input_ids=alone).logits[0]
        # a value on the edge between two 16-bit steps may fall to either side
        close = {"rtol": 0, "atol": 2e-3 * float(expected.abs().max())}
        torch.testing.assert_close(logits[row, -alone.shape[1] :], expected, **close)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    together = model.generate(padded, attention_mask=mask, **options)
    for row, alone in ((0, short), (1, long)):
        assert torch.equal(together[row, -4:], model.generate(alone, **options)[0, -4:])
    with pytest.raises(CaptureError, match="with position_ids, and a masked batch needs them"):
        model(input_ids=padded, attention_mask=mask)


def test_arguments_that_the_graph_knows_nothing_of_are_refused() -> None:
    simulation = calibrated(adapted("llama"))
    model, given = simulation.as_model(), batch()
    plain = model(**given).logits
    positions = torch.arange(12)[None]
    assert torch.equal(model(**given, position_ids=positions).logits, plain)  # what it assumes
    position = r"position_ids .* captured with input_ids, attention_mask .* first token"
    unknown = "the graph was captured without this argument"
    left_padded = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])  # has other positions
    padded = {"attention_mask": left_padded, "max_new_tokens": 1}
    for message, call in (
        (position, lambda: model(**given, position_ids=positions + 1)),
        (f"token_type_ids: {unknown}", lambda: model(**given, token_type_ids=torch.zeros(2, 12))),
        (f"nonsense: {unknown}", lambda: model(**given, nonsense=1)),
        ("use_cache: this model returns logits", lambda: model(**given, use_cache=True)),
        ("output_attentions: this", lambda: model(**given, output_attentions=True)),
        ("output_hidden_states: this", lambda: model(**given, output_hidden_states=True)),
        ("input_ids: .* not with None", lambda: model(attention_mask=given["attention_mask"])),
        ("is for evaluation", model.train),
        ("not a checkpoint", lambda: model.save_pretrained("somewhere")),
        ("position_ids .*example inputs", lambda: model.generate(given["input_ids"], **padded)),
    ):
        with pytest.raises(CaptureError, match=message):
            call()


def test_an_encoder_with_a_decoder_is_called_and_does_not_generate() -> None:
    own, given = tiny_architectures.make("T5"), tiny_architectures.inputs("T5")
    with pytest.warns(UserWarning, match="T5ForConditionalGeneration has no packed layer"):
        simulation = simulate(own, given)
    simulation.calibrate([given])
    model = simulation.as_model()
    assert torch.equal(model(**given).logits, simulation.outputs(given)["logits"])
    with pytest.raises(CaptureError, match=r"generate .* T5\w+ separately, .* decoder_input_ids"):
        model.generate(given["input_ids"], max_new_tokens=2)


def test_the_users_model_is_left_alone(pair: tuple[Simulation, PreTrainedModel]) -> None:
    simulation, model = pair
    own = simulation.origin.model.get_base_model()
    assert "forward" not in own.__dict__
    assert own.config.use_cache is not model.config.use_cache
    assert "simulation" not in dict(own.named_children())
    assert set(dict(model.named_children())) == {"simulation"}
    assert own(**batch(), use_cache=True).past_key_values is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_simulation_computes_in_float32_and_refuses_a_cast(dtype: torch.dtype) -> None:
    simulation = calibrated(adapted("llama").to(dtype))
    expected = simulation.logits(batch()["input_ids"])
    assert expected.dtype == torch.float32
    for cast in (nn.Module.bfloat16, nn.Module.half, nn.Module.double):
        with pytest.raises(CaptureError, match=r"cannot be cast.*float32"):
            cast(simulation.as_model())
    simulation.to("cpu")
    assert torch.equal(simulation.logits(batch()["input_ids"]), expected)


def test_only_models_of_transformers_have_such_a_call() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("llama", layers=1)
            quantize_(self.inner, "w4-block32", "rtn")

        def forward(self, **inputs: Tensor) -> object:
            return self.inner(**inputs)

    with pytest.raises(CaptureError, match="Wrapped is not a transformers model"):
        calibrated(Wrapped().eval()).as_model()
