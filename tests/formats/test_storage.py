"""A saved base loads identically, also from shards and in other dtypes; damage is reported."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import ARCHITECTURES, byte_tokenizer, reseal, tiny_model
from formats.models import edit_json, edit_tensors, mixtral
from qwlora import PerChannel, Scheme, fingerprint, load_base, quantize_, save_base
from qwlora.errors import FingerprintError, GridError, SourceError
from qwlora.formats.base_files import BaseCheckpoint, BaseWriter
from qwlora.formats.checkpoint import empty_model
from qwlora.formats.huggingface.model_config import read_config
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.scheme import parse_scheme
from qwlora.nn.fingerprint import base_settings, combined_fingerprint, tensor_digest
from qwlora.nn.packed_layer import packed_layers
from qwlora.quantize.layer_rules import LayerRule
from simulation.tiny_architectures import make

IDS = torch.arange(40).view(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


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


def edit_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / "base.json").read_text())
    change(record)
    (folder / "base.json").write_text(json.dumps(record))
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
    edit_json(base / "config.json", rms_norm_eps=1e-3)
    for load in (*LOADERS, BaseCheckpoint):
        with pytest.raises(FingerprintError, match=r"config.json changed .* quantize again"):
            load(base)
    reseal(base, "base.json")
    with pytest.raises(FingerprintError, match=r"rms_norm_eps: default -> "):
        load_base(base)
    edit_record(base, lambda record: record.update(configuration="{"))
    with pytest.raises(SourceError, match=r"configuration in base\.json is not JSON"):
        load_base(base)


def scale_of(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda scales: scales.flatten().index_fill(0, torch.tensor(3), value).view_as(scales)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (PACKED, torch.flatten, rf"{PACKED} is uint8 \[4096\], not uint8 \[128, 32\]"),
        (PACKED, torch.Tensor.short, rf"{PACKED} is int16 \[128, 32\], not uint8 \[128, 32\]"),
        ("model.norm.weight", lambda t: None, "model.norm.weight is missing"),
        ("../../outside", lambda t: torch.zeros(2), "../../outside is not in the model"),
        *(
            (f"{LAYER}.scale", scale_of(value), rf"layer .{LAYER}. of base.json: a scale is ")
            for value in (0.0, -1.0, float("nan"), float("inf"))
        ),
    ],
)
def test_impossible_tensors_are_named_though_fingerprints_agree(
    base: Path, name: str, change: Any, message: str
) -> None:
    path = base / "base.safetensors"
    edit_tensors(path, {name: change(load_file(path).get(name))})
    resign(base)
    with pytest.raises((GridError, SourceError), match=message):
        load_base(base)
    if name.endswith("scale"):
        with pytest.raises(GridError, match=message):
            BaseCheckpoint(base).read(f"{LAYER}.weight")


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    saved(quantized(rules=RULES), tmp_path)
    edit_tensors(tmp_path / "base.safetensors", {f"{LAYER}.block_scale": None})
    with pytest.raises(SourceError, match=rf"{LAYER}.block_scale is missing.* needs \[128, 2\]"):
        BaseCheckpoint(tmp_path).read(f"{LAYER}.weight")
    with pytest.raises(SourceError, match="there is no tensor 'other'"):
        BaseCheckpoint(tmp_path).read("other")
    with pytest.raises(SourceError, match=r"is quantized already \(a base\)"):
        open_checkpoint(tmp_path, encodings="x")


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
    edit_record(folder, lambda r: r.update(fingerprint=identity, tensors=digests))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *(("../../../etc/passwd", {}), ("", {}), ("model.layers.7.mlp.up_proj", {})),
        ("model.norm", {}),
        *((LAYER, {"bitwidth": bits}) for bits in (999, 4.0, "4", 16)),
        *((LAYER, {"block_size": size}) for size in (10**12, 0, -32)),
        (LAYER, {"block_size": None, "axis": 5}),
        (LAYER, {"symmetric": "no"}),
        (LAYER, {"scale_bitwidth": 10**9}),
        *((LAYER, {"shape": shape}) for shape in ([128, 32], [128, -64], [2**30, 2**30, 64])),
        (LAYER, {"shape": [], "block_size": None, "axis": None}),
        (LAYER, {"kind": []}),
        *((LAYER, 7), (LAYER, [])),
    ],
    ids=str,
)
def test_absurd_layers_are_refused_by_name(base: Path, name: str, layer: Any) -> None:
    def change(record: dict[str, Any]) -> None:
        layers = record["layers"]
        layers[name] = {**layers[LAYER], **layer} if isinstance(layer, dict) else layer

    edit_record(base, change)
    facts = rf"(layer )?'{name}' of base.json: .*|the offset"
    with pytest.raises((GridError, SourceError), match=facts):
        load_base(base)
    if layer == {"block_size": 10**12}:
        with pytest.raises(GridError, match=facts):
            BaseCheckpoint(base)  # before tensors are read


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoSuchModel", "is of class 'NoSuchModel'"),
        ("DDPMScheduler", "is of class 'DDPMScheduler'"),  # no module
        ("logging", "is of class 'logging'"),  # no class
        (3, "is of class 3"),
        ("AutoencoderKL", "diffusers cannot build a AutoencoderKL from config.json"),
        (None, "pip install diffusers"),
    ],
)
def test_a_model_of_diffusers_that_cannot_be_built(
    base: Path, name: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_json(base / "config.json", in_channels="three")
    of_class = {"class": name} if name else {}
    edit_record(base, lambda record: record.update({"library": "diffusers", **of_class}))
    if name is None:
        monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SourceError, match=message):
        load_base(base)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("base.json", {"format": 1}, "has format 1, but this version reads 4"),
        ("base.json", {"format": None}, "has format None"),
        ("base.json", {"layers": [], "source": 3}, "in base.json: source and layers"),
        ("base.json", "[]", "is not a JSON object"),
        ("base.json", "{", "cannot be read"),
        ("base.json", "[" * 100_000, "cannot be read"),
        ("base.json", None, "is not a QWLoRA base"),
        # an absurd configuration costs nothing
        ("config.json", {"num_hidden_layers": 10**7}, "config.json"),
        ("config.json", {"hidden_size": -1}, "config.json"),
        ("config.json", {"vocab_size": "many"}, "config.json"),
        ("config.json", {"model_type": "nothing"}, "config.json"),
        ("config.json", {"num_attention_heads": 0}, "config.json"),
        ("config.json", {"hidden_act": "explode"}, "config.json"),
        ("processor_config.json", os.mkfifo, r"processor_config\.json' is a pipe"),
    ],
)
def test_damaged_json_is_named(base: Path, file: str, changes: Any, message: str) -> None:
    if isinstance(changes, dict):
        edit_json(base / file, **changes)
    elif isinstance(changes, str):
        (base / file).write_text(changes)
    elif changes is None:
        (base / file).unlink()
    else:
        changes(base / file)
    if file == "config.json":
        reseal(base, "base.json")
    with pytest.raises(SourceError, match=message):
        load_base(base)
