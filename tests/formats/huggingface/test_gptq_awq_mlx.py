"""GPTQ and AWQ layers equal what GPT-QModel and AutoAWQ unpack, bit for bit; MLX folders equal what
MLX dequantizes and mlx-lm computes (files/gptq-*, awq-*, mlx-*)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.models import edit_json, edit_tensors, equal, llama, read_integers, values_of
from qwlora.errors import SourceError
from qwlora.formats.huggingface.gptq_awq_mlx import MlxTensors, QweightTensors
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.model_source import locate
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme, SignedBlock

FILES = Path(__file__).parents[1] / "files"
FILE = "model.safetensors"
GPTQ, AWQ = FILES / "gptq-v1", FILES / "awq-gemm-32"
LAYERS = {"gptq": "w4-asymmetric-32", "awq": "layer"}
SETTINGS = {
    "gptq": {"bits": 4, "checkpoint_format": "gptq"},
    "awq": {"bits": 4, "version": "gemm", "group_size": 32},
}


def read(folder: Path, method: str = "gptq", name: str = "", **settings: Any) -> QuantizedTensor:
    settings = {**SETTINGS[method], **settings}
    tensors = QweightTensors(SafetensorsFiles(folder), settings, method)
    return read_integers(tensors, f"{name or LAYERS[method]}.weight")


def expected(folder: Path, name: str = LAYERS["gptq"]) -> torch.Tensor:
    return load_file(folder / "expected.safetensors")[f"{name}.weight"]


GROUPS = {16: PerBlock(16), 32: PerBlock(32), 64: PerChannel(0)}
CASES = [
    *(
        ("gptq", folder, f"w{bits}-{kind}-{group}", {"bits": bits, "checkpoint_format": version})
        for folder, version in (("gptq-v1", "gptq"), ("gptq-v2", "gptq_v2"))
        for bits in (2, 3, 4, 8)
        for kind in ("symmetric", "asymmetric")
        for group in (32, 64)
    ),
    *(
        ("awq", f"awq-{version}-{group}", "layer", {"version": version, "group_size": size})
        for version, group, size in (
            *(("gemm", 16, 16), ("gemm", 32, 32), ("gemm", 64, 64), ("gemm", 64, -1)),
            *(("gemv", 32, 32), ("gemv", 64, 64), ("gemv", 64, -1)),  # -1: a row is a group
        )
    ),
]


@pytest.mark.parametrize(("method", "folder", "name", "settings"), CASES)
def test_layers_equal_theirs(method: str, folder: str, name: str, settings: Any) -> None:
    dynamic = {"dynamic": {"all": {}}} if method == "gptq" else {}
    found = read(FILES / folder, method, name, **settings, **dynamic)
    assert torch.equal(found.dequantize(), expected(FILES / folder, name))
    group = int((name if method == "gptq" else folder).rpartition("-")[2])
    scheme = Scheme(settings.get("bits", 4), "-symmetric" in name, GROUPS[group])
    assert found.encoding.scheme == scheme


def test_a_version_read_as_the_other_is_another_weight_or_does_not_fit() -> None:
    """The golden files hold a zero point of zero, from which version 1 of GPTQ subtracts one."""
    second = {"checkpoint_format": "gptq_v2"}
    for folder, settings in ((GPTQ, {}), (FILES / "gptq-v2", second)):
        assert int(read(folder, **settings).encoding.offset.max()) == 0
    assert not torch.equal(read(GPTQ, **second).dequantize(), expected(GPTQ))
    with pytest.raises(SourceError, match=r"download the model again"):
        read(AWQ, "awq", version="gemv")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of GPT-QModel, to change."""
    ignored = shutil.ignore_patterns("expected*")
    return Path(shutil.copytree(FILES / "gptqmodel-llama", tmp_path / "model", ignore=ignored))


@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit-128g.safetensors"])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_whole_checkpoint_of_gptq(model: Path, name: str, is_old: bool) -> None:
    """As GPT-QModel writes it, and as AutoGPTQ did: a file of its own name, settings next to a
    config.json that says nothing of them, zero biases that the model does not have."""
    (model / "model.safetensors").rename(model / name)
    bias = "model.layers.0.mlp.down_proj.bias"
    if is_old:
        settings = json.loads((model / "config.json").read_text())["quantization_config"]
        (model / "quantize_config.json").write_text(json.dumps(settings))
        edit_json(model / "config.json", quantization_config=None)
        edit_tensors(model / name, {bias: torch.zeros(64)})
    checkpoint = open_checkpoint(model)
    values, packed = values_of(checkpoint)
    wanted = load_file(FILES / "gptqmodel-llama" / "expected.safetensors")
    assert len(wanted) == 7
    assert equal({name: values[name] for name in packed}, wanted)
    assert not hasattr(checkpoint.config, "quantization_config")
    edit_tensors(model / name, {bias: torch.ones(64)})
    with pytest.raises(SourceError, match=f"'{bias}' is in the files, but not in LlamaForCausalLM"):
        open_checkpoint(model)


def awq_model(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """A tiny llama whose down_proj is the golden layer; the weights that must come out."""
    llama(num_hidden_layers=1).save_pretrained(folder)
    name, file = "model.layers.0.mlp.down_proj", folder / FILE
    tensors, layer = load_file(file), load_file(AWQ / FILE)
    parts = {f"{name}.{part}": layer[f"layer.{part}"] for part in ("qweight", "qzeros", "scales")}
    edit_tensors(file, {f"{name}.weight": None, **parts})
    record = {"quant_method": "awq", **SETTINGS["awq"], **settings}
    edit_json(folder / "config.json", quantization_config=record)
    return {**tensors, f"{name}.weight": expected(AWQ, "layer")}


def test_a_whole_checkpoint_of_awq(tmp_path: Path) -> None:
    wanted = awq_model(tmp_path)
    values, packed = values_of(open_checkpoint(tmp_path))
    assert packed == {"model.layers.0.mlp.down_proj.weight"}
    assert equal(values, wanted)


def test_group_order_of_whole_runs_is_a_grid() -> None:
    folder, settings = FILES / "gptq-order", {"checkpoint_format": "gptq_v2"}
    runs = read(folder, name="runs", **settings)
    assert torch.equal(runs.dequantize(), expected(folder, "runs"))
    facts = r"layer 'scattered' \(GPTQ\) was quantized in activation order.*desc_act=False"
    with pytest.raises(SourceError, match=facts):
        read(folder, name="scattered", **settings)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_negative_scales_of_autoround_keep_their_values(tmp_path: Path, kind: str) -> None:
    """A symmetric layer becomes signed blocks; the codes of an asymmetric one are turned."""
    layer, folder = f"w4-{kind}-32", Path(shutil.copytree(GPTQ, tmp_path / "model"))
    scales, wanted = load_file(folder / FILE)[f"{layer}.scales"], expected(GPTQ, layer).clone()
    scales[0, ::2] *= -1
    wanted[::2, :32] *= -1
    # without g_idx, which may be absent
    edit_tensors(folder / FILE, {f"{layer}.scales": scales, f"{layer}.g_idx": None})
    found = read(folder, name=layer)
    assert torch.equal(found.dequantize(), wanted)
    if kind == "symmetric":
        assert found.encoding.scheme == Scheme(4, True, SignedBlock(32))
        assert torch.equal(found.codes, read(GPTQ, name=layer).codes)
        assert torch.equal(found.encoding.scale, scales.T.float())
    else:
        assert bool((found.encoding.scale > 0).all())


def words(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.int32)


PARTS = ("qweight", "qzeros", "scales", "g_idx")
NO_SCALE = "a scale is a finite positive number, but 64 of 64"


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("awq", {"version": "gemv_fast"}, "AWQ layout 'gemv_fast'"),
        ("awq", {"bits": 8}, "bits is 8, but AWQ files have 4 bits"),
        ("awq", {"group_size": 0}, "group_size is 0"),
        ("gptq", {"checkpoint_format": "marlin"}, "layout 'marlin'"),
        ("gptq", {"is_marlin_format": True}, "GPTQ layout 'marlin'"),
        ("gptq", {"checkpoint_format": ["gptq"]}, r"GPTQ layout \"\['gptq'\]\""),
        ("gptq", {"bits": 5}, "bits is 5, but GPTQ files have 2, 3, 4, 8"),
        ("gptq", {"qzeros": None}, r"'.*' \(GPTQ\): .*\[\].* must be matrices"),
        ("gptq", {"scales": torch.full((2, 32), torch.nan)}, rf"{LAYERS['gptq']}' .*{NO_SCALE}"),
        ("awq", {"scales": torch.full((2, 32), torch.inf)}, rf"layer' \(AWQ\): {NO_SCALE}"),
        ("gptq", {"scales": torch.ones(2, 31)}, r"scales' is F32 \[2, 31\], but .* \[2, 32\]"),
        ("awq", {"scales": torch.ones(4, 32)}, r"scales' is F32 \[4, 32\], but .* \[2, 32\]"),
        ("gptq", {"scales": torch.ones(3, 32), "qzeros": words(3, 4)}, "of 21.3333 do not divide"),
        ("gptq", {"scales": torch.ones(0, 32), "qzeros": words(0, 4)}, "groups of 0 do not divide"),
        ("awq", {"qweight": words(63, 4)}, "groups of 32 do not divide rows of 63"),
        ("gptq", {"qweight": words(8, 32).long()}, r"qweight' is I64 \[8, 32\], but .* need I32"),
        ("gptq", {"qweight": words(9, 32)}, r"qweight' is I32 \[9, 32\], but .* \[8, 32\]"),
        ("gptq", {"g_idx": words(64, value=2)}, "g_idx contains group 2"),
        ("gptq", {"g_idx": words(64, value=-1)}, "g_idx contains group -1"),
    ],
)
def test_settings_and_layers_that_are_refused(tmp_path, method, changes, message) -> None:
    """`changes` are settings, or tensors of a layer; None leaves one out."""
    held, layer = load_file((GPTQ if method == "gptq" else AWQ) / FILE), LAYERS[method]
    whole = {part: held.get(f"{layer}.{part}") for part in PARTS}
    parts = {part: changes.get(part, whole[part]) for part in PARTS}
    save_file({f"{layer}.{n}": t for n, t in parts.items() if t is not None}, tmp_path / FILE)
    with pytest.raises(SourceError, match=message):
        read(tmp_path, method, **{key: v for key, v in changes.items() if key not in PARTS})


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_layers_equal_mlxs(bits: int, group: int) -> None:
    folder, name = FILES / "mlx-layers", f"w{bits}-{group}"
    tensors = MlxTensors(SafetensorsFiles(folder), {"bits": bits, "group_size": group})
    found, wanted = read_integers(tensors, f"{name}.weight"), expected(folder, name)
    assert tensors.shape(f"{name}.weight") == found.codes.shape
    rounding = torch.finfo(torch.float32).eps * float(wanted.abs().max())
    assert float((found.dequantize() - wanted).abs().max()) <= 2 * rounding
    assert found.encoding.scheme.bitwidth == bits
    scales = load_file(folder / FILE)[f"{name}.scales"]
    # MLX writes negative ones, which a grid does not have
    assert bool((scales < 0).any()) or (bits, group) == (3, 128)


def test_a_whole_mlx_model_computes_mlx_lms_logits() -> None:
    folder = FILES / "mlx-llama"
    assert not locate(str(folder)).holds_floats
    checkpoint = open_checkpoint(folder)
    embedding = read_integers(checkpoint, "model.embed_tokens.weight")
    assert embedding.encoding.scheme.bitwidth == 8
    wanted = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = load_precomputed(checkpoint)(input_ids=wanted["tokens"].long()).logits
    assert float((logits - wanted["logits"]).abs().max()) < 1e-5


UP, STACK = (f"model.layers.0.mlp.{name}up_proj" for name in ("", "switch_mlp."))
STACKED = {"weight": torch.zeros(2, 8, 8, dtype=torch.uint32), "scales": torch.ones(2, 8, 1)}


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"model.embed_tokens": {"mode": "mxfp4"}}, {}, "mxfp4' of 'model.embed_tokens'"),
        ({"bits": 7}, {}, "bits 7.*2, 3, 4, 5, 6, 8"),
        ({"group_size": "64"}, {}, "group_size '64'"),
        ({"bits": 8}, {}, "8 bits in groups of 64: .*config.json"),
        ({}, {f"{UP}.scales": torch.full((128, 1), torch.nan)}, "up_proj.* a scale is a finite"),
        ({}, {f"{STACK}.{part}": t for part, t in STACKED.items()}, r"\[2, 8, 8\].* stacked"),
    ],
)
def test_mlx_folders_that_do_not_fit_are_refused(tmp_path, settings, tensors, message) -> None:
    folder = Path(shutil.copytree(FILES / "mlx-llama", tmp_path / "edited"))
    config = json.loads((folder / "config.json").read_text())
    changed = config["quantization"] | settings
    edit_json(folder / "config.json", quantization=changed, quantization_config=None)
    edit_tensors(folder / FILE, tensors)
    with pytest.raises(SourceError, match=message):
        open_checkpoint(folder).read(f"{UP}.weight")
