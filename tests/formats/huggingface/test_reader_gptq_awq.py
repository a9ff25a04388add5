"""GPTQ and AWQ layers equal what GPT-QModel and AutoAWQ unpack, bit for bit (files/gptq-*, awq-*)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.models import edit_json, edit_tensors, llama, read_integers
from qwlora.errors import SourceError
from qwlora.formats.huggingface.gptq_awq_mlx import QweightTensors
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme, SignedBlock

FILES = Path(__file__).parents[1] / "files"
GPTQ, AWQ = FILES / "gptq-v1", FILES / "awq-gemm-32"
LAYERS = {"gptq": "w4-asymmetric-32", "awq": "layer"}
SETTINGS = {
    "gptq": {"bits": 4, "checkpoint_format": "gptq"},
    "awq": {"bits": 4, "version": "gemm", "group_size": 32},
}


def opened(folder: Path, method: str = "gptq", **settings: Any) -> QweightTensors:
    return QweightTensors(SafetensorsFiles(folder), {**SETTINGS[method], **settings}, method)


def read(folder: Path, method: str = "gptq", name: str = "", **settings: Any) -> QuantizedTensor:
    tensors = opened(folder, method, **settings)
    return read_integers(tensors, f"{name or LAYERS[method]}.weight")


def expected(folder: Path, name: str = LAYERS["gptq"]) -> torch.Tensor:
    return load_file(folder / "expected.safetensors")[f"{name}.weight"]


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 64])
def test_layers_equal_gptqmodels(version: str, bits: int, kind: str, group: int) -> None:
    folder = FILES / ("gptq-v1" if version == "gptq" else "gptq-v2")
    name, settings = f"w{bits}-{kind}-{group}", {"bits": bits, "checkpoint_format": version}
    found = read(folder, name=name, dynamic={"all": {}}, **settings)
    assert torch.equal(found.dequantize(), expected(folder, name))
    granularity = PerBlock(32) if group == 32 else PerChannel(0)
    assert found.encoding.scheme == Scheme(bits, kind == "symmetric", granularity)


@pytest.mark.parametrize(
    ("version", "group"), [("gemm", 16), ("gemm", 32), ("gemm", 64), ("gemv", 32), ("gemv", 64)]
)
def test_layers_equal_autoawqs(version: str, group: int) -> None:
    folder = FILES / f"awq-{version}-{group}"
    for size in (group, -1) if group == 64 else (group,):  # -1: a whole row is a group
        found = read(folder, "awq", version=version, group_size=size)
        assert torch.equal(found.dequantize(), expected(folder, "layer"))
        granularity = PerChannel(0) if group == 64 else PerBlock(group)
        assert found.encoding.scheme == Scheme(4, False, granularity)


def test_a_version_read_as_the_other_is_another_weight_or_does_not_fit() -> None:
    """The golden files hold a zero point of zero, from which version 1 of GPTQ subtracts one."""
    second = {"checkpoint_format": "gptq_v2"}
    for folder, settings in ((GPTQ, {}), (FILES / "gptq-v2", second)):
        assert int(read(folder, **settings).encoding.offset.max()) == 0
    assert not torch.equal(read(GPTQ, **second).dequantize(), expected(GPTQ))
    with pytest.raises(SourceError, match=r"download the model again"):
        read(AWQ, "awq", version="gemv")


def check_model(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    values = {name: checkpoint.read(name) for name in checkpoint.names()}
    quantized = {name: v for name, v in values.items() if isinstance(v, QuantizedTensor)}
    wanted = load_file(FILES / "gptqmodel-llama" / "expected.safetensors")
    assert quantized.keys() == wanted.keys()
    assert len(wanted) == 7
    assert all(torch.equal(value.dequantize(), wanted[n]) for n, value in quantized.items())
    assert not hasattr(checkpoint.config, "quantization_config")
    assert isinstance(values["lm_head.weight"], torch.Tensor)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of GPT-QModel, to change."""
    ignored = shutil.ignore_patterns("expected*")
    return Path(shutil.copytree(FILES / "gptqmodel-llama", tmp_path / "model", ignore=ignored))


@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit-128g.safetensors"])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_whole_checkpoint_of_gptq(model: Path, name: str, is_old: bool) -> None:
    """As GPT-QModel writes it, and as AutoGPTQ did: a file of its own name, and the settings next to
    a config.json that says nothing of them."""
    (model / "model.safetensors").rename(model / name)
    if is_old:
        settings = json.loads((model / "config.json").read_text())["quantization_config"]
        (model / "quantize_config.json").write_text(json.dumps(settings))
        edit_json(model / "config.json", quantization_config=None)
    check_model(model)


def test_zero_biases_that_the_model_does_not_have(model: Path) -> None:
    """AutoGPTQ gives every layer a bias."""
    bias = "model.layers.0.mlp.down_proj.bias"
    edit_tensors(model / "model.safetensors", {bias: torch.zeros(64)})
    check_model(model)
    edit_tensors(model / "model.safetensors", {bias: torch.ones(64)})
    with pytest.raises(SourceError, match=f"'{bias}' is in the files, but not in LlamaForCausalLM"):
        open_checkpoint(model)


def awq_model(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """A tiny llama whose down_proj is the golden layer; the weights that must come out."""
    llama(num_hidden_layers=1).save_pretrained(folder)
    name, file = "model.layers.0.mlp.down_proj", folder / "model.safetensors"
    tensors, layer = load_file(file), load_file(AWQ / file.name)
    parts = {f"{name}.{part}": layer[f"layer.{part}"] for part in ("qweight", "qzeros", "scales")}
    edit_tensors(file, {f"{name}.weight": None, **parts})
    record = {"quant_method": "awq", **SETTINGS["awq"], **settings}
    edit_json(folder / "config.json", quantization_config=record)
    return {**tensors, f"{name}.weight": expected(AWQ, "layer")}


def test_a_whole_checkpoint_of_awq(tmp_path: Path) -> None:
    wanted = awq_model(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == wanted.keys()
    for name, value in wanted.items():
        found = checkpoint.read(name)
        is_packed = isinstance(found, QuantizedTensor)
        assert is_packed == name.endswith("down_proj.weight")
        assert torch.equal(found.dequantize() if is_packed else found, value)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "gemv_fast"}, "AWQ layout 'gemv_fast' is not supported; gemm and gemv are"),
        ({"version": "marlin"}, "AWQ layout 'marlin'"),
        ({"bits": 8}, "bits is 8, but AWQ files have 4 bits"),
        ({"group_size": 0}, "group_size is 0; a positive integer is needed"),
        ({"group_size": None}, "group_size is None"),
    ],
)
def test_refused_settings_of_awq(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    awq_model(tmp_path, **settings)
    with pytest.raises(SourceError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint_format": "marlin"}, "layout 'marlin' is not supported; gptq and gptq_v2 are"),
        ({"is_marlin_format": True}, "GPTQ layout 'marlin'"),
        ({"checkpoint_format": "gptq_p"}, "GPTQ layout 'gptq_p'"),
        ({"checkpoint_format": ["gptq"]}, r"GPTQ layout \"\['gptq'\]\""),
        ({"bits": 5}, "bits is 5, but GPTQ files have 2, 3, 4, 8"),
        ({"bits": "4"}, "bits is '4'"),
    ],
)
def test_refused_settings_of_gptq(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        opened(GPTQ, **settings)


def test_group_order_of_whole_runs_is_a_grid() -> None:
    folder, settings = FILES / "gptq-order", {"checkpoint_format": "gptq_v2"}
    runs = read(folder, name="runs", **settings)
    assert torch.equal(runs.dequantize(), expected(folder, "runs"))
    facts = r"layer 'scattered' \(GPTQ\) was quantized in activation order.*desc_act=False"
    with pytest.raises(SourceError, match=facts):
        read(folder, name="scattered", **settings)


def changed(folder: Path, method: str = "gptq", **parts: Any) -> Path:
    """A folder with one layer, some of its tensors replaced; None leaves one out."""
    file, layer = "model.safetensors", LAYERS[method]
    held = load_file((GPTQ if method == "gptq" else AWQ) / file)
    whole = {part: held.get(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
    tensors = {f"{layer}.{part}": t for part, t in (whole | parts).items() if t is not None}
    save_file(tensors, folder / file)
    return folder


def test_g_idx_may_be_absent(tmp_path: Path) -> None:
    found = read(changed(tmp_path, g_idx=None))
    assert torch.equal(found.dequantize(), expected(GPTQ))


def test_negative_scales_of_autoround_keep_their_values(tmp_path: Path) -> None:
    scales = load_file(GPTQ / "model.safetensors")[f"{LAYERS['gptq']}.scales"].clone()
    scales[0, ::2] *= -1
    wanted = expected(GPTQ).clone()
    wanted[::2, :32] *= -1
    value = read(changed(tmp_path, scales=scales))
    assert torch.equal(value.dequantize(), wanted)
    assert bool((value.encoding.scale > 0).all())  # an asymmetric layer


def test_negative_scales_of_a_symmetric_layer_are_signed_blocks(tmp_path: Path) -> None:
    layer = "w4-symmetric-32"
    shutil.copytree(GPTQ, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    scales = tensors[f"{layer}.scales"]
    scales[0, ::2] *= -1
    save_file(tensors, file, metadata={"format": "pt"})
    before, found = (read(folder, name=layer) for folder in (GPTQ, tmp_path / "model"))
    assert found.encoding.scheme == Scheme(4, True, SignedBlock(32))
    assert torch.equal(found.codes, before.codes)
    assert torch.equal(found.encoding.scale, scales.T.float())


def words(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.int32)


NO_SCALE = "a scale is a finite positive number, but 64 of 64"
NO_MATRICES = r"'.*' \({}\): .*\[\].* must be matrices"


@pytest.mark.parametrize(
    ("method", "parts", "message"),
    [
        ("gptq", {"qzeros": None}, NO_MATRICES.format("GPTQ")),
        ("awq", {"qzeros": None}, NO_MATRICES.format("AWQ")),
        ("gptq", {"scales": torch.full((2, 32), torch.nan)}, rf"{LAYERS['gptq']}' .*{NO_SCALE}"),
        ("gptq", {"scales": torch.zeros(2, 32)}, NO_SCALE),
        ("awq", {"scales": torch.zeros(2, 32)}, rf"layer' \(AWQ\): {NO_SCALE} are not, 0.0 the"),
        ("awq", {"scales": torch.full((2, 32), torch.inf)}, NO_SCALE),
        ("gptq", {"scales": torch.ones(2, 31)}, r"scales' is F32 \[2, 31\], but .* \[2, 32\]"),
        ("awq", {"scales": torch.ones(4, 32)}, r"scales' is F32 \[4, 32\], but .* \[2, 32\]"),
        ("gptq", {"scales": torch.ones(3, 32), "qzeros": words(3, 4)}, "of 21.3333 do not divide"),
        ("gptq", {"scales": torch.ones(0, 32), "qzeros": words(0, 4)}, "groups of 0 do not divide"),
        ("awq", {"qweight": words(63, 4)}, "groups of 32 do not divide rows of 63"),
        ("awq", {"qweight": words(48, 4)}, "groups of 32 do not divide rows of 48"),
        ("gptq", {"qweight": words(8, 32).long()}, r"qweight' is I64 \[8, 32\], but .* need I32"),
        ("awq", {"qweight": words(64, 4).short()}, "qweight' is I16"),
        ("gptq", {"qweight": words(8)}, "must be matrices"),
        ("awq", {"qweight": words(64, 4, 1)}, "must be matrices"),
        ("gptq", {"qweight": words(9, 32)}, r"qweight' is I32 \[9, 32\], but .* \[8, 32\]"),
        ("gptq", {"g_idx": words(64, value=2)}, "g_idx contains group 2 or 2, but there are 2"),
        ("gptq", {"g_idx": words(64, value=-1)}, "g_idx contains group -1 or -1"),
    ],
)
def test_damaged_layers(tmp_path: Path, method: str, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(changed(tmp_path, method, **parts), method)
