"""Adapters record their base, and load in PEFT; what does not fit or changed is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from adapter.small_models import SMALL as SIZES
from attack.hostile_models import edit, tensors
from conftest import byte_tokenizer, packed_model, tiny_model
from qwlora import fingerprint, load_adapter, load_base, save_adapter, save_base
from qwlora.adapter.adapter_files import CONFIG, FILE, WEIGHTS
from qwlora.adapter.attach import (
    LoraShape,
    attach,
    check_existing,
    check_shape,
    check_trainable,
)
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


def test_only_finite_parameters_of_the_adapter_may_be_trainable() -> None:
    model = attach(base(), LoraShape(4, 8), seed=0)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"would change .*embed_tokens.weight.* requires_grad"):
        check_trainable(model)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        check_trainable(base())
    for value in (torch.nan, torch.inf):
        model = attach(base(), LoraShape(4, 8), seed=0)
        name = next(name for name, p in model.named_parameters() if p.requires_grad)
        model.get_parameter(name).data.view(-1)[5] = value
        with pytest.raises(TrainingError, match=f"{name} has values that are not finite before"):
            check_trainable(model)


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


def qwen3() -> PreTrainedModel:
    return base("qwen3")


def convolutional() -> PreTrainedModel:
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(**SIZES, block_types=["recurrent"], use_cache=False)
    return RecurrentGemmaForCausalLM(config).requires_grad_(False).eval()


def shaped(**shape: Any) -> Callable[[Any], PeftModel]:
    return lambda model: attach(model, LoraShape(4, 8, **shape), seed=0)


def with_biases(model: Any) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_bias=True))


RANKS = {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8}
KINDS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[Any], PeftModel]]] = {
    "plain": (qwen3, shaped()),
    "rslora": (qwen3, shaped(rslora=True)),
    "dora": (qwen3, shaped(dora=True)),
    "patterns": (qwen3, shaped(rank_pattern=RANKS, alpha_pattern={"q_proj": 3})),
    "layers": (qwen3, shaped(target_modules=["q_proj", "down_proj"], layers=[1])),
    "embedding": (qwen3, shaped(target_modules=["embed_tokens", "q_proj"])),
    "biases": (lambda: base("opt"), with_biases),
    "float base": (lambda: tiny_model("llama").requires_grad_(False), shaped()),
    "convolution": (
        convolutional,
        shaped(target_modules=["conv_1d", "linear_y"], rank_pattern={"conv_1d": 32}),
    ),
}


@pytest.mark.filterwarnings("ignore:.*A 1-D or zero-sized lora_A / lora_B tensor")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_round_trips_bitwise_as_a_plain_peft_adapter(kind: str, tmp_path: Path) -> None:
    make, adapt = KINDS[kind]
    model = drawn(adapt(make()))
    weights = dict(model.named_parameters())
    if kind == "patterns":
        for layer, rank in (("0.self_attn.q_proj", 2), ("1.mlp.up_proj", 8), ("0.mlp.up_proj", 4)):
            weight = weights[f"base_model.model.model.layers.{layer}.lora_A.default.weight"]
            assert weight.shape == (rank, 64)
    convolutions = [n for n, p in weights.items() if "lora_A" in n and p.ndim == 3]
    assert len(convolutions) == (kind == "convolution")
    save_adapter(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, FILE}
    loaded = load_adapter(make(), tmp_path, is_trainable=True)
    assert check_trainable(loaded) == check_trainable(model)
    assert torch.equal(logits(loaded.eval()), logits(model))
    alone = PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    assert torch.equal(logits(alone), logits(model))
    assert not torch.equal(logits(make()), logits(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == (kind == "rslora", kind == "dora")


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


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    return lambda folder: tensors(change, WEIGHTS)(folder, folder)


def added(**shapes: tuple[int, ...]) -> Change:
    """More weights, of these shapes."""
    more = {f"base_model.model.model.{n}.weight": torch.ones(shape) for n, shape in shapes.items()}
    return weights(lambda found: found.update(more))


def value(part: str, number: float) -> Change:
    """Another value in the first weight with `part` in its name."""

    def change(found: dict[str, torch.Tensor]) -> None:
        next(tensor for name, tensor in found.items() if part in name)[-1, 1] = number

    return weights(change)


UP0, UP = (f"layers.{layer}.mlp.up_proj.lora_" for layer in (0, 7))
WRONG: list[tuple[Change, str]] = [
    (lambda folder: (folder / WEIGHTS).write_bytes(b"cut short"), rf"{WEIGHTS} cannot be read"),
    (lambda folder: (folder / WEIGHTS).unlink(), rf"has no {WEIGHTS}"),
    (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        r"\.bin\).*can run code",
    ),
    (lambda folder: (folder / CONFIG).unlink(), rf"has no {CONFIG}"),
    (lambda folder: (folder / CONFIG).write_text("{"), rf"{CONFIG}.* cannot be read"),
    (lambda folder: (folder / CONFIG).write_text("[]"), f"{CONFIG} is not a mapping"),
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
    (added(**{f"{UP}A": (2, 64), f"{UP}B": (128, 2)}), "2 weights differ.*layers.7.mlp"),
    (
        added(**{f"{UP0}A": (2, 48)}),
        r"does not fit Llama(?s:.*)0.mlp.up_proj.lora_A(?s:(?=.*\[2, 64\])(?=.*\[2, 48\]))",
    ),
    (
        weights(lambda found: found.pop(next(n for n in found if "lora_A" in n))),
        r"lora_B\.weight has no matching lora_A",
    ),
    (added(embed_tokens=(260, 64)), "embed_tokens.*save_embedding_layers=False"),
    (added(**{"layers.0.input_layernorm": (64,)}), "input_layernorm.weight would replace"),
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
    save_adapter(model, tmp_path / "both")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"one", "two"}
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
    with pytest.raises(SourceError, match="LlamaForCausalLM has no adapter to save"):
        save_adapter(base(), tmp_path / "none")


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
    with pytest.raises(SourceError, match="neither a folder nor a hub id"):
        check_existing("nothing/here/at all")


def adapted(model: PreTrainedModel) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(qwen3(), folder, byte_tokenizer(), source="here")
    return folder


def step(model: Any, everything: bool = True) -> None:
    """One step of an optimizer, which was given every parameter, frozen or not."""
    if everything:
        model.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(p for p in model.parameters() if p.requires_grad).step()


def replace_layer(model: Any) -> None:
    model.get_base_model().model.layers[0].mlp.up_proj = nn.Linear(64, 128, bias=False)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an optimizer": (step, r".*lm_head\.weight"),
    "a norm": (lambda m: m.get_base_model().model.norm.weight.data.mul_(2), "model.norm.weight"),
    "a new layer": (replace_layer, "model.layers.0.mlp.up_proj.weight"),
    "casting back": (lambda m: m.to(torch.bfloat16).to(torch.float32), r".*lm_head\.weight"),
}


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        *((how, None) for how in CHANGES),
        *(("an optimizer", dtype) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_refuses_a_base_that_was_changed(
    how: str, dtype: torch.dtype | None, folder: Path, tmp_path: Path
) -> None:
    """The base was quantized in this process, or loaded from a folder in a given type."""
    change, names = CHANGES[how]
    model = adapted(load_base(folder, dtype) if dtype else qwen3())
    save_adapter(model, tmp_path / "before")
    change(model)
    with pytest.raises(FingerprintError, match=rf"of the base changed.*: {names}"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    load_adapter(load_base(folder, dtype or torch.float32), tmp_path / "before")


def test_what_does_not_change_the_base_is_saved(tmp_path: Path) -> None:
    model = adapted(qwen3())
    compiled = torch.compile(model, backend="eager")
    assert fingerprint(compiled) == fingerprint(qwen3())
    step(model, everything=False)
    save_adapter(compiled, tmp_path / "compiled")
    save_adapter(model.to(torch.bfloat16), tmp_path / "cast")  # type: ignore[arg-type]
    load_adapter(qwen3(), tmp_path / "compiled")


def test_saving_a_changed_base_makes_it_a_new_base(tmp_path: Path) -> None:
    model = qwen3()
    model.model.norm.weight.data.mul_(2)
    save_base(model, tmp_path, byte_tokenizer(), source="here")
    save_adapter(adapted(model), tmp_path / "adapter")
    load_adapter(load_base(tmp_path), tmp_path / "adapter")
