"""AIMET encodings with a float checkpoint: entries are matched and transposed correctly, and all
problems are reported together.

AIMET's own files (tests/formats/aimet_encodings/files) are compared with each other: all versions describe the
same simulation. tests/aimet/test_reader.py compares with aimet-torch itself.
"""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from formats import models
from formats.models import read_floats, read_integers
from qwlora.errors import EncodingsFileError, QwloraWarning, SourceError
from qwlora.formats.aimet import AimetCheckpoint, matched_encodings
from qwlora.formats.aimet_encodings import (
    VERSIONS,
    BlockOrder,
    EncodingsFile,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
    read_encodings,
    write_encodings,
)
from qwlora.formats.aimet_encodings.grids import TensorLayout, entry_of, grid_of
from qwlora.formats.aimet_encodings.model import Entry
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.encoding import Encoding, measure
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme

GOLDEN = Path(__file__).parent / "aimet_encodings" / "files"
BLOCKED = {"block": (6, 8), "lpbq": (8, 6)}
DOWN = "model.layers.0.mlp.down_proj.weight"


def llama(tied: bool = False) -> PreTrainedModel:
    return models.llama(vocab_size=48, num_hidden_layers=1, tie_word_embeddings=tied)


# Grids of AIMET's own files


def grids(file: str, version: str) -> dict[str, Encoding]:
    """The grids of the two blocked layers, from a file of AIMET 2.42."""
    entries = read_encodings(GOLDEN / file).by_name
    found = {}
    for layer, shape in BLOCKED.items():
        folded = f"{layer}.weight_0"  # the ONNX exporter's name of a weight stored [in, out]
        name = folded if folded in entries else f"{layer}.weight"
        order: BlockOrder = "tensor" if name == folded else "channel"
        layout = TensorLayout(shape, name == folded, 0, order)
        found[layer] = grid_of(entries[name], layout, version)
    return found


@pytest.mark.parametrize(
    ("file", "version"),
    [
        *((f"aimet-{version}.encodings", version) for version in VERSIONS),
        *((name, "0.6.1") for name in ("aimet-modules.json", "aimet-export-1.0.0_torch.encodings")),
    ],
)
def test_every_file_of_aimets_exporters_says_the_same_grids(file: str, version: str) -> None:
    """0.6.1 lists blocks as channels: 12 scales of [6, 8] are two blocks for each output, in the
    order of the tensor, or by channel in files by module; LPBQ's scales are products of its factors."""
    expected, found = grids("aimet-export-1.0.0.encodings", "1.0.0"), grids(file, version)
    for layer in BLOCKED:
        assert torch.equal(found[layer].scale, expected[layer].scale)
        assert torch.equal(found[layer].offset, expected[layer].offset)
    assert found["block"].scheme == Scheme(4, True, PerBlock(4))
    is_old = version == "0.6.1"
    assert found["lpbq"].scheme == Scheme(4, True, PerBlock(2) if is_old else Lpbq(2, 4))


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0"])
def test_the_order_of_a_flat_list_is_not_guessed(version: str) -> None:
    entry = read_encodings(GOLDEN / f"aimet-{version}.encodings").by_name["block.weight_0"]
    with pytest.raises(SourceError, match=r"flat list of blocks.*model.block_order: channel or"):
        grid_of(entry, TensorLayout((6, 8), transposed=True), version)
    right, wrong = (
        grid_of(entry, TensorLayout((6, 8), True, 0, order), version)
        for order in ("tensor", "channel")
    )
    assert not torch.equal(right.scale, wrong.scale)


def test_an_order_that_changes_nothing_need_not_be_known() -> None:
    entry = IntegerEncoding("w", 4, np.arange(1.0, 7.0), np.full(6, -8), True, block_size=8)
    assert grid_of(entry, TensorLayout((6, 8)), "1.0.0").scale.flatten().tolist() == [*range(1, 7)]
    alike = IntegerEncoding("w", 4, np.full(12, 0.5), np.full(12, -8), True, block_size=4)
    assert grid_of(alike, TensorLayout((6, 8)), "1.0.0").scale.shape == (6, 2)


def test_a_zero_point_shift_is_a_grid_without_zero() -> None:
    """Four levels of AIMET's own file: {-1.5, -0.5, 0.5, 1.5} * scale."""
    for version in ("0.6.1", "1.0.0"):
        entry = read_encodings(GOLDEN / f"aimet-{version}.encodings").by_name["shifted.weight_0"]
        grid = grid_of(entry, TensorLayout((4, 8), transposed=True), version)
        codes = torch.arange(4, dtype=torch.uint8).repeat(4, 2)
        levels = torch.tensor([-1.5, -0.5, 0.5, 1.5]).repeat(2)
        scale = torch.tensor(entry.scale.tolist())[:, None]
        torch.testing.assert_close(grid.dequantize(codes), levels * scale, rtol=3e-7, atol=0)
        assert torch.equal(grid.quantize(levels * scale), codes)
        assert torch.equal(grid.quantize(torch.zeros(4, 8)), torch.full((4, 8), 2))  # as AIMET


def integers(shape: tuple[int, ...], scale: float = 1.0, offset: int = -8, **layout: Any) -> Entry:
    scales, offsets = np.full(shape, scale), np.full(shape, offset)
    return IntegerEncoding("w", 4, scales, offsets, offset == -8, **layout)


@pytest.mark.parametrize(
    ("entry", "version", "message"),
    [
        (integers((3, 8), axis=0, block_size=2), "2.0.0", "has blocks along the output"),
        (integers((6, 4), axis=1, block_size=4), "2.0.0", r"has \[6, 4\] blocks.* \[6, 2\]"),
        (integers((5,), block_size=4), "2.0.0", r"has 5 blocks.* needs \[6, 2\]"),
        (integers((12,), block_size=3), "2.0.0", "has blocks of 3, which do not divide"),
        (integers((7,), axis=0), "2.0.0", r"has 7 scales, but axis 0 of \[6, 8\] has 6$"),
        (integers((8,), axis=5), "2.0.0", "axis 5 is outside of a tensor with 2 axes"),
        (integers((), offset=3), "2.0.0", r"an offset is outside \[-15, 0\]"),
        (integers((), scale=1e-60), "2.0.0", "a scale is a finite positive number"),
        (LpbqEncoding("w", 4, 4, np.ones(12, dtype=int), np.ones(4)), "2.0.0", "share evenly"),
        (FloatEncoding("w", 8, "float8e4m3fn", np.ones(())), "2.0.0", "is a float of 8 bits"),
        (integers((8,)), "0.6.1", r"axis 0 of \[6, 8\] has 6; .* loses their shape"),
        (integers((18,)), "0.6.1", "lists scales of blocks as channels and loses their shape"),
        (integers((4,)), "0.6.1", "loses their shape: export 1.0.0"),
    ],
)
def test_entries_that_are_no_grid(entry: Entry, version: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        grid_of(entry, TensorLayout((6, 8), block_order="channel"), version)


def test_low_power_scales_without_their_largest_integer_are_blocks() -> None:
    """Their two factors could not be found again from the product."""
    layout, quarter = TensorLayout((6, 8)), np.full((6, 1), 0.25)
    entry = LpbqEncoding("w", 4, 4, np.tile([[3, 2]], (6, 1)), quarter, axis=1)
    found = grid_of(entry, layout, "2.0.0")
    assert found.scheme == Scheme(4, True, PerBlock(4))
    assert found.scale.tolist() == [[0.75, 0.5]] * 6
    of_two = LpbqEncoding("w", 4, 2, np.full((6, 4), 2), quarter * [1, 2], axis=1)
    assert grid_of(of_two, layout, "2.0.0").scale[0].tolist() == [0.5, 0.5, 1.0, 1.0]


# Whole checkpoints


def saved(folder: Path, entries: Any, version: str, model: PreTrainedModel, **more: Any) -> Path:
    model.save_pretrained(folder)
    rest: dict[str, Any] = {"producer": {"package": "aimet-torch", "version": "2.42.0"}}
    entries = tuple(entries)
    if version < "2":
        rest |= {"parameters": frozenset(entry.name for entry in entries)}
        rest |= {"excluded_layers": (), "quantizer_args": {}}
    path = folder / "model.encodings"
    write_encodings(EncodingsFile(version, entries, **rest | more), path)
    return path


def per_tensor(name: str, bitwidth: int = 4) -> IntegerEncoding:
    return IntegerEncoding(name, bitwidth, np.array(0.01), np.array(-(2 ** (bitwidth - 1))), True)


def opened(folder: Path, entries: Any, version: str = "1.0.0", model: Any = None, **more: Any):
    return open_checkpoint(folder, saved(folder, entries, version, model or llama()), **more)


def matrices(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.data for name, value in model.named_parameters() if value.ndim == 2}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folded", [False, True])
def test_a_checkpoint_has_the_written_grids(tmp_path: Path, version: str, folded: bool) -> None:
    """Both of AIMET's exporters: the parameter's own name, and `NAME_0` stored as [in, out]."""
    kinds = [PerTensor(), PerChannel(0), PerBlock(8), Lpbq(8)]
    kinds = kinds[:2] if version == "0.6.1" else kinds
    expected = {
        name: measure(value, Scheme(4, True, granularity))
        for (name, value), granularity in zip(matrices(llama()).items(), cycle(kinds), strict=False)
    }
    suffix = "_0" if folded else ""
    entries = [entry_of(f"{n}{suffix}", e, version, folded) for n, e in expected.items()]
    checkpoint = opened(tmp_path, entries, version)
    for name, value in llama().named_parameters():
        if name not in expected:
            assert torch.equal(read_floats(checkpoint, name), value)
            continue
        found = read_integers(checkpoint, name)
        assert found.encoding.scheme == expected[name].scheme
        assert torch.equal(found.dequantize(), expected[name].fake_quantize(value.data))


@pytest.mark.parametrize(
    ("version", "producer"), [("1.0.0", "aimet-torch"), ("1.0.0", "another"), ("2.0.0", "another")]
)
def test_flat_blocks_of_a_turned_weight_need_their_order(tmp_path, version, producer) -> None:
    """GPT-2's Conv1D: integers are [out, in]."""
    model = models.gpt2(vocab_size=48, n_layer=1)
    floats = {name: value for name, value in matrices(model).items() if ".h." in name}
    expected = {name: measure(v.t(), Scheme(4, False, PerBlock(8))) for name, v in floats.items()}
    entries = [entry_of(name, grid, version, transposed=True) for name, grid in expected.items()]
    said = {"package": producer, "version": "1.0"}
    encodings = saved(tmp_path, entries, version, model, producer=said)
    arguments: dict[str, Any] = {"keep_float": ["lm_head"]}
    if version == "1.0.0":
        with pytest.raises(EncodingsFileError, match=r"h.0.attn.c_attn.weight' is a flat list"):
            open_checkpoint(tmp_path, encodings, **arguments)
        arguments["block_order"] = "tensor"
    checkpoint = open_checkpoint(tmp_path, encodings, **arguments)
    for name, value in floats.items():
        found = read_integers(checkpoint, name)
        assert found.codes.shape == value.shape[::-1]
        assert torch.equal(found.dequantize(), expected[name].fake_quantize(value.t()))


def test_aimet_onnx_lists_blocks_by_channel(tmp_path: Path) -> None:
    """The scales of one weight [in, out] that it exports in 1.0.0 and, nested, in 2.0.0."""
    first, second = [0.0185714, 0.0675, 0.0914286], [0.1857143, 0.1357143, 0.0875]
    by_channel = [scale for pair in zip(first, second, strict=True) for scale in pair]
    entry = {"name": "fc.weight_0", "dtype": "INT", "bw": 4, "enc_type": "PER_BLOCK"}
    entry |= {"is_sym": True, "block_size": 2, "offset": [-8.0] * 6, "scale": by_channel}
    content = {"version": "1.0.0", "producer": {"package": "aimet-onnx", "version": "2.42.0"}}
    content |= {"activation_encodings": [], "param_encodings": [entry]}
    (tmp_path / "model.encodings").write_text(json.dumps(content))
    model = nn.ModuleDict({"fc": nn.Linear(4, 3, bias=False)})
    scale = matched_encodings(model, tmp_path / "model.encodings")["fc.weight"].scale
    assert torch.equal(scale, torch.tensor([first, second]).T)


def all_entries(model: PreTrainedModel) -> dict[str, Entry]:
    return {name: per_tensor(name) for name in matrices(model)}


def test_everything_that_does_not_fit_is_one_error(tmp_path: Path) -> None:
    entries, up = all_entries(llama()), "model.layers.0.mlp.up_proj.weight"
    for name in (DOWN, "lm_head.weight"):
        del entries[name]
    entries |= {"near": per_tensor(DOWN.removeprefix("model.")), up: per_tensor(up, 16)}
    with pytest.raises(EncodingsFileError) as raised:
        opened(tmp_path, entries.values())
    head, near, bits = sorted(raised.value.problems)
    assert f"'{DOWN}'" in near
    assert "(near: layers.0.mlp.down_proj.weight)" in near
    assert "model.keep_float: [lm_head]" in head
    assert f"'{up}' has 16 bits" in bits


@pytest.mark.parametrize("version", ["0.6.1", "2.0.0"])
@pytest.mark.parametrize("prefix", [None, "m"])
def test_a_prefix_is_found_or_given(tmp_path: Path, version: str, prefix: str | None) -> None:
    """Also in the names of excluded layers, and of weights that are stored [in, out]."""
    has_sections = version < "2"
    signed, names = None if has_sections else True, list(all_entries(llama()))[:-1]
    wrapped = [per_tensor(name).replace(name=f"m.{name}_0", signed=signed) for name in names]
    excluded = {"excluded_layers": ("m.lm_head",)} if has_sections else {}
    more: dict[str, Any] = {} if has_sections else {"keep_float": ["lm_head"]}
    path = saved(tmp_path, wrapped, version, llama(), **excluded)
    checkpoint = open_checkpoint(tmp_path, path, prefix=prefix, **more)
    assert read_integers(checkpoint, DOWN).encoding.scale == torch.tensor(0.01)
    read_floats(checkpoint, "lm_head.weight")
    with pytest.raises(EncodingsFileError, match=r"no parameter has .* the prefix 'net\.'"):
        open_checkpoint(tmp_path, path, prefix="net", **more)


def test_a_model_that_has_the_prefix_and_several_that_fit(tmp_path: Path) -> None:
    entries = [per_tensor(f"{name}.weight") for name in ("up", "down")]
    path = saved(tmp_path, entries, "1.0.0", llama(tied=True))

    def branch() -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("up", "down")})

    one = nn.ModuleDict({"net": branch(), "head": nn.Conv1d(1, 1, 1)})
    assert list(matched_encodings(one, path)) == ["net.up.weight", "net.down.weight"]
    two = nn.ModuleDict({"teacher": branch(), "student": branch()})
    with pytest.raises(EncodingsFileError, match=r"make 2 .*: student\., teacher\.\. Set model"):
        matched_encodings(two, path)
    with pytest.raises(EncodingsFileError, match=r"'teacher.up.weight', the .* has no entry"):
        matched_encodings(two, path, prefix="student")
    kept = matched_encodings(two, path, keep_float=["teacher.*"], prefix="student")
    assert list(kept) == ["student.up.weight", "student.down.weight"]


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_entries_of_unknown_parameters_are_one_warning(tmp_path: Path, version: str) -> None:
    """Activations of 2.x, which has no sections, are not taken for parameters."""
    lora = f"{DOWN.removesuffix('.weight')}.lora_A.weight"
    unknown = [per_tensor(name) for name in (lora, "model.embed_tokns.weight_0")]
    if version > "2":
        unknown.append(per_tensor("/model/layers.0/Add_output_0", 16))
    entries = [*all_entries(llama()).values(), *unknown]
    signed = [entry.replace(signed=True if version > "2" else None) for entry in entries]
    named = rf"2 of \d+ entries.*'{lora}'.*embed_tokns.weight_0' \(near: model.embed_tokens"
    with pytest.warns(QwloraWarning, match=named) as raised:
        read_integers(opened(tmp_path, signed, version), DOWN)
    assert len(raised) == 1


def test_what_stays_float(tmp_path: Path) -> None:
    """Layers that the file excludes, that keep_float names, and entries of 16-bit floats; vectors,
    on their grid; all under the names that AIMET gives to copies, and to those stored [in, out]."""
    paths = ("layers.0.mlp.up_proj", "embed_tokens", "norm")
    up, table, norm = (f"model.{path}.weight" for path in paths)
    vector = IntegerEncoding(f"{norm}_dup_4", 16, np.array(0.0007), np.array(0), False)
    entries = {**all_entries(llama()), norm: vector}
    q = "model.layers.0.self_attn.q_proj.weight"
    entries[q] = entries[q].replace(name=f"{q}_dup_12_0")
    for name in ("lm_head.weight", DOWN):
        del entries[name]
    entries |= {up: FloatEncoding(up, 16), table: per_tensor(table, 16)}
    excluded = {"excluded_layers": ("lm_head",)}
    path = saved(tmp_path, entries.values(), "1.0.0", llama(), **excluded)
    keep_float = ["*.down_proj", "model.embed*"]
    checkpoint = AimetCheckpoint(tmp_path, path, keep_float=keep_float)
    for name in ("lm_head.weight", DOWN, up, table):
        assert torch.equal(read_floats(checkpoint, name), llama().get_parameter(name))
    on_its_grid = torch.full((32,), round(1 / 0.0007)) * torch.tensor(0.0007)  # of ones
    assert torch.equal(read_floats(checkpoint, norm), on_its_grid)
    read_integers(checkpoint, q)
    with pytest.raises(EncodingsFileError, match=r"'\*.down_prj' matches no .* mean .*down_proj"):
        AimetCheckpoint(tmp_path, path, keep_float=["*.down_proj", "*.down_prj"])
    twice = [*entries.values(), per_tensor(norm)]
    path = saved(tmp_path, twice, "1.0.0", llama(), **excluded)
    with pytest.raises(EncodingsFileError, match=rf"'{norm}_dup_4' and '{norm}' are one parameter"):
        AimetCheckpoint(tmp_path, path, keep_float=keep_float)
    with pytest.raises(EncodingsFileError, match=r"a float of 8 bits.*set model.keep_float: "):
        opened(tmp_path, [FloatEncoding(DOWN, 8), *all_entries(llama()).values()][:2])


def test_tied_weights_have_one_grid_or_stay_float_by_any_of_their_names(tmp_path: Path) -> None:
    model, table = llama(tied=True), "model.embed_tokens.weight"
    entries, head = all_entries(model), per_tensor("lm_head.weight")
    of_head_only = [e for name, e in entries.items() if "embed" not in name]
    for others in (entries.values(), of_head_only):
        read_integers(opened(tmp_path, [*others, head], model=model), table)
    for glob in ("lm_head*", "model.embed_tokens"):
        checkpoint = opened(tmp_path, [*entries.values(), head], model=model, keep_float=[glob])
        read_floats(checkpoint, table)
    with pytest.raises(EncodingsFileError, match=r"'lm_head.weight' are one parameter .*different"):
        opened(tmp_path, [*entries.values(), per_tensor("lm_head.weight", 8)], model=model)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(8)], ids=str)
@pytest.mark.parametrize("bitwidth", [3, 8])
def test_encodings_of_another_checkpoint_are_refused(tmp_path, bitwidth, granularity) -> None:
    """Scales that clip outliers are accepted, scales that are far too small or large are not."""

    def read(factor: float) -> None:
        entries = []
        for name, value in matrices(llama()).items():
            grid = measure(value, Scheme(bitwidth, True, granularity))
            grid = Encoding(grid.scheme, grid.scale * factor, grid.offset)
            entries.append(entry_of(name, grid, "1.0.0"))
        read_integers(opened(tmp_path / str(factor), entries), DOWN)

    for factor in (1.0, 0.7):
        read(factor)
    for factor in (0.1, 40.0 if bitwidth < 8 else 400.0):
        with pytest.raises(SourceError, match=rf"'{DOWN}': .*SQNR.*another checkpoint"):
            read(factor)


def test_a_float_that_is_nan_is_named(tmp_path: Path) -> None:
    model = llama()
    model.get_parameter(DOWN).data[0, 0] = torch.nan
    with pytest.raises(SourceError, match=f"'{DOWN}': 1 of 2048 values are nan"):
        opened(tmp_path, all_entries(model).values(), model=model).read(DOWN)
