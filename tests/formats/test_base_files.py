"""A saved base loads identically: from shards, in other dtypes, of any module. Damage is reported, and
what cannot be saved is refused before an older base goes."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import ARCHITECTURES, byte_tokenizer, packed_model, reseal, tiny_model
from formats.models import edit_json, edit_tensors, logits, mixtral
from qwlora import (
    LayerRule,
    PerChannel,
    Scheme,
    fingerprint,
    load_adapter,
    load_base,
    quantize_,
    save_adapter,
    save_base,
)
from qwlora.errors import CalibrationError, FingerprintError, GridError, QwloraWarning, SourceError
from qwlora.formats.base_files import BaseCheckpoint, BaseWriter, replacing_base
from qwlora.formats.checkpoint import empty_model
from qwlora.formats.huggingface.model_config import read_config
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.scheme import parse_scheme
from qwlora.nn import is_packed
from qwlora.nn.fingerprint import base_settings, combined_fingerprint, tensor_digest
from qwlora.nn.packed_layer import packed_layers
from simulation.tiny_architectures import make

LAYER = "model.layers.0.mlp.up_proj"
LOADERS = (load_base, AutoModelForCausalLM.from_pretrained)
PACKED = f"{LAYER}.packed"


def quantized(model: Any = None, scheme: Any = "w4-block32", rules: Any = ()) -> Any:
    model = model or tiny_model("llama")
    quantize_(model, scheme, "rtn", rules=rules)
    return model


def saved(model: Any, folder: Path) -> str:
    return save_base(model, folder, byte_tokenizer(), source="somewhere")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    saved(quantized(), tmp_path)
    return tmp_path


RULES = [
    LayerRule("*.q_proj", parse_scheme("w3-block32-asymmetric")),
    LayerRule("*.up_proj", parse_scheme("w4-lpbq16")),
    LayerRule("*.v_proj", None),
    LayerRule("*.k_proj", parse_scheme("w8-channel")),
    LayerRule("model.embed_tokens", parse_scheme("w6-signed8")),
]
EMBEDDED = [LayerRule("*embed_tokens", parse_scheme("w4-block32"))]
BASES: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: quantized(tiny_model(name)) for name in ARCHITECTURES},
    "channels": lambda: quantized(scheme=Scheme(3, False, PerChannel(0))),
    "a grid of every kind": lambda: quantized(rules=RULES),
    "experts": lambda: quantized(mixtral(vocab_size=260)),
    # Gemma keeps the factor of its embedding in a buffer
    "scaled embedding": lambda: quantized(make("Gemma 3"), rules=EMBEDDED),
    "bfloat16": lambda: quantized(tiny_model("llama").bfloat16(), rules=EMBEDDED),
}


@pytest.mark.parametrize("name", BASES)
def test_base_on_disk_is_the_same_base_to_every_reader(tmp_path: Path, name: str) -> None:
    model = BASES[name]()
    identity = saved(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, BaseCheckpoint)
    readers = [
        load_base(tmp_path, model.dtype),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        load_precomputed(checkpoint),
    ]
    expected = logits(model)
    if name == "bfloat16":  # casting rounded the frequencies of positions; a base has them exact
        expected = logits(readers[0])
        readers.pop()
    for loaded in readers:
        assert fingerprint(loaded) == fingerprint(model) == identity
        assert packed_layers(loaded).keys() == packed_layers(model).keys()
        assert set(loaded.state_dict()) == set(model.state_dict())
        assert not any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(logits(loaded), expected)
    narrow = load_base(tmp_path, torch.bfloat16)
    assert narrow.dtype == logits(narrow).dtype == torch.bfloat16
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)), logits(narrow)
    )
    assert fingerprint(narrow) == identity


def test_a_large_base_has_shards(base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, folder = load_base(base), tmp_path_factory.mktemp("shards")
    writer = BaseWriter(folder, shard_bytes=20_000)
    writer.add(model)
    assert writer.finish(model, byte_tokenizer(), "somewhere") == fingerprint(model)
    shards = sorted(folder.glob("base-*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == "base-00001.safetensors"
    sizes = [[tensor.nbytes for tensor in load_file(shard).values()] for shard in shards]
    assert all(len(shard) == 1 or 0 < sum(shard) <= 20_000 for shard in sizes)
    index = json.loads((folder / "base.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    with safe_open(shards[0], "pt") as shard:
        assert shard.metadata() == {"format": "pt"}  # some readers insist on it
    assert torch.equal(logits(load_base(folder)), logits(model))
    for device_map in (None, "auto", {"": "cpu"}):
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
        assert torch.equal(logits(loaded), logits(model))
    exact = BaseWriter(tmp_path_factory.mktemp("exact"), shard_bytes=sum(map(sum, sizes)))
    exact.add(model)
    exact.finish(model, None, "somewhere")
    saved(model, folder)  # nothing of the older, larger base remains
    for place in (exact.folder, folder):
        assert [p.name for p in place.glob("*.safetensors*")] == ["base.safetensors"]
        assert fingerprint(load_base(place)) == fingerprint(model)


def test_a_narrower_type_keeps_grid_frequencies_and_fingerprint(base: Path, tmp_path: Path) -> None:
    model, narrow = load_base(base), load_base(base, dtype=torch.bfloat16)
    scales = [m.get_submodule(LAYER).encoding.scale for m in (narrow, model)]
    assert torch.equal(*scales)
    assert torch.equal(narrow.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    wrapped = get_peft_model(narrow, LoraConfig(r=2, target_modules="all-linear"))
    assert fingerprint(wrapped) == fingerprint(model)
    narrow.model.norm.weight.data[0] += 1
    assert fingerprint(wrapped) != fingerprint(model)
    # saved, it is another base: the one in the folder
    other = load_base(base, dtype=torch.bfloat16)
    other.model.embed_tokens.weight.data.mul_(1.5)
    identity = saved(other, tmp_path / "narrow")
    assert identity == fingerprint(other) != fingerprint(model)
    name, loaded = "model.embed_tokens.weight", load_base(tmp_path / "narrow", torch.float32)
    assert load_file(tmp_path / "narrow" / "base.safetensors")[name].element_size() == 2
    assert loaded.get_parameter(name).dtype == torch.float32
    assert torch.equal(loaded.get_parameter(name), other.get_parameter(name).float())


def test_the_files_are_mapped_not_copied(base: Path) -> None:
    layer, file = load_base(base).get_submodule(LAYER), str(base / "base.safetensors")
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in lines if line.endswith(file)]
    spans = [[int(edge, 16) for edge in edges] for edges in mapped]
    assert any(low <= layer.packed.data_ptr() < high for low, high in spans)


def edit_record(folder: Path, **changes: Any) -> None:
    """Change base.json, whose digest then agrees."""
    edit_json(folder / "base.json", **changes)
    reseal(folder, "base.json")


def test_a_changed_tensor_or_configuration_is_named(base: Path) -> None:
    packed = load_file(base / "base.safetensors")[PACKED]
    edit_tensors(base / "base.safetensors", {PACKED: packed ^ 1})
    checkpoint = BaseCheckpoint(base)
    checkpoint.read("model.layers.1.mlp.up_proj.weight")
    for load in (*LOADERS, lambda _: checkpoint.read(f"{LAYER}.weight")):
        with pytest.raises(FingerprintError, match=f"{PACKED} changed after saving"):
            load(base)
    edit_tensors(base / "base.safetensors", {PACKED: packed})
    changes = {"tokenizer.json": {"version": "2"}, "config.json": {"rms_norm_eps": 1e-3}}
    for file, change in changes.items():
        edit_json(base / file, **change)
        for load in (*LOADERS, BaseCheckpoint):
            with pytest.raises(FingerprintError, match=rf"{file}.* changed .* quantize again"):
                load(base)
    reseal(base, "base.json")
    with pytest.raises(FingerprintError, match=r"rms_norm_eps: default -> "):
        load_base(base)
    edit_record(base, configuration="{")
    with pytest.raises(SourceError, match=r"configuration in base\.json is not JSON"):
        load_base(base)


def test_parts_that_do_not_fit_are_named_when_they_are_read(tmp_path: Path) -> None:
    saved(quantized(rules=RULES), tmp_path)
    scale_of(0.0)(tmp_path)
    with pytest.raises(GridError, match=f"layer '{LAYER}' of base.json: a scale is "):
        BaseCheckpoint(tmp_path).read(f"{LAYER}.weight")
    edit_tensors(tmp_path / "base.safetensors", {f"{LAYER}.block_scale": None})
    with pytest.raises(SourceError, match=rf"{LAYER}.block_scale is missing.* needs \[128, 2\]"):
        BaseCheckpoint(tmp_path).read(f"{LAYER}.weight")
    with pytest.raises(SourceError, match="there is no tensor 'other'"):
        BaseCheckpoint(tmp_path).read("other")
    with pytest.raises(SourceError, match=r"is quantized already \(a base\)"):
        open_checkpoint(tmp_path, encodings="x")
    layer_of({"block_size": 10**12})(tmp_path)
    with pytest.raises(GridError, match=f"'{LAYER}' of base.json"):
        BaseCheckpoint(tmp_path)  # before tensors are read


def resign(folder: Path) -> None:
    """Make base.json agree with the tensors there are."""
    layers = json.loads((folder / "base.json").read_text())["layers"]
    layouts = {path: Scheme.from_json(layer).to_text() for path, layer in layers.items()}
    digests = {
        name: tensor_digest(name, layouts.get(name.rpartition(".")[0], ""), tensor)
        for name, tensor in load_file(folder / "base.safetensors").items()
    }
    numbers = base_settings(empty_model(read_config(folder)))
    identity = combined_fingerprint(digests, numbers)
    edit_record(folder, fingerprint=identity, tensors=digests)


Damage = Callable[[Path], Any]


def tensor_of(name: str, change: Callable[[Any], Any]) -> Damage:
    """Changes a stored tensor, and base.json so that fingerprints agree."""

    def damage(folder: Path) -> None:
        path = folder / "base.safetensors"
        edit_tensors(path, {name: change(load_file(path).get(name))})
        resign(folder)

    return damage


def scale_of(value: float) -> Damage:
    index = torch.tensor(3)
    return tensor_of(f"{LAYER}.scale", lambda s: s.flatten().index_fill(0, index, value).view_as(s))


def record_of(**changes: Any) -> Damage:
    return lambda folder: edit_record(folder, **changes)


def layer_of(layer: Any, name: str = LAYER) -> Damage:
    """Changes what base.json says of a layer."""

    def damage(folder: Path) -> None:
        layers = json.loads((folder / "base.json").read_text())["layers"]
        layers[name] = {**layers[LAYER], **layer} if isinstance(layer, dict) else layer
        edit_record(folder, layers=layers)

    return damage


def configuration_of(record: dict[str, Any] | None = None, **changes: Any) -> Damage:
    """Changes config.json, and base.json by `record`."""

    def damage(folder: Path) -> None:
        edit_json(folder / "config.json", **changes)
        edit_record(folder, **(record or {}))

    return damage


AUTOENCODER = {"library": "diffusers", "class": "AutoencoderKL"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_json(f / "base.json", format=1), "has format 1, but this version reads 4"),
        (record_of(layers=[], source=3), "in base.json: source and layers"),
        (lambda f: (f / "base.json").write_text("[]"), "is not a JSON object"),
        (lambda f: (f / "base.json").write_text("[" * 100_000), "cannot be read"),
        (lambda f: (f / "base.json").unlink(), "is not a QWLoRA base"),
        (lambda f: os.mkfifo(f / "processor_config.json"), r"processor_config\.json' is a pipe"),
        (configuration_of(hidden_size=-1), "config.json"),
        (configuration_of(vocab_size="many"), "config.json"),
        (configuration_of(hidden_act="explode"), "config.json"),
        # tensors
        (tensor_of(PACKED, torch.flatten), rf"{PACKED} is uint8 \[4096\], not uint8 \[128, 32\]"),
        (tensor_of(PACKED, torch.Tensor.short), rf"{PACKED} is int16 \[128, 32\], not uint8"),
        (tensor_of("model.norm.weight", lambda _: None), "model.norm.weight is missing"),
        (tensor_of("../../out", lambda _: torch.zeros(2)), "../../out is not in the model"),
        *(
            (scale_of(value), f"layer '{LAYER}' of base.json: a scale is ")
            for value in (0.0, -1.0, float("nan"), float("inf"))
        ),
        # layers of base.json
        *(
            (layer_of({}, name), f"layer '{name}' of base.json")
            for name in ("../../../etc/passwd", "", "model.layers.7.mlp.up_proj", "model.norm")
        ),
        *(
            (layer_of(layer), f"'{LAYER}' of base.json: .*|the offset")
            for layer in (
                *({"bitwidth": bits} for bits in (999, "4", 16)),
                *({"block_size": size} for size in (10**12, -32)),
                {"block_size": None, "axis": 5},
                {"symmetric": "no"},
                {"scale_bitwidth": 10**9},
                *({"shape": shape} for shape in ([128, 32], [128, -64], [2**30, 2**30, 64])),
                {"shape": [], "block_size": None, "axis": None},
                {"kind": []},
                *(7, []),
            )
        ),
        # classes of diffusers: unknown, no module, no class, one that fails
        *(
            (record_of(library="diffusers", **{"class": name}), f"is of class {name!r}")
            for name in ("NoSuchModel", "DDPMScheduler", "logging", 3)
        ),
        (configuration_of(AUTOENCODER, in_channels="three"), "cannot build a AutoencoderKL from"),
    ],
)
def test_damage_is_named(base: Path, damage: Damage, message: str) -> None:
    damage(base)
    with pytest.raises((GridError, SourceError), match=message):
        load_base(base)


def test_diffusers_is_asked_for(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_of(library="diffusers")(base)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SourceError, match="pip install diffusers"):
        load_base(base)


X = torch.linspace(-1, 1, 2 * 32).view(2, 32)


class Row(nn.Module):
    """Two linear layers around something of the test's."""

    def __init__(self, middle: nn.Module | None = None, last: float = 1e-5):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.middle = middle or nn.Identity()
        self.norm = nn.LayerNorm(32, eps=last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.last(torch.tanh(self.middle(self.first(x)))))


class Inside(nn.Module):
    """A part that is called like one of PEFT's, and a parameter of the same name as the part's."""

    def __init__(self, name: str):
        super().__init__()
        self.add_module(name, nn.Linear(32, 32))
        self.part, self.bias = name, nn.Parameter(torch.ones(32) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.part)(x) + self.bias


class Diffuser(Row):
    """Looks like a class of diffusers."""

    __module__ = "diffusers.models"

    def save_config(self, folder: Path) -> None:
        raise AssertionError


class OwnDiffuser(Diffuser):
    """Its code is not in diffusers, so only the caller can build it."""


class Odd(nn.Module):
    """A layer under two names, values that parameters share without being one, strides, float64, a
    3-D parameter of the module that is saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.last = (nn.Linear(32, 32) for _ in range(3))
        self.again = self.one
        self.mix = nn.Parameter(torch.randn(3, 32, 32) / 6)
        self.two.weight = nn.Parameter(self.one.weight.data)
        row = torch.randn(64)
        self.between = nn.Parameter(row[16:48])
        self.one.bias, self.two.bias = nn.Parameter(row[:32]), nn.Parameter(row[32:])
        self.last.bias = nn.Parameter(torch.ones(1).expand(32))
        self.register_buffer("mean", torch.full((64,), 0.1, dtype=torch.float64)[::2])
        self.register_buffer("order", torch.arange(32).flip(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x * self.between - self.mean.float())[..., self.order] @ self.mix.sum(0)
        return self.last(torch.tanh(self.again(self.two(torch.tanh(self.one(x))))))


MODELS: dict[str, tuple[Any, list[Any]]] = {
    "a layer called lora_head": (lambda: Row(Inside("lora_head")), []),
    "a part called base_layer": (lambda: Row(Inside("base_layer")), []),
    "a part called original_module": (lambda: Row(Inside("original_module")), []),
    "data parallelism": (lambda: nn.DataParallel(Row()), []),
    "odd, packed": (Odd, []),
    "odd, mostly float": (Odd, [LayerRule(name, None) for name in ("one", "two", "mix")]),
    "a subclass of a model of diffusers": (OwnDiffuser, []),
}


@pytest.mark.parametrize(("make", "rules"), MODELS.values(), ids=MODELS)
def test_what_is_saved_is_loaded(make: Any, rules: Any, tmp_path: Path) -> None:
    model = quantized(make().eval(), "w4-block16", rules)
    identity = save_base(model, str(tmp_path / "base"))
    loaded = load_base(tmp_path / "base", model=getattr(make(), "module", make()))
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))
    assert fingerprint(loaded) == fingerprint(model) == identity
    assert not hasattr(loaded, "save_pretrained")
    inner = getattr(model, "module", model)
    target = next(n for n, m in inner.named_modules() if isinstance(m, nn.Linear))
    config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    trained = get_peft_model(inner, config).eval()
    save_adapter(trained, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(load_adapter(loaded, tmp_path / "adapter")(X), trained(X))


def test_a_float_model_with_other_settings_is_refused(tmp_path: Path) -> None:
    def build(last: float = 1e-5) -> Row:
        model = Row(last=last).eval()
        model.register_buffer("order", torch.arange(32), persistent=False)
        return model

    model = quantized(build(), "w4-block16")
    save_base(model, tmp_path)
    with pytest.raises(FingerprintError, match=r"norm\.eps: default -> 0\.5"):
        load_base(tmp_path, model=build(0.5))
    with pytest.raises(SourceError, match="is a Row that cannot be built"):
        load_base(tmp_path)
    # a buffer that is not saved needs data in the float model
    assert torch.equal(load_base(tmp_path, model=build()).order, model.order)
    with torch.device("meta"):
        empty = build()
    with pytest.raises(SourceError, match="order are on the meta device"):
        load_base(tmp_path, model=empty)


without_bias = partial(nn.Linear, bias=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda m: m.add_module("extra", nn.Linear(4, 4)), "extra.bias is not in the model"),
        (lambda m: m.model.norm.add_module("inner", without_bias(64, 64)), r"model\.norm\.inner'"),
        (lambda m: m.model.layers.__delitem__(1), "layers.1.input_layernorm.weight is missing"),
    ],
)
def test_a_model_unlike_its_configuration_needs_the_float_model(change, fact, tmp_path) -> None:
    model, floats = tiny_model("llama"), tiny_model("llama")
    change(model), change(floats)
    quantize_(model, "w4-block4", "rtn")
    with pytest.warns(QwloraWarning, match=fact):
        identity = save_base(model, tmp_path)
    with pytest.raises(SourceError, match="a LlamaForCausalLM that cannot be built"):
        load_base(tmp_path)
    assert fingerprint(load_base(tmp_path, model=floats)) == identity


def test_a_base_that_is_refused_leaves_the_old_one(tmp_path: Path) -> None:
    save_base(packed_model("llama"), tmp_path / "old", byte_tokenizer())
    before, bad = files(tmp_path), tiny_model("llama")
    with pytest.raises(GridError, match="has no packed layer"):
        save_base(bad, tmp_path / "old")
    quantize_(bad, "w3-block32", "rtn")
    bad.model.norm.weight.data[3] = torch.nan
    for folder in ("old", "new/below"):
        with pytest.raises(CalibrationError, match=r"model\.norm\.weight contains 1 values"):
            save_base(bad, tmp_path / folder)
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_base_over_another_leaves_nothing_of_it(tmp_path: Path) -> None:
    first, second = packed_model("llama"), packed_model("llama", layers=1)
    save_base(first, tmp_path, byte_tokenizer())
    for name in ("README.md", "base-lora.safetensors"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "base-00007.safetensors").write_text("of a larger one")
    old = set(files(tmp_path))
    save_base(second, tmp_path)
    tokenizer = {name for name in old if "token" in name}
    assert tokenizer
    assert set(files(tmp_path)) == old - tokenizer - {"base-00007.safetensors"}
    assert (tmp_path / "base-lora.safetensors").read_text() == "mine"
    assert fingerprint(load_base(tmp_path)) == fingerprint(second)
    with replacing_base(tmp_path, shard_bytes=20_000) as writer:
        writer.add(first)
        writer.finish(first, None, "x")
    assert not (tmp_path / "base.safetensors").exists()
    assert fingerprint(load_base(tmp_path)) == fingerprint(first)


def test_nothing_of_others_is_deleted(tmp_path: Path) -> None:
    """Where no base was, and where a stranger's record lists what is none of a base."""
    names = ("mine", "base/adapters/mine", "none/base-00001.safetensors")
    mine = [tmp_path / name for name in names]
    for file in (*mine, tmp_path / "none" / "base.safetensors.index.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    record = {"files": dict.fromkeys(("adapters", ".", "../mine", str(mine[0])))}
    (tmp_path / "base" / "base.json").write_text(json.dumps(record))
    for folder in ("base", "none"):
        save_base(packed_model("llama"), tmp_path / folder)
    assert [file.read_text() for file in mine] == ["mine"] * 3


def test_a_record_is_the_same_in_whatever_order_modules_are_written(tmp_path: Path) -> None:
    model = quantized(mixtral(), "w4-block16")
    names = [name for name, _ in model.model.named_children()]
    for folder, order in (("a", names), ("b", names[::-1])):
        with replacing_base(tmp_path / folder) as writer:
            for name in order:
                writer.add(model.model.get_submodule(name), f"model.{name}")
            writer.add(model.lm_head, "lm_head")
            writer.finish(model, None, "x")
    records = [(tmp_path / folder / "base.json").read_bytes() for folder in "ab"]
    assert records[0] == records[1]
    layers = list(json.loads(records[0])["layers"])
    assert layers == [p for p, m in model.named_modules() if is_packed(m)]


def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    for seed, folder in enumerate(("a", "b")):
        save_adapter(get_peft_model(packed_model("llama", seed), config), tmp_path / folder)
    model = packed_model("llama")
    with pytest.raises(FingerprintError):
        load_adapter(model, tmp_path / "b")
    adapted = load_adapter(model, tmp_path / "a")
    wanted = logits(adapted)
    with pytest.raises(SourceError, match=r"already has an adapter called 'default'"):
        load_adapter(adapted, tmp_path / "a")
    with pytest.raises(FingerprintError):
        load_adapter(adapted, tmp_path / "b", adapter_name="b")
    assert list(adapted.peft_config) == ["default"]
    assert torch.equal(logits(adapted), wanted)
