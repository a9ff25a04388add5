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

from conftest import ARCHITECTURES, byte_tokenizer, reseal, tiny_model
from formats.models import edit_json, edit_tensors, read_floats, read_integers
from qwlora import PerChannel, Scheme, fingerprint, load_base, quantize_, save_base
from qwlora.errors import FingerprintError, GridError, SourceError
from qwlora.formats.base_files import BaseCheckpoint, BaseWriter
from qwlora.formats.checkpoint import empty_model
from qwlora.formats.huggingface.model_config import read_config
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.scheme import parse_scheme
from qwlora.nn.fingerprint import base_settings, combined_fingerprint, tensor_digest
from qwlora.quantize.layer_rules import LayerRule

IDS = torch.arange(40).view(2, 20)
LAYER = "model.layers.0.mlp.up_proj"
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


GRIDS = [Scheme(3, False, PerChannel(0))]
GRIDS += map(parse_scheme, ("w4-block32", "w4-lpbq16", "w4-signed16"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scheme", GRIDS, ids=str)
def test_base_on_disk_is_the_same_base(tmp_path: Path, architecture: str, scheme: Scheme) -> None:
    model = quantized(tiny_model(architecture), scheme)
    identity = saved(model, tmp_path)
    loaded = load_base(tmp_path)
    assert fingerprint(loaded) == fingerprint(model) == identity
    assert not any(p.requires_grad for p in loaded.parameters())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert set(loaded.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


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
    with torch.no_grad():
        assert torch.equal(load_base(folder)(IDS).logits, model(IDS).logits)
    exact = BaseWriter(tmp_path_factory.mktemp("exact"), shard_bytes=sum(map(sum, sizes)))
    exact.add(model)
    exact.finish(model, None, "somewhere")
    assert [p.name for p in exact.folder.glob("*.safetensors*")] == ["base.safetensors"]
    saved(model, folder)  # nothing of the older, larger base remains
    assert [p.name for p in folder.glob("*.safetensors*")] == ["base.safetensors"]
    assert fingerprint(load_base(folder)) == fingerprint(model)


def test_a_narrower_type_keeps_grid_frequencies_and_fingerprint(base: Path) -> None:
    model, narrow = load_base(base), load_base(base, dtype=torch.bfloat16)
    assert narrow.dtype == narrow(IDS).logits.dtype == torch.bfloat16
    assert fingerprint(narrow) == fingerprint(model)
    scales = [m.get_submodule(LAYER).encoding.scale for m in (narrow, model)]
    assert torch.equal(*scales)
    assert torch.equal(narrow.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    wrapped = get_peft_model(narrow, LoraConfig(r=2, target_modules="all-linear"))
    assert fingerprint(wrapped) == fingerprint(model)
    narrow.model.norm.weight.data[0] += 1
    assert fingerprint(wrapped) != fingerprint(model)


def test_a_packed_embedding_gives_the_type_that_was_asked_for(mixed: Path) -> None:
    narrow: Any = load_base(mixed, dtype=torch.bfloat16)
    assert narrow.model.embed_tokens(IDS).dtype == narrow(IDS).logits.dtype == torch.bfloat16
    assert fingerprint(narrow) == fingerprint(load_base(mixed))


def test_floats_that_were_narrow_are_stored_narrow_and_come_back_exact(tmp_path: Path) -> None:
    model, name = quantized(tiny_model("llama").bfloat16().float()), "model.embed_tokens.weight"
    saved(model, tmp_path)
    stored, loaded = load_file(tmp_path / "base.safetensors"), load_base(tmp_path)
    assert stored[name].element_size() == 2
    assert loaded.get_parameter(name).dtype == torch.float32
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))


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
    facts = rf"{PACKED} changed after saving: .* in base.json. Copy it again, or quantize"
    for load in (lambda: load_base(base), lambda: checkpoint.read(f"{LAYER}.weight")):
        with pytest.raises(FingerprintError, match=facts):
            load()
    edit_tensors(base / "base.safetensors", {PACKED: packed})
    edit_json(base / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(FingerprintError, match=r": config.json changed .* quantize again"):
        load_base(base)
    reseal(base, "base.json")
    with pytest.raises(FingerprintError, match=r"rms_norm_eps: default -> "):
        load_base(base)
    edit_record(base, lambda record: record.update(configuration="{"))
    with pytest.raises(SourceError, match=r"configuration in base\.json is not JSON"):
        load_base(base)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (PACKED, torch.flatten, rf"{PACKED} is uint8 \[4096\], not uint8 \[128, 32\]"),
        (PACKED, torch.Tensor.short, rf"{PACKED} is int16 \[128, 32\], not uint8 \[128, 32\]"),
        ("model.norm.weight", lambda t: None, "model.norm.weight is missing"),
        ("../../outside", lambda t: torch.zeros(2), "../../outside is not in the model"),
    ],
)
def test_tensors_of_another_kind_are_named_before_any_is_read(
    base: Path, name: str, change: Any, message: str
) -> None:
    path = base / "base.safetensors"
    edit_tensors(path, {name: change(load_file(path).get(name))})
    with pytest.raises(SourceError, match=message):
        load_base(base)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scales_are_named_though_fingerprints_agree(base: Path, scale: float) -> None:
    scales = load_file(base / "base.safetensors")[f"{LAYER}.scale"]
    scales.view(-1)[3] = scale
    edit_tensors(base / "base.safetensors", {f"{LAYER}.scale": scales})
    resign(base)
    facts = rf"layer .{LAYER}. of base.json: a scale is .* positive.*, but 1 of .*quantize again"
    for load in (lambda: load_base(base), lambda: BaseCheckpoint(base).read(f"{LAYER}.weight")):
        with pytest.raises(GridError, match=facts):
            load()


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
        ("../../../etc/passwd", {}),
        ("", {}),
        ("model.layers.7.mlp.up_proj", {}),
        ("model.norm", {}),
        (LAYER, {"bitwidth": 999}),
        (LAYER, {"bitwidth": 4.0}),
        (LAYER, {"bitwidth": "4"}),
        (LAYER, {"bitwidth": 16}),
        (LAYER, {"block_size": 10**12}),
        (LAYER, {"block_size": 0}),
        (LAYER, {"block_size": -32}),
        (LAYER, {"block_size": None, "axis": 5}),
        (LAYER, {"symmetric": "no"}),
        (LAYER, {"scale_bitwidth": 10**9}),
        (LAYER, {"shape": [128, -64]}),
        (LAYER, {"shape": [2**30, 2**30, 64]}),
        (LAYER, {"shape": [10**30, 64]}),
        (LAYER, {"shape": [], "block_size": None, "axis": None}),
        (LAYER, {"kind": []}),
        (LAYER, 7),
        (LAYER, []),
    ],
    ids=str,
)
def test_absurd_layers_are_refused_by_name(base: Path, name: str, layer: Any) -> None:
    def change(record: dict[str, Any]) -> None:
        layers = record["layers"]
        layers[name] = {**layers[LAYER], **layer} if isinstance(layer, dict) else layer

    edit_record(base, change)
    facts = rf"layer '{name}' of base.json: .*; quantize again|the offset"
    with pytest.raises((GridError, SourceError), match=facts):
        load_base(base)


def test_an_absurd_layer_is_refused_before_tensors_are_read(base: Path) -> None:
    edit_record(base, lambda record: record["layers"][LAYER].update(block_size=10**12))
    with pytest.raises(GridError, match=rf"layer '{LAYER}' of base\.json"):
        BaseCheckpoint(base)


def test_a_pipe_in_the_folder_is_refused(base: Path) -> None:
    os.mkfifo(base / "processor_config.json")
    with pytest.raises(SourceError, match=r"processor_config\.json' is a pipe"):
        load_base(base)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoSuchModel", "is of class 'NoSuchModel', which the installed diffusers does not have"),
        ("DDPMScheduler", "is of class 'DDPMScheduler', which"),  # no module
        ("logging", "is of class 'logging', which"),  # no class
        (3, "is of class 3, which"),
        ("AutoencoderKL", "diffusers cannot build a AutoencoderKL from config.json"),
    ],
)
def test_a_model_of_diffusers_that_cannot_be_built(base: Path, name: Any, message: str) -> None:
    edit_json(base / "config.json", in_channels="three")
    edit_record(base, lambda record: record.update({"library": "diffusers", "class": name}))
    with pytest.raises(SourceError, match=message):
        load_base(base)


def test_diffusers_is_not_installed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_record(base, lambda record: record.update({"library": "diffusers"}))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SourceError, match=r"which cannot be imported.*pip install diffusers"):
        load_base(base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "has format 1, but this version reads 4; quantize again, with the same"),
        ({"format": None}, "has format None"),
        ({"layers": [], "source": 3}, "in base.json: source and layers"),
        ("[]", "is not a JSON object"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (None, "is not a QWLoRA base"),
    ],
)
def test_base_json_itself(base: Path, changes: Any, message: str) -> None:
    if isinstance(changes, dict):
        edit_json(base / "base.json", **changes)
    elif changes is None:
        (base / "base.json").unlink()
    else:
        (base / "base.json").write_text(changes)
    with pytest.raises(SourceError, match=message):
        load_base(base)


ABSURD = {"num_hidden_layers": 10**7, "hidden_size": -1, "vocab_size": "many"}
ABSURD |= {"model_type": "nothing", "num_attention_heads": 0, "hidden_act": "explode"}


@pytest.mark.parametrize("key", ABSURD)
def test_an_absurd_configuration_costs_nothing(base: Path, key: str) -> None:
    edit_json(base / "config.json", **{key: ABSURD[key]})
    reseal(base, "base.json")
    with pytest.raises(SourceError, match=r"config.json"):
        load_base(base)


RULES = [
    LayerRule("*.q_proj", parse_scheme("w3-block32-asymmetric")),
    LayerRule("*.up_proj", parse_scheme("w4-lpbq16")),
    LayerRule("*.v_proj", None),
    LayerRule("*.k_proj", parse_scheme("w8-channel")),
    LayerRule("model.embed_tokens", parse_scheme("w6-signed8")),
]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A base with a grid of every kind, to be read as a `Checkpoint`."""
    saved(quantized(rules=RULES), tmp_path)
    return tmp_path


def test_the_same_base_comes_out(mixed: Path) -> None:
    checkpoint, expected = open_checkpoint(mixed), load_base(mixed)
    assert isinstance(checkpoint, BaseCheckpoint)
    found = load_precomputed(checkpoint)
    assert fingerprint(found) == fingerprint(expected)
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
    read_integers(checkpoint, f"{LAYER}.weight")
    assert checkpoint.schemes()[f"{LAYER}.weight"] == (parse_scheme("w4-lpbq16"), (128, 64))
    read_floats(checkpoint, "model.layers.0.self_attn.v_proj.weight")


def test_parts_that_do_not_fit_are_named(mixed: Path) -> None:
    path, name = mixed / "base.safetensors", f"{LAYER}.block_scale"
    block_scale = load_file(path)[name]
    edit_tensors(path, {name: None})
    facts = rf"{name} is missing, but int4 .* with int4 scales needs \[128, 2\]; quantize"
    with pytest.raises(SourceError, match=facts):
        BaseCheckpoint(mixed).read(f"{LAYER}.weight")
    edit_tensors(path, {name: block_scale})
    edit_record(mixed, lambda record: record["layers"][LAYER].update(shape=[128, 32]))
    with pytest.raises(SourceError, match=rf"{PACKED} is \[128, 32\], but .* needs \[128, 16\]"):
        BaseCheckpoint(mixed).read(f"{LAYER}.weight")
    facts = rf"'{LAYER}' of base\.json: its shape is \[128, 32\], not \[128, 64\]"
    with pytest.raises(GridError, match=facts):
        load_base(mixed)


def test_names_and_encodings_that_there_are_none_of(mixed: Path) -> None:
    with pytest.raises(SourceError, match="there is no tensor 'other'"):
        BaseCheckpoint(mixed).read("other")
    with pytest.raises(SourceError, match=r"is quantized already \(a base\)"):
        open_checkpoint(mixed, encodings="x")
