"""Packed layers in models: PEFT's own LoRA, experts, torch.compile, checkpointing, generation. The twin is a float model that holds the same values."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from conftest import ARCHITECTURES, tiny_model
from formats.packing import packed_and_twin
from qwlora import fingerprint
from qwlora.errors import MergeError
from qwlora.nn import PackedLayer, is_packed, packed_weights

IDS = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(0))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


class Mixed(nn.Module):
    """One layer of each kind that PEFT has a LoRA for."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.conv1d, self.conv2d = nn.Conv1d(4, 8, 4, padding=1), nn.Conv2d(4, 8, (2, 2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(self.embedding(ids)).view(ids.shape[0], 4, -1)
        image = hidden.unsqueeze(-1).expand(-1, -1, -1, 4)
        return self.conv1d(hidden).square().sum() + self.conv2d(image).square().sum()


def mixed(**options: Any) -> tuple[nn.Module, nn.Module, LoraConfig]:
    torch.manual_seed(0)
    targets = ["embedding", "linear", "conv1d", "conv2d"]
    return *packed_and_twin(Mixed(), "w4-block16"), LoraConfig(
        r=2, target_modules=targets, init_lora_weights=False, **options
    )


def adapted(model: nn.Module, config: LoraConfig, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return get_peft_model(model, copy.deepcopy(config))


def loss(model: Any, **options: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS, **options).loss


def same_step(ours: nn.Module, twin: nn.Module, call: Any, **close: float) -> int:
    """One loss and its gradients are equal; returns how many adapter tensors had one."""
    losses = [call(model) for model in (ours, twin)]
    torch.testing.assert_close(*losses, **close)
    gradients = []
    for model, loss in zip((ours, twin), losses, strict=True):
        model.zero_grad()
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, **close)
    return len(gradients[0])


@pytest.mark.parametrize("use_dora", [False, True])
def test_pefts_lora_learns_as_on_the_float_twin(use_dora: bool) -> None:
    model, twin, config = mixed(use_dora=use_dora, use_rslora=True)
    ids = IDS[:, :8] % 32
    bare = model(ids)
    ours, theirs = adapted(model, config), adapted(twin, config)
    learned = same_step(ours, theirs, lambda m: m(ids), rtol=1e-4, atol=1e-4)
    assert learned == (12 if use_dora else 8)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(ids), bare)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_no_merge_gets_through_and_nothing_changes(use_dora: bool, safe: bool) -> None:
    model, _, config = mixed(use_dora=use_dora)
    start = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=["pissa", "olora"][safe])
    with pytest.raises(MergeError, match=r"change the base's weights.*pissa"):
        get_peft_model(copy.deepcopy(model), start)
    peft = adapted(model, config)
    before, result = fingerprint(peft), peft(IDS[:, :8] % 32)
    layers = [m.merge for m in peft.modules() if hasattr(m, "merge") and hasattr(m, "base_layer")]
    assert len(layers) == 4
    for merge in (peft.merge_adapter, peft.merge_and_unload, *layers):
        with pytest.raises(MergeError, match="qwlora merge JOB"):
            merge(safe_merge=safe)
    assert fingerprint(peft) == before
    torch.testing.assert_close(peft(IDS[:, :8] % 32), result)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_models_with_embeddings_and_tied_heads(architecture: str) -> None:
    model, twin = packed_and_twin(tiny_model(architecture), "w4-block32")
    packed = packed_weights(model)
    kinds = (nn.Linear, nn.Embedding)
    assert all(is_packed(m) for m in model.modules() if isinstance(m, kinds))
    head = packed["lm_head.weight"]
    assert head.is_tied is model.config.tie_word_embeddings
    model.tie_weights()
    dtypes = {tensor.dtype for tensor in model.state_dict().values()}
    assert dtypes <= {torch.float32, torch.float16, torch.uint8}
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=1e-5, atol=1e-4)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict(), assign=True)
    assert fingerprint(again) == fingerprint(model)
    for dtype in (torch.float32, torch.bfloat16):
        moved = packed_weights(again.to(dtype))["lm_head.weight"]
        table = again.get_input_embeddings()
        assert (moved.tensor.parts.packed is table.packed) is model.config.tie_word_embeddings
        x = torch.randn(3, 64, dtype=dtype)
        torch.testing.assert_close(again.lm_head(x), x @ again.lm_head.weight.T)
    assert torch.equal(again.lm_head.codes, model.lm_head.codes)


def experts(kind: str, implementation: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    size = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    size |= {"num_experts_per_tok": 2}
    config: Any = {
        "mixtral": MixtralConfig(**size, num_local_experts=4),
        "qwen3": Qwen3MoeConfig(**size, num_experts=4, moe_intermediate_size=48),
        "gpt-oss": GptOssConfig(**size, num_local_experts=4),
    }[kind]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    if implementation:
        model.config._experts_implementation = implementation
    return model.eval()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
@pytest.mark.parametrize("implementation", [None, "eager", "batched_mm"])
def test_experts_compute_and_learn_as_floats_do(kind: str, implementation: str | None) -> None:
    model, twin = packed_and_twin(experts(kind, implementation), "w4-block16-asymmetric")
    assert sum(name.endswith(tuple(EXPERTS)) for name in packed_weights(model)) == 4
    assert not any(module.training for module in model.modules())
    if implementation is None and kind != "qwen3":  # frozen, they keep no floats for gradients
        shapes = [layer.tensor.shape for layer in packed_weights(model).values()]
        experts_of = [shape[1] * shape[2] for shape in shapes if len(shape) == 3]
        sizes = {size * n for size in experts_of for n in range(1, 5)}
        hidden, kept = torch.randn(1, 3, 32, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model.model.layers[0].mlp(hidden)
        assert kept
        assert not {t.numel() for t in kept} & sizes
    attention = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ours, theirs = adapted(model, attention), adapted(twin, attention)
    assert same_step(ours, theirs, loss, rtol=1e-3, atol=1e-4) == 8


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_pefts_target_parameters_adapt_packed_experts(kind: str) -> None:
    model, twin = packed_and_twin(experts(kind), "w4-block16")
    config = LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False)
    bare = model(IDS).logits
    ours, theirs = adapted(model, config), adapted(twin, config)
    assert same_step(ours, theirs, loss, rtol=1e-3, atol=1e-4) == 8
    with ours.disable_adapter():
        torch.testing.assert_close(ours(IDS).logits, bare)
    for merge in (ours.merge_adapter, lambda: ours.merge_adapter(safe_merge=True)):
        with pytest.raises(MergeError):
            merge()
    assert not any("original" in name or "delta" in name for name in ours.state_dict())
    again = copy.deepcopy(ours).to(torch.bfloat16)
    assert again(IDS).logits.dtype == torch.bfloat16
    assert same_step(ours, theirs, loss, rtol=1e-3, atol=1e-4) == 8


def test_experts_survive_state_dicts_and_refuse_writes(tmp_path: Path) -> None:
    model, _ = packed_and_twin(experts("mixtral"), "w4-block16")
    other, _ = packed_and_twin(experts("mixtral"), "w4-block16-asymmetric")
    names = {name for name in model.state_dict() if "experts" in name}
    assert "model.layers.0.mlp.experts.packed_parameters.gate_up_proj.packed" in names
    block = model.model.layers[0].mlp.experts
    with pytest.raises(MergeError):
        block.down_proj = nn.Parameter(torch.zeros(4, 32, 64))
    values = block.packed_parameters.down_proj.tensor.dequantize()
    assert block.down_proj.shape == (4, 32, 64)
    assert torch.equal(block.down_proj[2] + 0, values[2])
    with pytest.raises(RuntimeError, match="zero_point"):
        model.load_state_dict(other.state_dict())
    twin = copy.deepcopy(model)
    twin.model.layers[0].mlp.experts.packed_parameters.down_proj.packed.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    # layers of generated classes can be pickled
    for whole in (model, packed_and_twin(tiny_model("falcon"), "w4-block16")[0]):
        torch.save(whole, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        assert fingerprint(again) == fingerprint(whole)
        assert torch.equal(again(IDS).logits, whole(IDS).logits)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_step_is_one_graph_that_keeps_codes(backend: str) -> None:
    model, twin = packed_and_twin(tiny_model("llama"), "w4-block32-asymmetric")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ours, theirs = adapted(model, config), adapted(twin, config)
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compiled(input_ids=IDS, labels=IDS)
    layers = (layer for layer in model.modules() if isinstance(layer, PackedLayer))
    floats = {tuple(sorted(layer.weight_shape)) for layer in layers}
    assert not {tuple(sorted(t.shape)) for t in kept if t.is_floating_point()} & floats
    call = lambda m: loss(compiled if m is ours else m)  # noqa: E731
    same_step(ours, theirs, call, rtol=1e-3, atol=1e-4)
