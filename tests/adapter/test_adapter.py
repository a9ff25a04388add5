"""Adapters record their base, load in PEFT, and work with custom loops and custom bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM, PreTrainedModel

from adapter.small_models import SMALL as SIZES
from attack.hostile_models import edit, tensors
from conftest import packed_model, tiny_model
from qwlora import fingerprint, load_adapter, save_adapter
from qwlora.adapter.adapter_files import CONFIG, FILE, WEIGHTS
from qwlora.adapter.attach import (
    LoraShape,
    attach,
    check_existing,
    check_shape,
    check_trainable,
)
from qwlora.adapter.chunked_loss import ChunkedLoss
from qwlora.errors import FingerprintError, SourceError, TrainingError
from qwlora.formats.manifest import UnverifiedWarning

IDS = torch.arange(20)[None]
UNVERIFIED = pytest.mark.filterwarnings("ignore:.* is unverified")


def base(architecture: str = "llama") -> PreTrainedModel:
    return packed_model(architecture).requires_grad_(False)


def drawn(model: Any) -> Any:
    """Randomize every adapter weight, so that none is at its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


def test_refuses_trainable_base_parameters() -> None:
    model = attach(base(), LoraShape(4, 8), seed=0)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"would change .*embed_tokens.weight.* requires_grad"):
        check_trainable(model)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        check_trainable(base())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"target_modules": ["no_such_layer"]}, r"\['no_such_layer'\]: .* Its layers .* q_pr"),
        ({"target_modules": ["q_proj", "w_proj"]}, r"modules 'w_proj'\. Its layers .* q_proj, k"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern 'q_prj'"),
        ({"alpha_pattern": {"q_prj": 2}}, "alpha_pattern 'q_prj'"),
        ({"layers": [1, 5]}, "layers 5: the model has layers 0 to 1; choose among these"),
        ({"target_modules": ["mlp"]}, "cannot be attached"),
        ({"target_modules": "*_proj"}, "nothing to repeat"),
        ({"rank_pattern": {"(?i)up_proj": 3}}, "global flags not at the start"),
    ],
)
def test_names_unmatched_targets_without_weights(shape: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    with pytest.raises(TrainingError, match=message):
        check_shape(skeleton, LoraShape(4, 8, **shape))
    with pytest.raises(TrainingError, match=message):
        attach(base(), LoraShape(4, 8, **shape), seed=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_all_linear_with_layers_adapts_these_layers(architecture: str) -> None:
    everywhere = attach(base(architecture), LoraShape(4, 8), seed=0).targeted_module_names
    second = [name for name in everywhere if ".1." in name]
    for layers, chosen in (([1], second), ([0, 1], everywhere)):
        shape = LoraShape(4, 8, layers=layers)
        assert attach(base(architecture), shape, seed=0).targeted_module_names == chosen
        check_shape(tiny_model(architecture), shape)  # of which GPT-2 has Conv1D


def test_attach_is_seeded() -> None:
    first, again, other = (
        {n: p for n, p in attach(base(), LoraShape(2, 4), seed).named_parameters() if "lora_A" in n}
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(again[n], p) for n, p in first.items())
    assert not any(torch.equal(other[n], p) for n, p in first.items())


RANKS = {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8}
KINDS: dict[str, LoraShape] = {
    "plain": LoraShape(4, 8),
    "rslora": LoraShape(4, 8, rslora=True),
    "dora": LoraShape(4, 8, dora=True),
    "patterns": LoraShape(4, 8, rank_pattern=RANKS, alpha_pattern={"q_proj": 3}),
    "layers": LoraShape(4, 8, target_modules=["q_proj", "down_proj"], layers=[1]),
    "embedding": LoraShape(4, 8, target_modules=["embed_tokens", "q_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_round_trips_bitwise_as_a_plain_peft_adapter(kind: str, tmp_path: Path) -> None:
    model = drawn(attach(base("qwen3"), KINDS[kind], seed=0))
    if kind == "patterns":
        weights = dict(model.named_parameters())
        for layer, rank in (("0.self_attn.q_proj", 2), ("1.mlp.up_proj", 8), ("0.mlp.up_proj", 4)):
            weight = weights[f"base_model.model.model.layers.{layer}.lora_A.default.weight"]
            assert weight.shape == (rank, 64)
    save_adapter(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, FILE}
    assert torch.equal(logits(load_adapter(base("qwen3"), tmp_path).eval()), logits(model))
    alone = PeftModel.from_pretrained(base("qwen3"), str(tmp_path)).eval()
    assert torch.equal(logits(alone), logits(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == (kind == "rslora", kind == "dora")
    loaded = load_adapter(base("qwen3"), tmp_path, is_trainable=True)
    assert check_trainable(loaded) == check_trainable(attach(base("qwen3"), KINDS[kind], seed=0))


@pytest.mark.filterwarnings("ignore:.*A 1-D or zero-sized lora_A / lora_B tensor")
def test_biases_of_an_adapter_are_loaded(tmp_path: Path) -> None:
    settings = LoraConfig(r=4, target_modules="all-linear", lora_bias=True)
    model = drawn(get_peft_model(base("opt"), settings))
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(base("opt"), tmp_path).eval()), logits(model))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_convolution_gets_an_adapter(tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 16, "num_hidden_layers": 2, "num_key_value_heads": 1}
    config = Lfm2Config(**sizes, layer_types=["conv", "full_attention"])

    def convolutional() -> PreTrainedModel:
        torch.manual_seed(0)
        return Lfm2ForCausalLM(config).requires_grad_(False).eval()

    shape = LoraShape(4, 8, target_modules=["conv.conv", "q_proj"], rank_pattern={"conv": 16})
    model = drawn(attach(convolutional(), shape, seed=0))
    factors = [m for name, m in model.named_modules() if "lora_A" in name]
    assert sum(isinstance(m, torch.nn.Conv1d) for m in factors) == 1
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(convolutional(), tmp_path).eval()), logits(model))
    assert not torch.equal(logits(convolutional()), logits(model))


def test_the_base_that_an_adapter_records_is_needed_and_compared(tmp_path: Path) -> None:
    model = drawn(get_peft_model(base(), LoraConfig(r=2, target_modules="all-linear")))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(SourceError, match="unknown_base: accept"):
        load_adapter(base(), tmp_path)
    with pytest.warns(UnverifiedWarning, match=FILE):
        loaded = load_adapter(base(), str(tmp_path), unknown_base="accept").eval()
    assert torch.equal(logits(loaded), logits(model))
    save_adapter(model, tmp_path)
    with pytest.raises(FingerprintError, match=fingerprint(base())):
        load_adapter(packed_model("llama", seed=1), tmp_path, unknown_base="accept")
    record = json.loads((tmp_path / FILE).read_text())
    assert record["base_fingerprint"] == fingerprint(model)
    for content in ("", "[]", '{"base_fingerprint": 3}'):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(SourceError):
            load_adapter(base(), tmp_path)


Change = Callable[[Path], Any]


def config(**values: Any) -> Change:
    return lambda folder: edit(CONFIG, **values)(folder, folder)


def weights(**added: tuple[int, ...]) -> Change:
    """More weights, of these shapes."""
    more = {f"base_model.model.model.{n}.weight": torch.ones(shape) for n, shape in added.items()}
    return lambda folder: tensors(lambda found: found.update(more), WEIGHTS)(folder, folder)


def value(part: str, number: float) -> Change:
    def change(found: dict[str, torch.Tensor]) -> None:
        next(tensor for name, tensor in found.items() if part in name)[-1, 1] = number

    return lambda folder: tensors(change, WEIGHTS)(folder, folder)


UP = "layers.7.mlp.up_proj.lora_"
WRONG: list[tuple[Change, str]] = [
    (lambda folder: (folder / WEIGHTS).write_bytes(b"cut short"), rf"{WEIGHTS} cannot be read"),
    (lambda folder: (folder / WEIGHTS).unlink(), rf"has no {WEIGHTS}"),
    (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), r"\.bin\).*runs code"),
    (lambda folder: (folder / CONFIG).unlink(), rf"has no {CONFIG}"),
    (lambda folder: (folder / CONFIG).write_text("{"), rf"{CONFIG}.* cannot be read"),
    (lambda folder: (folder / CONFIG).write_text("[" * 100_000), rf"{CONFIG}.* cannot be read"),
    (config(peft_type="IA3"), "IA3; only LORA"),
    (config(r=3), "asks for rank 3, but the weights have at most 2"),
    (config(target_modules=["c_attn"]), "does not fit LlamaForCausalLM"),
    (config(lora_alpha=0), "lora_alpha: 0"),
    (config(lora_alpha=float("nan")), "lora_alpha: nan"),
    (config(lora_alpha="16"), "lora_alpha: '16'"),
    (config(alpha_pattern={"q_proj": 0}), "q_proj: 0"),
    (config(bias="lora_only"), "bias: 'lora_only'"),
    (config(layer_replication=[[0, 1], [0, 2]]), "layer_replication: "),
    (config(use_qalora=True), "use_qalora: True"),
    (config(init_lora_weights="pissa_niter_4"), "init_lora_weights: "),
    (config(alora_invocation_tokens=[7]), r"alora_invocation_tokens: \[7\]"),
    (value("1.mlp.up_proj.lora_A", float("nan")), "1.mlp.up_proj.lora_A.weight .*not finite"),
    (value("0.mlp.down_proj.lora_B", -torch.inf), "0.mlp.down_proj.lora_B.weight .*not finite"),
    (weights(**{f"{UP}A": (2, 64), f"{UP}B": (128, 2)}), "2 weights differ.*layers.7.mlp"),
    (weights(embed_tokens=(260, 64)), "embed_tokens.*save_embedding_layers=False"),
    (weights(**{"layers.0.input_layernorm": (64,)}), "input_layernorm.weight would replace"),
]


@UNVERIFIED
@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_adapter_is_refused_with_a_base_and_before_there_is_one(
    change: Change, message: str, tmp_path: Path
) -> None:
    save_adapter(get_peft_model(base(), LoraConfig(r=2, target_modules="all-linear")), tmp_path)
    (tmp_path / FILE).unlink()
    change(tmp_path)
    loads: list[Callable[[], Any]] = [
        lambda: load_adapter(base(), tmp_path, unknown_base="accept"),
        lambda: check_existing(str(tmp_path), "accept", tiny_model("llama")),
    ]
    for load in loads:
        with pytest.raises(SourceError, match=message) as caught:
            load()
        assert str(tmp_path) in str(caught.value)


def own_loop(model: Any, steps: int = 8) -> list[float]:
    """A plain training loop over a data loader."""
    shuffled = {"shuffle": True, "generator": torch.Generator().manual_seed(0)}
    batches = torch.utils.data.DataLoader(torch.arange(256).view(8, 32), 2, **shuffled)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    while len(losses) < steps:
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses


def frozen() -> PreTrainedModel:
    """A base of the user's own: floats on a grid."""
    model = tiny_model("llama").requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.lm_head:
            step = layer.weight.abs().max() / 7
            layer.weight.copy_((layer.weight / step).round() * step)
    return model


@pytest.mark.parametrize(("make", "chunked"), [(base, False), (base, True), (frozen, False)])
def test_custom_loop_trains_on_a_frozen_base(make: Any, chunked: bool, tmp_path: Path) -> None:
    model = get_peft_model(make(), LoraConfig(r=4, target_modules="all-linear"))
    identity = fingerprint(model)
    with ChunkedLoss(model) if chunked else nullcontext():
        losses = own_loop(model)
    assert losses[-1] < losses[0]
    assert fingerprint(model) == identity
    save_adapter(model, tmp_path)
    loaded = load_adapter(make(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model.eval()))
    with pytest.raises(FingerprintError):
        load_adapter(frozen() if make is base else base(), tmp_path)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("by", ["get_peft_model", "inject_adapter_in_model"])
def test_one_of_several_adapters_is_saved_and_loaded_by_name(by: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    if by == "get_peft_model":
        model: Any = get_peft_model(base(), config, adapter_name="one")
        model.add_adapter("two", config)
    else:
        model = inject_adapter_in_model(config, base(), adapter_name="one")
        inject_adapter_in_model(config, model, adapter_name="two")
    drawn(model)
    save_adapter(model, tmp_path / "two", adapter="two")
    assert not (tmp_path / "two" / "two").exists()
    loaded = load_adapter(base(), tmp_path / "two", adapter_name="mine").eval()
    assert list(loaded.peft_config) == ["mine"]
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter("two")
    assert torch.equal(logits(loaded), logits(model))
    save_adapter(loaded, tmp_path / "again", adapter="mine")
    load_adapter(loaded, tmp_path / "again", adapter_name="second")
    assert list(loaded.peft_config) == ["mine", "second"]
    with pytest.raises(SourceError, match="has no adapter 'c'; it has mine, second"):
        save_adapter(loaded, tmp_path / "c", adapter="c")


@UNVERIFIED
def test_refuses_transposed_weights_where_the_model_has_none(tmp_path: Path) -> None:
    for architecture, layer in (("llama", "q_proj"), ("gpt2", "c_attn")):
        shape = LoraConfig(r=2, target_modules=[layer], fan_in_fan_out=architecture == "gpt2")
        folder, model = tmp_path / architecture, tiny_model(architecture)
        get_peft_model(model, shape).save_pretrained(str(folder), save_embedding_layers=False)
    config(fan_in_fan_out=True)(tmp_path / "llama")
    with pytest.raises(SourceError, match="fan_in_fan_out: true"):
        check_existing(str(tmp_path / "llama"), "accept", tiny_model("llama"))
    assert check_existing(str(tmp_path / "gpt2"), "accept", tiny_model("gpt2"))


def test_what_is_neither_a_folder_nor_a_hub_id_is_no_adapter() -> None:
    with pytest.raises(SourceError, match="neither a folder nor a hub id"):
        check_existing("nothing/here/at all")
