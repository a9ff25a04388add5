"""compressed-tensors layers equal what the library decompresses, bit for bit in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.huggingface.test_gptq_awq_mlx import words
from formats.models import edit_json, equal, llama, read_integers, values_of
from qwlora.errors import SourceError
from qwlora.formats.huggingface.compressed_tensors import CompressedTensors
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor

OUT, IN = 24, 64
INTEGER = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
SMALL = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
EIGHT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def weights(seed: int = 0, columns: int = IN) -> Tensor:
    return torch.randn(OUT, columns, generator=torch.Generator().manual_seed(seed))


def opened(
    folder: Path, held: dict[str, Tensor], layout: str, record: dict[str, Any], **settings: Any
) -> CompressedTensors:
    """A folder with one layer, of one config group unless `settings` say otherwise."""
    stored = {f"layer.{part}": tensor.contiguous() for part, tensor in held.items()}
    save_file(stored, folder / "model.safetensors")
    group = {"targets": ["Linear"], "weights": record, "input_activations": None}
    whole = {"format": layout, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return CompressedTensors(SafetensorsFiles(folder), {**whole, **settings})


def read(folder: Path, held: dict[str, Tensor], *how: Any) -> QuantizedTensor:
    return read_integers(opened(folder, held, *how), "layer.weight")


def grouped(weight: Tensor, arguments: QuantizationArgs) -> Tensor:
    """`weight` as [..., values that share a scale], the leading axes as the scale's."""
    match arguments.strategy:
        case "tensor":
            return weight.reshape(1, -1)
        case "channel":
            return weight.unsqueeze(1)
        case _:
            return weight.unflatten(1, (-1, arguments.group_size))  # type: ignore[arg-type]


def compressed(
    weight: Tensor, layout: str, record: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """(what the library stores of a layer, what it makes of that with scales in float32)."""
    arguments = QuantizationArgs(**record)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    values = grouped(weight, arguments)
    scale, zero = calculate_qparams(values.amin(-1), values.amax(-1), arguments)
    if arguments.strategy == "channel":
        scale, zero = scale.view(-1, 1), zero.view(-1, 1)
    compressor = BaseCompressor.get_value_from_registry(layout)
    layer = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
    stored = compressor.compress(layer, scheme).items()
    held = {name: tensor for name, tensor in stored if tensor is not None}
    wide = compressor.decompress({**held, "weight_scale": held["weight_scale"].float()}, scheme)
    assert wide["weight"].dtype == torch.float32
    return held, wide["weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized", "naive-quantized"])
def test_layers_equal_the_librarys(tmp_path, layout, strategy, symmetric, dtype) -> None:
    granularity = {"tensor": PerTensor(), "channel": PerChannel(0), "group": PerBlock(16)}
    for bits in (2, 3, 4, 5, 6, 7, 8) if layout == "pack-quantized" else (4, 8):
        weight = weights(bits)
        record = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
        record |= {"group_size": 16} if strategy == "group" else {}
        held, expected = compressed(weight, layout, record, dtype)
        found = read(tmp_path, held, layout, record)
        scheme = found.encoding.scheme
        assert torch.equal(found.dequantize(), expected)
        assert (scheme.bitwidth, scheme.granularity) == (bits, granularity[strategy])
        # an asymmetric tensor may happen to have its zero in the middle
        assert scheme.symmetric >= symmetric
        assert bool((found.dequantize() - weight).abs().max() < 4)


def test_rows_that_do_not_fill_words(tmp_path: Path) -> None:
    """20 codes of 3 bits in 2 words a row. compressed-tensors 0.13 put `32 // bits` whole codes into
    a word, without crossing words; that is refused."""
    record = {**EIGHT, "num_bits": 3}
    held, expected = compressed(weights(columns=20), "pack-quantized", record, torch.float32)
    assert torch.equal(read(tmp_path, held, "pack-quantized", record).dequantize(), expected)
    held["weight_packed"] = torch.zeros(OUT, 3, dtype=torch.int32)
    with pytest.raises(SourceError, match=r"weight_packed' is I32 \[24, 3\], but .* \[24, 2\]"):
        read(tmp_path, held, "pack-quantized", record)


def model_folder(
    folder: Path,
    groups: dict[str, Any],
    layouts: dict[str, tuple[str, dict[str, Any]]],
    **more: Any,
) -> dict[str, Tensor]:
    """Compress the layers of a tiny llama that `layouts` names; returns the expected values."""
    llama(**SMALL).save_pretrained(folder)
    stored, expected = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        ends = [end for end in layouts if name.endswith(f"{end}.weight")]
        if not ends:
            stored[name] = expected[name] = value
            continue
        held, expected[name] = compressed(value, *layouts[ends[0]], torch.bfloat16)
        for part, tensor in held.items():
            stored[f"{name.removesuffix('weight')}{part}"] = tensor.contiguous()
    for part in ("q_proj.input_scale", "q_proj.input_zero_point", "k_scale"):
        stored[f"model.layers.0.self_attn.{part}"] = torch.ones(1)
    save_file(stored, folder / "model.safetensors")
    settings = {"quant_method": "compressed-tensors", "config_groups": groups, **more}
    edit_json(folder / "config.json", quantization_config=settings)
    return expected


GROUP = {"targets": ["Linear"], "weights": INTEGER}
_MORE = "Only dense integer weights"
REFUSED_SETTINGS: list[tuple[dict[str, Any], str]] = [
    *(({"format": name}, f"format is '{name}'") for name in ("float-quantized", "marlin-24")),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format is .*sparse"),
    ({"transform_config": {"config_groups": {"R": {}}}}, "transform_config.config_groups is"),
    ({"kv_cache_scheme": {"num_bits": 8}}, f"kv_cache_scheme is .*{_MORE}"),
    ({"config_groups": {}}, "config_groups is .* at least 1"),
    ({"config_groups": [INTEGER]}, r"config_groups is \[.*must be keys with values"),
    *(
        ({"config_groups": {"group_0": group}}, f"config_groups.group_0.{message}")
        for group, message in (
            ({"weights": INTEGER}, "targets is .*must be a value"),
            ({"targets": ["Linear"], "weights": [4]}, r"weights is \[4\]"),
            ({**GROUP, "input_activations": {"num_bits": 16}}, f"input_activations is .*{_MORE}"),
            ({**GROUP, "output_activations": {"num_bits": 16}}, f"output_activations is .*{_MORE}"),
            ({**GROUP, "weights": {**INTEGER, "type": "float"}}, "weights.type is 'float'"),
            ({**GROUP, "weights": {**INTEGER, "num_bits": 16}}, "weights.num_bits is 16"),
            ({**GROUP, "weights": {**INTEGER, "strategy": "block"}}, "weights.strategy is 'block'"),
            ({**GROUP, "weights": {**INTEGER, "group_size": "16"}}, "weights.group_size is '16'"),
            ({**GROUP, "weights": {**INTEGER, "symmetric": "yes"}}, "weights.symmetric is 'yes'"),
        )
    ),
    # a layer whose group is not known
    *(
        ({"config_groups": {t: {**GROUP, "targets": [t]} for t in (target, "lm_head")}}, message)
        for target, message in (
            ("Embedding", r"no config group has a target that matches .*\(Linear\)"),
            ("re:(", "a target is not a valid regular expression"),
        )
    ),
]


CODES = torch.full((OUT, IN), 9, dtype=torch.int8)
DAMAGED: dict[str, dict[str, Any]] = {
    "'layer.weight_scale' is missing": {"weight_scale": None, "weight_packed": words(OUT, 8)},
    r"weight_shape \[24, 1099511627776\] and weight_packed \[24, 8\] do not belong together": {
        "weight_shape": torch.tensor([OUT, 2**40])
    },
    "groups of 16 do not divide rows of 60": {"weight_shape": torch.tensor([OUT, 60])},
    "layer 'layer' .*: a scale is a finite": {"weight_scale": torch.full((OUT, 4), torch.nan)},
    r"weight_scale' is F32 \[24, 3\], but .* \[24, 4\]": {"weight_scale": torch.ones(OUT, 3)},
    "true, but 96 of 96 zero points": {"weight_zero_point": words(OUT, 4, value=100).char()},
    "zero_point' is F32": {"weight_zero_point": torch.zeros(OUT, 4)},
    r"zero_point' is I32 \[3, 3\], but .* \[3, 4\]": {"weight_zero_point": words(3, 3)},
    r"weight_packed' is I32 \[24, 9\], but .* \[24, 8\]": {"weight_packed": words(OUT, 9)},
    "quantized in activation order with scattered": {"weight_g_idx": torch.arange(IN).int() % 4},
    "codes do not fit in 4 bits": {"weight": CODES},
    r"'layer\.weight' is F32": {"weight": CODES.float()},
}


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        *((settings, {}, message) for settings, message in REFUSED_SETTINGS),
        *(({}, tensors, message) for message, tensors in DAMAGED.items()),
    ],
)
def test_settings_and_layers_that_are_refused(tmp_path, settings, tensors, message) -> None:
    layout = "int-quantized" if "weight" in tensors else "pack-quantized"
    stored = compressed(weights(), layout, INTEGER, torch.float32)[0] | tensors
    held = {name: tensor for name, tensor in stored.items() if tensor is not None}
    with pytest.raises(SourceError, match=message):
        opened(tmp_path, held, layout, INTEGER, **settings).read("layer.weight")


def test_group_order_that_changes_nothing(tmp_path: Path) -> None:
    held, expected = compressed(weights(), "pack-quantized", INTEGER, torch.float32)
    for order in (torch.arange(IN) // 16, torch.full((IN,), -1)):
        held["weight_g_idx"] = order.int()
        assert torch.equal(read(tmp_path, held, "pack-quantized", INTEGER).dequantize(), expected)


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
def test_a_symmetry_that_the_tensors_contradict(tmp_path: Path, layout: str) -> None:
    record = {**INTEGER, "symmetric": False}
    held, _ = compressed(weights(2) + 1, layout, record, torch.float32)
    with pytest.raises(SourceError, match=r"says symmetric: true, but \d+ of \d+ zero points"):
        read(tmp_path, held, layout, INTEGER)
    held["weight_zero_point"] = torch.zeros_like(held["weight_zero_point"])
    if layout == "int-quantized":
        assert read(tmp_path, held, layout, INTEGER).encoding.scheme.symmetric
    del held["weight_zero_point"]
    with pytest.raises(SourceError, match=r"symmetric: false, but '.*zero_point' is missing"):
        read(tmp_path, held, layout, record)


@pytest.mark.parametrize(
    "targets",
    [
        (["Linear"], ["lm_head"]),
        (["lm_head"], ["Linear"]),
        (["Linear"], ["Embedding"]),
        (["Linear"], ["re:.*up_proj"]),
        (["re:.*mlp.*"], ["re:.*down_proj", "re:.*self_attn.*"]),
        (["re:.*up_proj"], ["model.layers.0.mlp.up_proj", "Linear"]),
        (["Module"], ["Linear"]),
        (["Linear"], ["Linear"]),
        (["Linear"], ["LlamaMLP"]),
    ],
    ids=str,
)
def test_groups_are_the_librarys(tmp_path: Path, targets: tuple[list[str], list[str]]) -> None:
    """Every layer that the library would quantize, with the bits and the layout that it would have.
    Scales of activations, whose settings were removed from config.json, are left out."""
    layouts = {4: ("pack-quantized", INTEGER), 8: ("int-quantized", EIGHT)}
    groups = {
        f"group_{i}": {"targets": names, "weights": weights, "format": layout}
        for i, (names, (layout, weights)) in enumerate(zip(targets, layouts.values(), strict=True))
    }
    asked = llama(**SMALL)
    config = QuantizationConfig(config_groups=groups, quantization_status="frozen")
    apply_quantization_config(asked, config)
    bits = {
        path: module.quantization_scheme.weights.num_bits
        for path, module in asked.named_modules()
        if hasattr(module, "quantization_scheme")
    }
    assert len(bits) > 1
    stored = {path: layouts[count] for path, count in bits.items()}
    expected = model_folder(tmp_path, groups, stored, format="mixed-precision")
    checkpoint = open_checkpoint(tmp_path)
    values, packed = values_of(checkpoint)
    assert equal(values, expected)
    assert packed == {f"{path}.weight" for path in bits}
    for path, count in bits.items():
        assert read_integers(checkpoint, f"{path}.weight").encoding.scheme.bitwidth == count
