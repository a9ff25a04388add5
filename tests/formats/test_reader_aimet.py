"""AIMET encodings with a float checkpoint: entries are matched and transposed correctly, and all
problems are reported together.

AIMET's own files (tests/formats/aimet_encodings/files) are compared with each other: all versions describe the
same simulation. tests/aimet/test_reader.py compares with aimet-torch itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
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
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import Granularity, Lpbq, PerBlock, PerChannel, PerTensor, Scheme

GOLDEN = Path(__file__).parent / "aimet_encodings" / "files"
DOWN = "model.layers.0.mlp.down_proj.weight"


def llama(tied: bool = False) -> PreTrainedModel:
    return models.llama(vocab_size=48, num_hidden_layers=1, tie_word_embeddings=tied)


def gpt2() -> PreTrainedModel:
    return models.gpt2(vocab_size=48, n_layer=1)


# Grids of AIMET's own files


def grids(file: str, version: str) -> dict[str, Encoding]:
    """The grids of the two blocked layers, from a file of AIMET 2.42."""
    entries = read_encodings(GOLDEN / file).by_name
    found = {}
    for layer, shape in (("block", (6, 8)), ("lpbq", (8, 6))):
        folded = f"{layer}.weight_0"  # the ONNX exporter's name of a weight stored [in, out]
        name = folded if folded in entries else f"{layer}.weight"
        is_folded = name == folded
        layout = TensorLayout(shape, is_folded, 0, "tensor" if is_folded else "channel")
        found[layer] = grid_of(entries[name], layout, version)
    return found


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0", "2.1.0"])
def test_three_versions_of_aimets_onnx_exporter_say_the_grids_of_its_torch_exporter(
    version: str,
) -> None:
    expected = grids("aimet-export-1.0.0.encodings", "1.0.0")
    found = grids(f"aimet-{version}.encodings", version)
    assert all(found[layer].equals(expected[layer]) for layer in ("block", "lpbq"))
    assert found["block"].scheme == Scheme(4, True, PerBlock(4))
    assert found["lpbq"].scheme == Scheme(4, True, Lpbq(2, 4))


def test_the_order_of_a_flat_list_is_not_guessed() -> None:
    entry = read_encodings(GOLDEN / "aimet-1.0.0.encodings").by_name["block.weight_0"]
    with pytest.raises(
        SourceError,
        match=r"flat list of blocks.*order.*model.block_order: channel or tensor",
    ):
        grid_of(entry, TensorLayout((6, 8), transposed=True), "1.0.0")
    right, wrong = (
        grid_of(entry, TensorLayout((6, 8), True, 0, order), "1.0.0")
        for order in ("tensor", "channel")
    )
    assert not torch.equal(right.scale, wrong.scale)


def test_an_order_that_changes_nothing_need_not_be_known() -> None:
    entry = IntegerEncoding("w", 4, np.arange(1.0, 7.0), np.full(6, -8), True, block_size=8)
    assert grid_of(entry, TensorLayout((6, 8)), "1.0.0").scale.flatten().tolist() == [*range(1, 7)]
    alike = IntegerEncoding("w", 4, np.full(12, 0.5), np.full(12, -8), True, block_size=4)
    assert grid_of(alike, TensorLayout((6, 8)), "1.0.0").scale.shape == (6, 2)


@pytest.mark.parametrize("name", ["aimet-modules.json", "aimet-export-1.0.0_torch.encodings"])
def test_blocks_of_files_by_module_are_listed_by_channel(name: str) -> None:
    expected = grids("aimet-export-1.0.0.encodings", "1.0.0")
    entries = read_encodings(GOLDEN / name).by_name
    for layer, shape in (("block", (6, 8)), ("lpbq", (8, 6))):
        layout = TensorLayout(shape, block_order="channel")
        found = grid_of(entries[f"{layer}.weight"], layout, "0.6.1")
        assert torch.equal(found.scale, expected[layer].scale)


def test_blocks_that_0_6_1_lists_as_channels() -> None:
    """12 scales of [6, 8] are two blocks for each output, in the order of the tensor; LPBQ's scales
    are products of its factors."""
    expected = grids("aimet-2.1.0.encodings", "2.1.0")
    entries = read_encodings(GOLDEN / "aimet-0.6.1.encodings").by_name
    for layer, shape in (("block", (6, 8)), ("lpbq", (8, 6))):
        entry = entries[f"{layer}.weight_0"]
        found = grid_of(entry, TensorLayout(shape, True, 0, "tensor"), "0.6.1")
        assert torch.equal(found.scale, expected[layer].scale)
        assert found.scheme == Scheme(4, True, PerBlock(4 if layer == "block" else 2))
        with pytest.raises(SourceError, match="flat list of blocks in an unknown order"):
            grid_of(entry, TensorLayout(shape, transposed=True), "0.6.1")


@pytest.mark.parametrize(
    ("count", "shape", "message"),
    [
        (8, (4, 8), r"axis 0 of \[4, 8\] has 4; .* loses their shape \(one per input, or blocks\)"),
        (18, (6, 8), "lists scales of blocks as channels and loses their shape: export 1.0.0"),
        (4, (6, 8), "loses their shape: export 1.0.0"),
        (12, (6, 8, 1), r"has 12 scales, but axis 0 of \[6, 8, 1\] has 6$"),
    ],
)
def test_counts_of_scales_with_no_or_several_readings(
    count: int, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        grid_of(integers((count,)), TensorLayout(shape, block_order="channel"), "0.6.1")


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


def test_a_checkpoint_on_a_shifted_grid_is_packed_and_computes_its_levels(tmp_path: Path) -> None:
    model = llama()
    weight = model.get_parameter(DOWN).detach()
    scale = weight.abs().amax(1) / 2
    shifted = IntegerEncoding(
        DOWN, 2, scale.double().numpy(), np.full(len(scale), -2), True, zero_point_shift=0.5
    )
    entries = {**all_entries(model), DOWN: shifted}
    path = saved(tmp_path, list(entries.values()), "1.0.0", model)
    found = read_integers(AimetCheckpoint(tmp_path, path), DOWN)
    step = scale[:, None]
    codes = ((weight / step - 0.5).round() + 2).clamp(0, 3)  # AIMET's formula
    assert torch.equal(found.codes.float(), codes)
    torch.testing.assert_close(found.dequantize(), (codes - 1.5) * step, rtol=3e-7, atol=0)


def integers(
    shape: tuple[int, ...], *, scale: float = 1.0, offset: int = -8, **layout: Any
) -> Entry:
    scales, offsets = np.full(shape, scale), np.full(shape, offset)
    return IntegerEncoding("w", 4, scales, offsets, offset == -8, **layout)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (integers((3, 8), axis=0, block_size=2), "has blocks along the output"),
        (integers((6, 4), axis=1, block_size=4), r"has \[6, 4\] blocks, but .* needs \[6, 2\]"),
        (integers((5,), block_size=4), r"has 5 blocks, but a matrix of .* \[6, 8\] needs \[6, 2\]"),
        (integers((12,), block_size=3), "has blocks of 3, which do not divide"),
        (integers((7,), axis=0), r"has 7 scales, but axis 0 of \[6, 8\] has 6$"),
        (integers((), offset=3), r"an offset is outside \[-15, 0\]"),
        (integers((), scale=1e-60), "a scale is a finite positive number"),
        (LpbqEncoding("w", 4, 4, np.ones(12, dtype=int), np.ones(4)), "cannot share evenly"),
        (FloatEncoding("w", 8, "float8e4m3fn", np.ones(())), "is a float of 8 bits"),
    ],
)
def test_entries_that_are_no_grid(entry: Entry, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        grid_of(entry, TensorLayout((6, 8)), "2.0.0")


def test_low_power_scales_without_their_largest_integer_are_blocks() -> None:
    """Their two factors could not be found again from the product."""
    entry = LpbqEncoding("w", 4, 4, np.tile([[3, 2]], (6, 1)), np.full((6, 1), 0.25), axis=1)
    found = grid_of(entry, TensorLayout((6, 8)), "2.0.0")
    assert found.scheme == Scheme(4, True, PerBlock(4))
    assert found.scale.tolist() == [[0.75, 0.5]] * 6
    halves = grid_of(
        LpbqEncoding("w", 4, 2, np.full((6, 4), 2), np.tile([[0.25, 0.5]], (6, 1)), axis=1),
        TensorLayout((6, 8)),
        "2.0.0",
    )
    assert halves.scale[0].tolist() == [0.5, 0.5, 1.0, 1.0]


# Whole checkpoints


def saved(
    folder: Path, entries: list[Entry], version: str, model: PreTrainedModel, **more: Any
) -> Path:
    model.save_pretrained(folder)
    rest: dict[str, Any] = {"producer": {"package": "aimet-torch", "version": "2.42.0"}}
    if version < "2":
        rest |= {
            "parameters": frozenset(e.name for e in entries),
            "excluded_layers": (),
            "quantizer_args": {},
        }
    write_encodings(
        EncodingsFile(version, tuple(entries), **rest | more), folder / "model.encodings"
    )
    return folder / "model.encodings"


def opened(
    folder: Path,
    entries: Iterable[Entry],
    version: str = "1.0.0",
    model: PreTrainedModel | None = None,
    **more: Any,
) -> Any:
    path = saved(folder, list(entries), version, model or llama())
    return open_checkpoint(folder, path, **more)


def matrices(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.data for name, value in model.named_parameters() if value.ndim == 2}


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0", "2.1.0"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(8), Lpbq(8)], ids=str)
@pytest.mark.parametrize("folded", [False, True])
def test_every_version_gives_the_grid_that_was_written(
    tmp_path: Path, version: str, granularity: Granularity, folded: bool
) -> None:
    """Both of AIMET's exporters: the parameter's own name, and `NAME_0` stored as [in, out]."""
    if version == "0.6.1" and isinstance(granularity, PerBlock | Lpbq):
        pytest.skip("0.6.1 has no blocks")
    scheme = Scheme(4, True, granularity)
    expected = {name: measure(value, scheme) for name, value in matrices(llama()).items()}
    entries = [
        entry_of(f"{name}_0" if folded else name, encoding, version, transposed=folded)
        for name, encoding in expected.items()
    ]
    checkpoint = opened(tmp_path, entries, version)
    for name, value in llama().named_parameters():
        found = checkpoint.read(name)
        if name not in expected:
            assert isinstance(found, torch.Tensor)
            assert torch.equal(found, value)
            continue
        assert isinstance(found, QuantizedTensor)
        assert found.encoding.scheme == scheme
        assert torch.equal(found.dequantize(), expected[name].fake_quantize(value.data))


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(8)], ids=str)
def test_a_layer_that_stores_its_weight_in_by_out(
    tmp_path: Path, version: str, granularity: Granularity
) -> None:
    """GPT-2's Conv1D: integers are [out, in], and a flat list of blocks needs its order."""
    scheme = Scheme(4, False, granularity)
    floats = {name: value for name, value in matrices(gpt2()).items() if ".h." in name}
    expected = {name: measure(value.t(), scheme) for name, value in floats.items()}
    entries = [
        entry_of(name, encoding, version, transposed=True) for name, encoding in expected.items()
    ]
    encodings = saved(tmp_path, entries, version, gpt2())
    arguments: dict[str, Any] = {"keep_float": ["lm_head"]}
    if version == "1.0.0" and isinstance(granularity, PerBlock):
        with pytest.raises(
            EncodingsFileError,
            match=r"'transformer.h.0.attn.c_attn.weight' is a flat list of blocks",
        ):
            open_checkpoint(tmp_path, encodings, **arguments)
        arguments["block_order"] = "tensor"
    checkpoint = open_checkpoint(tmp_path, encodings, **arguments)
    for name, value in floats.items():
        found = read_integers(checkpoint, name)
        assert found.codes.shape == value.shape[::-1]
        assert torch.equal(found.dequantize(), expected[name].fake_quantize(value.t()))


def test_a_file_of_another_producer_needs_the_order_of_its_blocks(tmp_path: Path) -> None:
    expected = {
        name: measure(value, Scheme(4, True, PerBlock(8)))
        for name, value in matrices(llama()).items()
    }
    entries = [
        entry_of(name, encoding, "1.0.0", transposed=True) for name, encoding in expected.items()
    ]
    encodings = saved(
        tmp_path, entries, "1.0.0", llama(), producer={"package": "aimet-onnx", "version": "2.42.0"}
    )
    with pytest.raises(EncodingsFileError, match=r"9 problems(.|\n)*flat list of blocks"):
        open_checkpoint(tmp_path, encodings)
    found = read_integers(open_checkpoint(tmp_path, encodings, block_order="tensor"), DOWN)
    assert torch.equal(found.encoding.scale, expected[DOWN].scale)


def per_tensor(name: str, bitwidth: int = 4) -> IntegerEncoding:
    return IntegerEncoding(name, bitwidth, np.array(0.01), np.array(-(2 ** (bitwidth - 1))), True)


def all_entries(model: PreTrainedModel) -> dict[str, Entry]:
    return {name: per_tensor(name) for name in matrices(model)}


def test_everything_that_does_not_fit_is_one_error(tmp_path: Path) -> None:
    entries = all_entries(llama())
    entries["layers.0.mlp.down_proj.weight"] = per_tensor(DOWN.removeprefix("model."))
    del entries[DOWN]
    del entries["lm_head.weight"]
    up = "model.layers.0.mlp.up_proj.weight"
    entries[up] = per_tensor(up, 16)
    with pytest.raises(EncodingsFileError) as raised:
        opened(tmp_path, entries.values())
    assert len(raised.value.problems) == 3
    message = str(raised.value)
    assert (
        f"'{DOWN}', the weight of a Linear layer, has no entry (near: "
        "layers.0.mlp.down_proj.weight)" in message
    )
    assert "'lm_head.weight', the weight of a Linear layer, has no entry" in message
    assert "To keep it float, set model.keep_float: [lm_head] in the recipe" in message
    assert f"'{up}' has 16 bits, but weights must have 2 to 8 bits" in message


def renamed(entries: Iterable[Entry], change: Callable[[str], str]) -> list[Entry]:
    return [entry.replace(name=change(entry.name)) for entry in entries]


@pytest.mark.parametrize("version", ["0.6.1", "2.0.0"])
@pytest.mark.parametrize("prefix", [None, "m.", "m"])
def test_a_prefix_of_a_wrapper_is_found_or_given(
    tmp_path: Path, version: str, prefix: str | None
) -> None:
    """Also in the names of excluded layers, and of weights that are stored [in, out]."""
    entries = [e.replace(signed=version > "2" or None) for e in all_entries(llama()).values()]
    wrapped = renamed(entries[:-1], lambda name: f"m.{name}_0")
    excluded = {"excluded_layers": ("m.lm_head",)} if version < "2" else {}
    more: dict[str, Any] = {} if version < "2" else {"keep_float": ["lm_head"]}
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
    with pytest.raises(
        EncodingsFileError, match=r"make 2 .*: student\., teacher\.\. Set model.pre"
    ):
        matched_encodings(two, path)
    with pytest.raises(EncodingsFileError, match=r"'teacher.up.weight', the .* has no entry"):
        matched_encodings(two, path, prefix="student")
    kept = matched_encodings(two, path, keep_float=["teacher.*"], prefix="student")
    assert list(kept) == ["student.up.weight", "student.down.weight"]


def test_a_copy_of_a_parameter_is_the_parameter(tmp_path: Path) -> None:
    """AIMET's TorchScript exporter calls a copy NAME_dup_4, and that stored [in, out] NAME_0."""
    norm, copied = "model.layers.0.input_layernorm.weight", "_dup_4"
    vector = IntegerEncoding(norm + copied, 16, np.array(0.0007), np.array(0), False)
    entries = {**all_entries(llama()), norm: vector}
    entries[DOWN] = entries[DOWN].replace(name=f"{DOWN}_dup_12_0")
    checkpoint = opened(tmp_path, entries.values())
    assert torch.equal(
        read_floats(checkpoint, norm), torch.full((32,), 1429) * torch.tensor(0.0007)
    )
    read_integers(checkpoint, DOWN)
    with pytest.raises(EncodingsFileError, match=rf"'{norm}_dup_4' and '{norm}' are one parameter"):
        opened(tmp_path, [*entries.values(), per_tensor(norm)])


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_entries_of_unknown_parameters_are_one_warning(tmp_path: Path, version: str) -> None:
    lora = f"{DOWN.removesuffix('.weight')}.lora_A.weight"
    unknown = [per_tensor(name) for name in (lora, "model.embed_tokns.weight_0")]
    entries = [*all_entries(llama()).values(), *unknown]
    signed = [e.replace(signed=True if version > "2" else None) for e in entries]
    with pytest.warns(QwloraWarning) as raised:
        checkpoint = opened(tmp_path, signed, version)
    (warning,) = raised
    assert re.search(
        rf"no parameter for 2 of {len(entries)} entries, which change nothing: '{lora}' \(near: "
        r".*model.embed_tokns.weight_0' \(near: model.embed_tokens.weight, ",
        str(warning.message),
    )
    read_integers(checkpoint, DOWN)


def test_activations_of_2_x_are_not_taken_for_parameters(tmp_path: Path) -> None:
    entries = [*all_entries(llama()).values(), per_tensor("/model/layers.0/Add_output_0", 16)]
    checkpoint = opened(tmp_path, [e.replace(signed=True) for e in entries], "2.0.0")
    read_integers(checkpoint, DOWN)


def test_what_stays_float(tmp_path: Path) -> None:
    """Layers that the file excludes, that keep_float names, and entries of 16-bit floats."""
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    entries = all_entries(llama())
    for name in ("lm_head.weight", DOWN, up):
        del entries[name]
    entries |= {
        up: FloatEncoding(up, 16),
        "model.embed_tokens.weight": per_tensor("model.embed_tokens.weight", 16),
    }
    encodings = saved(
        tmp_path, list(entries.values()), "1.0.0", llama(), excluded_layers=("lm_head",)
    )
    checkpoint = AimetCheckpoint(tmp_path, encodings, keep_float=["*.down_proj", "model.embed*"])
    floats = dict(llama().named_parameters())
    for name in ("lm_head.weight", DOWN, up, norm, "model.embed_tokens.weight"):
        found = read_floats(checkpoint, name)
        assert torch.equal(found, floats[name])
    with pytest.raises(
        EncodingsFileError,
        match=r"is a float of 8 bits, not an integer.*AIMET, or set model.keep_float: ",
    ):
        opened(tmp_path, [FloatEncoding(DOWN, 8), *all_entries(llama()).values()][:2])


def test_vectors_stay_float_on_their_grid(tmp_path: Path) -> None:
    norm, other = "model.norm.weight", "model.layers.0.input_layernorm.weight"
    scale = 0.0007
    vector = IntegerEncoding(norm, 16, np.array(scale), np.array(0), False)
    entries = [*all_entries(llama()).values(), vector, per_tensor(other, 32)]
    checkpoint = opened(tmp_path, entries)
    found, untouched = checkpoint.read(norm), checkpoint.read(other)
    assert isinstance(found, torch.Tensor)
    assert isinstance(untouched, torch.Tensor)
    assert torch.equal(found, torch.full((32,), round(1 / scale)) * torch.tensor(scale))
    assert torch.equal(untouched, torch.ones(32))


def test_tied_weights_have_one_grid(tmp_path: Path) -> None:
    model = llama(tied=True)
    entries, head = all_entries(model), per_tensor("lm_head.weight")
    of_head_only = [e for name, e in entries.items() if "embed" not in name]
    for others in (entries.values(), of_head_only):
        checkpoint = opened(tmp_path, [*others, head], model=model)
        read_integers(checkpoint, "model.embed_tokens.weight")
    with pytest.raises(
        EncodingsFileError,
        match=r"'lm_head.weight' are one parameter of the model, but have different encodings",
    ):
        opened(tmp_path, [*entries.values(), per_tensor("lm_head.weight", 8)], model=model)


def test_a_float_that_is_nan(tmp_path: Path) -> None:
    model = llama()
    model.get_parameter(DOWN).data[0, 0] = torch.nan
    with pytest.raises(SourceError, match=f"'{DOWN}': 1 of 2048 values are nan"):
        opened(tmp_path, all_entries(model).values(), model=model).read(DOWN)


@pytest.mark.parametrize("bitwidth", [3, 4, 8])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(8)], ids=str)
def test_encodings_of_another_checkpoint_are_refused(
    tmp_path: Path, bitwidth: int, granularity: Granularity
) -> None:
    """Scales that clip outliers are accepted, scales that are far too small or large are not."""

    def checkpoint(factor: float) -> Any:
        entries = []
        for name, value in matrices(llama()).items():
            grid = measure(value, Scheme(bitwidth, True, granularity))
            grid = Encoding(grid.scheme, grid.scale * factor, grid.offset)
            entries.append(entry_of(name, grid, "1.0.0"))
        return opened(tmp_path / str(factor), entries)

    for factor in (1.0, 0.7):
        read_integers(checkpoint(factor), DOWN)
    for factor in (0.1, 40.0 if bitwidth < 8 else 400.0):
        with pytest.raises(
            SourceError,
            match=rf"'{DOWN}': .*SQNR of .* dB.*clips [\d,]+ of 2,048.*another checkpoint",
        ):
            checkpoint(factor).read(DOWN)
