"""Capture of any arguments and results, and the proof that it can fail."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qwlora import quantize_
from qwlora.errors import CaptureError
from qwlora.graph.call_arguments import cache_of
from qwlora.graph.capturable_model import visible_implementations
from qwlora.graph.capture import Captured, capture
from qwlora.graph.nodes import calls, module_stack, operation
from qwlora.simulation.placement_rules import Schemes
from qwlora.simulation.saved_simulation import SimulationSource
from qwlora.simulation.simulation import Simulation
from simulation.tiny_architectures import inputs, make


class Nested(nn.Module):
    """Arguments and results of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(8, 16), nn.Conv2d(3, 4, 2, stride=2)

    def forward(
        self,
        sample: Tensor,
        added: dict[str, Tensor],
        rest: tuple[Tensor, None, int],
        scale: float = 1.0,
    ) -> dict[str, Any]:
        image = self.image(sample).flatten(2).mean(-1) * scale
        text = self.text(added["text"]) + rest[0] * rest[2]
        return {
            "count": added["ids"].sum(-1),
            "sample": image,
            "parts": (text, None),
            "logits": text.sum(1) + image.sum(1, keepdim=True),
        }


def nested(batch: int = 2, tokens: int = 5, height: int = 8) -> dict[str, Any]:
    g = torch.Generator().manual_seed(batch)
    added = {
        "text": torch.randn(batch, tokens, 8, generator=g),
        "ids": torch.randint(0, 9, (batch, tokens), generator=g),
    }
    return {
        "sample": torch.randn(batch, 3, height, 6, generator=g),
        "added": added,
        "rest": (torch.randn(16, generator=g), None, 3),
        "scale": 0.5,
    }


def run(captured: Captured, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return captured.program.module(check_guards=False)(*captured.bind(arguments))


def test_nested_arguments_and_every_output() -> None:
    model = Nested().eval()
    captured = capture(model, nested())
    interface = captured.interface
    assert interface.inputs == ("sample", "added.text", "added.ids", "rest.0")
    # one tensor of a name in a file
    assert interface.outputs == ("count", "out_sample", "parts.0", "logits")
    assert interface.primary == "logits"
    shapes = [interface.shapes[name] for name in interface.inputs]
    assert shapes[:2] == [("batch", 3, "sample.2", "sample.3"), ("batch", "added.text.1", 8)]
    assert shapes[2:] == [("batch", "tokens"), (16,)]
    assert interface.shapes["parts.0"][2] == 16
    for arguments in (nested(3, 7, 12), nested(1, 2, 4)):
        with torch.no_grad():
            expected = model(**arguments)
        result = captured.result_of(run(captured, arguments))
        assert result["parts"][1] is None
        for name in ("count", "sample", "logits"):
            assert torch.equal(result[name], expected[name])
        assert torch.equal(result["parts"][0], expected["parts"][0])
    with pytest.raises(CaptureError, match=r"input rest\.0 has shape \[15\]; .* takes \[16\]"):
        captured.bind({**nested(), "rest": (torch.ones(15), None, 3)})


class Steps(nn.Module):
    """State that changes from call to call, as no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 1.5 + self.calls


class Chain(nn.Module):
    """Three parts in a row."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), middle, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


class Forward(nn.Module):
    """Computes what it is told, with a table of eight rows."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.compute, self.table = compute, nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (Chain(Steps()), torch.randn(4, 8), r"differs is middle \(Steps\)"),
        (
            Forward(lambda _, x: x * 2 if x.shape[1] % 2 else x + 1),
            torch.randn(2, 12, 4),
            r"differs from the module at .*11, 3\]\].*branches on",
        ),
        (Chain(nn.ReLU()), torch.tensor(1.0), "example inputs hold no tensor with an axis"),
    ],
)
def test_what_cannot_be_captured_is_named(model: nn.Module, x: Tensor, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(model.eval(), {"x": x})


@pytest.mark.parametrize("more", [{"use_cache": True}, {"past_key_values": cache_of([])}])
def test_a_cache_of_an_encoder_decoder_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(CaptureError, match=r"T5\w+ is an encoder-decoder.*False"):
        capture(packed("T5"), {**inputs("T5"), **more})


@pytest.mark.parametrize(
    ("model", "x", "shapes"),
    [
        (Chain(nn.ReLU()), torch.randn(4, 8), {"x": ("batch", 8), "output": ("batch", 8)}),
        # of a single row, it makes a vector
        (
            Forward(lambda _, x: x.squeeze(0) @ x.new_ones(8) * len(x)),
            torch.randn(1, 5, 8),
            {"x": (1, "x.1", 8), "output": ("x.1",)},
        ),
        # as many rows as its table has
        (
            Forward(lambda self, x: x + self.table),
            torch.randn(2, 8, 4),
            {"x": ("batch", 8, 4), "output": ("batch", 8, 4)},
        ),
    ],
)
def test_axes_are_open_where_the_model_allows_it(
    model: nn.Module, x: Tensor, shapes: dict[str, Any]
) -> None:
    assert capture(model.eval(), {"x": x}).interface.shapes == shapes


def test_encoder_layers_of_torch_are_captured() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    captured = capture(layer, {"src": torch.randn(2, 6, 32)})
    assert "scaled_dot_product_attention" in map(operation, calls(captured.program))
    assert torch.backends.mha.get_fastpath_enabled()


class Sized(nn.Module):
    """Branches on sizes; `positions` is the largest number of tokens."""

    def __init__(self, is_other: Callable[[Tensor, Tensor], bool], positions: int = 100) -> None:
        super().__init__()
        self.linear, self.is_other = nn.Linear(4, 4), is_other
        self.register_buffer("positions", torch.randn(positions, 4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.linear(x) + self.positions[: x.shape[1]]
        return (2 * z if self.is_other(x, y) else z).sum(1) + y.sum(1)


TOKENS = {"x": ("batch", 8, 4), "y": ("batch", "y.1", 4)}
BATCH = {"x": (3, "x.1", 4), "y": (3, "y.1", 4)}


@pytest.mark.parametrize(
    ("is_other", "shapes"),
    [
        (lambda x, y: x.shape[1] > 20, TOKENS),
        (lambda x, y: x.shape[1] < 6, TOKENS),
        (lambda x, y: x.shape[1] == 13, TOKENS),
        (lambda x, y: x.shape[1] // 4 == 3, TOKENS),
        (lambda x, y: x.shape[0] > 6, BATCH),
        (lambda x, y: x.shape[1] < y.shape[1], {"x": ("batch", 8, 4), "y": ("batch", 5, 4)}),
        (lambda x, y: x.numel() > 3000, BATCH),
    ],
)
def test_an_axis_is_fixed_where_the_graph_holds_for_some_sizes_only(
    is_other: Callable[[Tensor, Tensor], bool], shapes: dict[str, Any]
) -> None:
    """The largest of 100 positions is none of these: the model itself takes no more."""
    example = {"x": torch.randn(3, 8, 4), "y": torch.randn(3, 5, 4)}
    captured = capture(Sized(is_other).eval(), example)
    assert {name: captured.interface.shapes[name] for name in example} == shapes
    for tokens in (101, 7 if shapes["x"][1] == 8 else 102):
        with pytest.raises(CaptureError, match=rf"input x has shape \[3, {tokens}, 4\]"):
            captured.bind({**example, "x": torch.randn(3, tokens, 4)})


ABOUT_EXPERTS = "ignore:The following (rank|alpha)_pattern keys"  # PEFT about fused experts that it wraps all the same


def packed(name: str, layers: int | None = None) -> nn.Module:
    model = make(name, layers)
    quantize_(model, "w4-block32", "rtn")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).eval()


@pytest.mark.filterwarnings(ABOUT_EXPERTS)
def test_capture_leaves_the_model_as_it_was() -> None:
    model = packed("Qwen3-MoE", layers=1)
    config = model.get_base_model().config
    before = (config._attn_implementation, config._experts_implementation)
    assert "batched_mm" not in before
    assert before[0] == "sdpa"
    state = {name: value.clone() for name, value in model.state_dict().items()}
    captured = capture(model, inputs("Qwen3-MoE"))
    assert (config._attn_implementation, config._experts_implementation) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    nodes = calls(captured.program)
    operators = Counter(operation(n) for n in nodes if "experts" in str(module_stack(n)))
    # two products, and two weights with their adapters; a softmax of the router, one of attention
    assert (operators["bmm"], operators["baddbmm"]) == (2, 2)
    assert sum(operation(node) == "softmax" for node in nodes) >= 2
    with pytest.raises(CaptureError, match="two or more"):
        capture(model, {"input_ids": torch.ones(2, 1, dtype=torch.int64)})
    assert (config._attn_implementation, config._experts_implementation) == before


def test_attended_positions_of_padded_batches_equal_the_users_model() -> None:
    model = packed("Llama", layers=1)
    captured = capture(model, inputs("Llama"))
    ids = torch.randint(3, 256, (3, 20), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :13] = 0, 0
    logits = captured.named(run(captured, {"input_ids": ids, "attention_mask": mask}))["logits"]
    with torch.no_grad():
        users = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:2, 13:]).logits[0]
        with visible_implementations(model):
            assert torch.equal(logits, model(input_ids=ids, attention_mask=mask).logits)
    attended = mask.bool()
    torch.testing.assert_close(logits[attended], users[attended], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[1, 13:], alone, atol=1e-5, rtol=1e-4)
    unmasked = captured.named(run(captured, {"input_ids": ids}))["logits"]
    assert not torch.allclose(unmasked[1, 13:], alone, atol=1e-3)


IDS = torch.randint(3, 256, (2, 14), generator=torch.Generator().manual_seed(7))
SPLIT = 9


def pairs(outputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    layers = range(sum(name.endswith(".key") for name in outputs))
    return [(outputs[f"present.{n}.key"], outputs[f"present.{n}.value"]) for n in layers]


@pytest.mark.parametrize(
    "name",
    [
        "Llama",
        pytest.param("GPT-2", marks=pytest.mark.slow),
        pytest.param("Gemma 3", marks=pytest.mark.slow),
    ],
)
def test_prefill_and_decode_are_one_model(name: str) -> None:
    """The graph with a cache behind the one that makes it: together the full forward, float and simulated, on one set of encodings."""
    model = packed(name, layers=1 if name == "Llama" else None)
    first, second = IDS[:, :SPLIT], IDS[:, SPLIT:]
    ones = torch.ones_like(IDS)
    whole = {"input_ids": first, "attention_mask": ones[:, :SPLIT], "use_cache": True}
    prefill = capture(model, whole)
    made = prefill.named(run(prefill, {"input_ids": first}))
    follow = {"input_ids": second, "attention_mask": ones, "past_key_values": pairs(made)}
    decode = capture(model, follow)
    assert decode.interface.shapes["past_key_values.0.value"][2] == "past"
    layers = range(len(pairs(made)))
    names = {f"past_key_values.{n}.{part}" for n in layers for part in ("key", "value")}
    assert decode.interface.cached == names
    with torch.no_grad():
        full = model(input_ids=IDS, use_cache=False).logits
    near = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(made["logits"], full[:, :SPLIT], **near)
    later = decode.named(run(decode, follow))["logits"]
    torch.testing.assert_close(later, full[:, SPLIT:], **near)
    unmasked = {name: value for name, value in follow.items() if name != "attention_mask"}
    assert torch.equal(decode.bind(unmasked)[1], follow["attention_mask"])
    as_cache = {**follow, "past_key_values": cache_of(pairs(made))}
    assert torch.equal(run(decode, unmasked)[0], run(decode, as_cache)[0])
    mask = torch.ones(2, SPLIT + 1, dtype=torch.int64)
    shorter = {**follow, "input_ids": second[:, :1], "attention_mask": mask}
    one_more = decode.named(run(decode, shorter))["logits"]
    torch.testing.assert_close(one_more, full[:, SPLIT : SPLIT + 1], **near)

    source = SimulationSource.of(model, {}, Schemes())
    before, after = (Simulation(captured, source) for captured in (prefill, decode))
    before.calibrate([{"input_ids": IDS}])
    after.restore(before.encodings, before.dropped)
    assert list(after.encodings) == list(before.encodings)
    expected = before.outputs({"input_ids": IDS})["logits"]
    cache = pairs(before.outputs({"input_ids": first}))
    found = after.outputs({**follow, "past_key_values": cache})
    difference = (found["logits"] - expected[:, SPLIT:]).abs().max()
    assert float(difference) < 0.01 * float(expected.abs().max())
    key = found["present.0.key"]
    assert torch.equal(key[:, :, :SPLIT], cache[0][0])  # it lay on its grid already


@pytest.mark.parametrize(
    ("equation", "name"),
    [("bij->jbi", "permute"), ("b i j -> b j i", "permute"), ("bij->bi", "einsum")],
)
def test_an_einsum_that_only_permutes_axes_moves_data(equation: str, name: str) -> None:
    x = torch.randn(2, 3, 4)
    captured = capture(Forward(lambda _, x: torch.einsum(equation, x * 2)).eval(), {"x": x})
    assert [operation(node) for node in calls(captured.program)] == ["mul", name]
    assert torch.equal(run(captured, {"x": x})[0], torch.einsum(equation, x * 2))
