"""Every form of encodings file that AIMET writes is read exactly, or refused with the reason.

write_forms.py writes the folder with AIMET; this reads it in the environment of `make test`, and
writes the table of docs/log/aimet-forms.md:

    pytest tests/aimet/test_forms.py -m aimet --forms FOLDER --forms-table docs/log/aimet-forms.md
"""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", minversion="5", reason="AIMET's environment")

from qwlora import QuantizedTensor, load_precomputed, open_checkpoint, quantize_  # noqa: E402
from qwlora.errors import EncodingsFileError  # noqa: E402
from qwlora.nn import PackedLinear  # noqa: E402
from qwlora.nn.packed_layer import packed_weights  # noqa: E402

pytestmark = pytest.mark.aimet
GRIDS = ("tensor", "channel", "block", "lpbq")
FOLDERS = [f"{grid}-{way}" for grid in GRIDS for way in ("plain", "wrapped")]
VECTORS = "is vector quantization (VECTOR, of GPTVQ)"
NO_JSON = "is a pickle, a file of torch.save or safetensors, not JSON"
OTHERS = {
    "AdaRound": "exact",
    "GPTVQ": VECTORS,
    "GPTVQ, then sim.export 0.6.1": VECTORS,
    "GPTVQ, then sim.export 1.0.0": VECTORS,
    "MXFP4, sim.onnx.export 2.1.0": "is a float of 4 bits (MXFP4)",
    "NVFP4, sim.onnx.export 2.1.0": "is NVFP4",
    "torch.save of quantizer_state_dict": NO_JSON,
    "pickle of quantizer_state_dict": NO_JSON,
    "save_checkpoint": NO_JSON,
    "export_adapter_weights": NO_JSON,
}
HEAD = """# Encodings files that AIMET writes

Written by `make test-aimet` (tests/aimet/test_forms.py, option `--forms-table`); do not edit.
aimet-torch 2.42.0 wrote the files, {versions} read them.

A small Llama, every Linear weight of 4 bits: one scale per tensor or output channel, blocks of 16,
or LPBQ of 16 (8 bits decompressed). "Wrapped" was exported through a module that has the model as
its `m`, so that every name begins with `m.`; the prefix was found, not given.

**exact**: `load_precomputed(open_checkpoint(folder, file))` has the weights that AIMET's simulation
computes with, bit for bit, both from the float weights and from AIMET's rounded ones.
**as blocks**: also exact, but the file lists LPBQ's product scales alone, so that the grid is one
of blocks. Targets that need LPBQ need version 1.0.0 or later of it.

"""
BELOW = """
Version 0.6.1 and the forms by module do not say a block size. They are exact where the count of
scales leaves one reading: k blocks along the input for each output. As many scales as inputs could
also be one scale per input: refused, with the version to export instead.

## Weights that lie on a grid already, without a file

`quantize_(model, scheme, "rtn")` of the rounded weights:

"""


def written(folder: Path) -> list[Path]:
    """The files with encodings in a folder of one form."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.stem != "theirs")


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Path:
    folder: Path | None = request.config.getoption("--forms")
    if folder is None:
        pytest.skip("needs --forms, the folder that write_forms.py wrote")
    return folder


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, str]]]:
    """Outcome by form and folder; written at the end if nothing failed."""
    outcomes: dict[str, dict[str, str]] = {}
    yield outcomes
    path: Path | None = request.config.getoption("--forms-table")
    if path is None or request.session.testsfailed:
        return
    names = [name.replace("-", ", ") for name in FOLDERS]
    lines = [f"| form | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    forms = sorted(form for form in outcomes if form not in ("other", "rtn"))
    rows = (f"{form} | {' | '.join(outcomes[form][name] for name in FOLDERS)}" for form in forms)
    lines += [*(f"| {row} |" for row in rows)]
    lines += ["", "| what else AIMET writes | |", "|---|---|"]
    lines += [f"| {form} | {outcome} |" for form, outcome in outcomes["other"].items()]
    rtn = ["| grid | codes that differ | scales |", "|---|--:|---|"]
    rtn += [f"| {grid} | {outcome} |" for grid, outcome in outcomes["rtn"].items()]
    tools = ("torch", "transformers")
    versions = ", ".join(f"{tool} {version(tool).split('+')[0]}" for tool in tools)
    head = HEAD.format(versions=versions)
    path.write_text(head + "\n".join(lines) + "\n" + BELOW + "\n".join(rtn) + "\n")


def outcome(folder: Path, file: Path) -> str:
    """`exact`, or the reason of the refusal."""
    theirs = load_file(folder / "theirs.safetensors")
    kinds = set()
    for weights in ("float", "fused"):
        try:
            checkpoint = open_checkpoint(folder / weights, file)
        except EncodingsFileError as error:
            return str(error)
        model = load_precomputed(checkpoint)
        for name, values in theirs.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(layer, PackedLinear), name
            assert torch.equal(layer.tensor.dequantize(), values), name
            kinds.add(str(layer.tensor.encoding.scheme))
    (kind,) = kinds
    is_lpbq = "scales" in kind
    return "exact" if is_lpbq == folder.name.startswith("lpbq") else "as blocks"


def as_blocks(grid: str, file: str) -> bool:
    by_module = "json" in file or file.endswith("_torch.encodings")
    return grid == "lpbq" and (by_module or "0.6.1" in file)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_form_of_every_grid(root: Path, table: dict[str, Any], name: str) -> None:
    grid = name.partition("-")[0]
    forms = [p for p in sorted((root / name).iterdir()) if p.name.startswith("sim.")]
    files = [file for form in forms for file in written(form)]
    assert len(files) == 2 * 2 + 2 * 4 + 1
    for file in files:
        form = f"{file.parent.name}: {file.name}"
        found = outcome(root / name, file)
        assert found == ("as blocks" if as_blocks(grid, form) else "exact"), form
        table.setdefault(form, {})[name] = found


@pytest.mark.parametrize("form", OTHERS)
def test_what_else_aimet_writes(root: Path, table: dict[str, Any], form: str) -> None:
    folder = root / "other" / form
    weights = folder if form == "AdaRound" else root / "channel-plain"
    files = written(folder)
    assert files
    for file in files:
        assert OTHERS[form] in outcome(weights, file), file
    said = OTHERS[form] if OTHERS[form] == "exact" else f"refused: {OTHERS[form]}"
    failure = root / "other" / f"{form}.txt"
    if failure.exists():
        said = f"AIMET fails to write it ({failure.read_text()}); what it leaves is {said}"
    names = ", ".join(f"`{p.name}`" for p in files)
    table.setdefault("other", {})[f"{form} ({names})"] = said


@pytest.mark.parametrize("grid", GRIDS)
def test_rounded_weights_need_no_file(root: Path, table: dict[str, Any], grid: str) -> None:
    folder = root / f"{grid}-plain"
    file = folder / "sim.onnx.export 2.1.0 dynamo" / "model.encodings"
    checkpoint = open_checkpoint(folder / "float", file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "fused")
    scheme = {"block": "w4-block16", "lpbq": "w4-lpbq16"}.get(grid, f"w4-{grid}")
    quantize_(model, scheme, "rtn")
    differ, total, ulps = 0, 0, 0
    for name, layer in packed_weights(model).items():
        expected = checkpoint.read(name)
        assert isinstance(expected, QuantizedTensor)
        wrong = layer.quantized.codes != expected.codes
        differ, total = differ + int(wrong.sum()), total + wrong.numel()
        scale = expected.encoding.scale
        ulp = torch.nextafter(scale, torch.tensor(torch.inf)) - scale
        distance = (layer.quantized.encoding.scale - scale).abs() / ulp
        ulps = max(ulps, round(float(distance.max())))
    assert total  # all but the head, which quantize_ leaves float
    if grid == "lpbq":  # a block's integer cannot be recovered if its largest code is not in use
        assert 0 < differ < 0.005 * total
        table.setdefault("rtn", {})[grid] = f"{differ} of {total:,} | other integers in few blocks"
        return
    assert differ == 0
    assert ulps <= 1
    table.setdefault("rtn", {})[grid] = f"0 of {total:,} | off by at most {ulps} ulp"
