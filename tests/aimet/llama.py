"""A Llama for AIMET, which quantizes only modules.

Either as in transformers, or with a module for every operator that we place a quantizer on, as
AIMET's guides ask. Modules are named like our encodings (`self_attn.matmul_1`, `mlp.mul`,
`q_proj.lora_A`). Operations are in the same order as in transformers and PEFT.
"""

import types
from typing import Any

import pytest
from torch import Tensor, nn

pytest.importorskip(
    "aimet_torch", reason="runs in an environment with aimet-torch: make test-aimet"
)
pytest.importorskip("transformers", reason="make test-aimet installs it")

from aimet_torch.nn.modules.custom import Add, Concat, MatMul, Multiply, Neg
from transformers import LlamaConfig, LlamaForCausalLM


class ForwardLogits(nn.Module):
    """Positional inputs and one output, for AIMET's tracer."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=False
        )[0]


class Lora(nn.Module):
    """`y = linear(x) + scaling * lora_B(lora_A(x))`, every operator a module."""

    def __init__(self, linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float):
        super().__init__()
        self.linear, self.scaling = linear, scaling
        self.lora_A, self.lora_B = _linear(lora_A), _linear(lora_B)
        self.mul, self.add = Multiply(), Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.linear(x), self.mul(self.lora_B(self.lora_A(x)), self.scaling))


class Rotary(nn.Module):
    """The rotary embedding, with a module for each of its two results."""

    def __init__(self, table: nn.Module):
        super().__init__()
        self.table, self.mul, self.mul_1 = table, Multiply(), Multiply()

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.table(x, position_ids)
        return self.mul(cos, 1.0), self.mul_1(sin, 1.0)


def llama(config: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """A Llama of transformers with these weights."""
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager")).eval()
    model.load_state_dict(weights, strict=True)
    return model


def make_modules_(model: nn.Module) -> None:
    """Replace operators by modules."""
    model.model.rotary_emb = Rotary(model.model.rotary_emb)
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("mul", "mul_1", "mul_2", "mul_3", "mul_4"):
            attention.add_module(name, Multiply())
        for number in ("", "_1"):
            for name, module in {"neg": Neg(), "cat": Concat(-1), "add": Add()}.items():
                attention.add_module(name + number, module)
        attention.matmul, attention.matmul_1, attention.softmax = MatMul(), MatMul(), nn.Softmax(-1)
        attention.forward = types.MethodType(_attend, attention)
        layer.mlp.mul = Multiply()
        layer.mlp.forward = types.MethodType(_gate, layer.mlp)


def adapt_(model: nn.Module, adapter: dict[str, Tensor], scaling: float) -> None:
    """Add LoRA to every linear layer in `adapter`."""
    for path in sorted({name.partition(".lora_")[0] for name in adapter}):
        factors = (adapter[f"{path}.lora_{letter}.weight"] for letter in "AB")
        model.set_submodule(path, Lora(model.get_submodule(path), *factors, scaling))


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def _gate(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.mul(self.act_fn(self.gate_proj(x)), self.up_proj(x)))


def _attend(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (
        project(hidden_states).view(shape).transpose(1, 2)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    cos, sin = (table.unsqueeze(1) for table in position_embeddings)
    half = self.head_dim // 2
    query = self.add(
        self.mul(query, cos),
        self.mul_1(self.cat(self.neg(query[..., half:]), query[..., :half]), sin),
    )
    key = self.add_1(
        self.mul_2(key, cos),
        self.mul_3(self.cat_1(self.neg_1(key[..., half:]), key[..., :half]), sin),
    )
    key, value = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (key, value))
    scores = (
        self.mul_4(self.matmul(query, key.transpose(2, 3)), self.scaling)
        + attention_mask[..., : key.shape[-2]]
    )
    attended = self.matmul_1(self.softmax(scores), value).transpose(1, 2)
    return self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), None
