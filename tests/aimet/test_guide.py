"""AIMET's guides in AIMET and here, from the float model to the logits: the same numbers.

For OPT and SmolLM2-135M, QW-LoRA and QWA-LoRA, in Python and by recipe. `write_guide.py` writes our
half, `guide_theirs.py` runs AIMET's. Compared are the integers of the base, the losses of training,
every encoding that AIMET has, and the logits of the base and of two adapters, where both tools
quantize the same values. Where our policy places the quantizers, encodings of what AIMET quantizes
too are equal, and the logits differ by the rounding of what AIMET leaves float.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwlora.grid.encoding import sqnr_db
from qwlora.grid.scheme import Scheme

from .guide_theirs import NAMES, Guide, Numbers, run_guide
from .oracle import aimet_numbers, ulps
from .table import Table
from .test_simulation import READ_BY

load_file = pytest.importorskip("safetensors.torch").load_file
pytestmark = [pytest.mark.aimet, pytest.mark.filterwarnings("ignore")]
MODELS, WORKFLOWS, WAYS = ("opt", "smollm2"), ("qw", "qwa"), ("python", "recipe")
CASES = [(model, workflow, way) for model in MODELS for workflow in WORKFLOWS for way in WAYS]
USES = ("base", *NAMES)
LORA = {"lora_B.0": "mul", "lora_A.0": "lora_A.linear", "add_lora_to_res": "add"}
SCALING = 2.0  # alpha / rank; a power of two, so that AIMET's order of factors rounds as ours does


@dataclass
class Pair:
    """Both sides of one case."""

    record: dict[str, Any]
    base: dict[str, Tensor]
    ours: dict[str, dict[str, Tensor]]  # encodings and logits by use
    own: dict[str, dict[str, Tensor]]  # the same, placed by our policy
    theirs: Guide
    cells: dict[str, Any] = field(default_factory=dict)  # of the table


def numbers(known: dict[str, Tensor], name: str) -> Numbers | None:
    if f"{name}.scale" not in known:
        return None
    return known[f"{name}.scale"].flatten(), known[f"{name}.offset"].flatten().to(torch.int32)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def pair(request: pytest.FixtureRequest, table: Table) -> Iterator[Pair]:
    root: Path | None = request.config.getoption("--guide")
    if root is None:
        pytest.skip(
            "our half is missing: make test-aimet, or tests/aimet/write_guide.py FOLDER and "
            "--guide FOLDER"
        )
    model, workflow, way = request.param
    folder = root / model
    here = folder / f"{workflow}-{way}"
    record = json.loads((here / "record.json").read_text())
    grids = {name: Scheme.from_json(scheme) for name, scheme in record["base"].items()}
    theirs = run_guide(folder, here / "adapters", workflow, record["bits"], grids, record["rates"])
    own = {use: here / f"own.{use}.safetensors" for use in USES}
    made = Pair(
        record,
        load_file(here / "integers.safetensors"),
        {use: load_file(here / f"{use}.safetensors") for use in USES},
        {use: load_file(path) for use, path in own.items() if path.exists()},
        theirs,
    )
    yield made
    table.guide.append({"case": f"{record['model']}, {workflow.upper()}, {way}", **made.cells})


def our_name(path: str, names: set[str]) -> str:
    """Our name for the output of AIMET's module."""
    path = path.removesuffix(".base_layer")
    for suffix, renamed in LORA.items():
        if path.endswith(f".{suffix}"):
            return f"{path.removesuffix(suffix)}{renamed}"
    found = [name for name in names if path in (name, name.rpartition(".")[0])]
    exact = [name for name in found if name.endswith(".linear")] or found
    assert len(exact) == 1, f"{path} could be {exact}"
    return exact[0]


def our_input(path: str) -> str:
    """Our name for what AIMET's module reads, where it quantizes that too."""
    layer = path.removesuffix(".base_layer").removesuffix(".lora_A.0")
    owner, _, last = layer.rpartition(".")
    return f"{owner.rpartition('.')[0]}.{READ_BY[last]}"


def activations(known: dict[str, Tensor]) -> set[str]:
    names = {key.removesuffix(".scale") for key in known if key.endswith(".scale")}
    return {name for name in names if not name.endswith((".weight", ".bias"))}


Item = tuple[str, str, Numbers, Numbers]  # AIMET's quantizer, our name, both encodings


def compared(pair: Pair, use: str, known: dict[str, Tensor]) -> Iterator[Item]:
    """Every activation that AIMET quantizes.

    AIMET's LoRA layer computes lora_B(scaling * lora_A(x)), PEFT and we scaling * lora_B(lora_A(x)).
    """
    names = activations(known)
    theirs = pair.theirs.cases[use]
    factor = 1.0 if use == "base" else SCALING  # a zero adapter: the smallest scale for all zeros
    for path, encoding in theirs.outputs.items():
        scaled = path.endswith(".mul_scale")
        name = our_name(path.replace(".mul_scale", ".lora_A.0"), names)
        ours = numbers(known, name) or pytest.fail(f"{path}: we have no encoding of {name}")
        if scaled:
            name, ours = f"{SCALING:g} x {name}", (ours[0] * factor, ours[1])
        yield path, name, encoding, ours
    for path, encoding in theirs.inputs.items():
        if path.endswith(".mul_scale.1"):
            continue  # the scaling itself: a constant that we do not round
        name = our_input(path)
        ours = numbers(known, name) or pytest.fail(f"{path}: we have no encoding of {name}")
        yield f"input of {path}", name, encoding, ours


def is_input_of_an_adapter(item: Item) -> bool:
    return item[0].startswith("input of ") and item[0].endswith(".lora_A.0")


def follows(item: Item) -> bool:
    """Whether it is a value of an adapter that differs by what rounding makes of those inputs."""
    scales = float(item[2][0]), float(item[3][0])
    return ".lora_" in item[0] and math.isclose(*scales, rel_tol=1e-4)


def differing(items: Iterable[Item]) -> tuple[list[str], int]:
    """Names of encodings that are not equal bit for bit, and the largest distance of scales."""
    found, most = [], 0
    for _, name, (scale, offset), (our_scale, our_offset) in items:
        if not (torch.equal(scale, our_scale) and torch.equal(offset, our_offset)):
            found.append(name)
            most = max(most, ulps(scale, our_scale))
    return found, most


def row_of(item: Item, bits: int) -> str:
    path, name, (scale, offset), (our_scale, our_offset) = item
    low, high = offset * scale, (offset + 2**bits - 1) * scale
    cells = [f"{float(x):.6g}" for x in (low, high, scale)] + [str(int(offset))]
    same = torch.equal(scale, our_scale) and torch.equal(offset, our_offset)
    here = "" if same else f"{float(our_scale):.6g}, {int(our_offset)}"
    return f"| `{path}` | `{name}` | {' | '.join(cells)} | {here} |"


def decibels(expected: Tensor, other: Tensor) -> float:
    """How close `other` is to `expected`."""
    noise = (other.double() - expected.double()).square().sum()
    return sqnr_db(float(expected.double().square().sum()), float(noise))


def test_the_integers_of_the_base_are_equal(pair: Pair) -> None:
    theirs = pair.theirs.base
    assert len(theirs) > 10
    assert {name.removesuffix(".codes") for name in pair.base if name.endswith(".codes")} - {
        "lm_head.weight"  # in AIMET it is the embedding
    } == theirs.keys() - {"lm_head.weight"}
    weights = differ = 0
    for name, (codes, quantizer) in theirs.items():
        scale, offset = aimet_numbers(quantizer)
        assert torch.equal(scale, pair.base[f"{name}.scale"].flatten()), name
        assert torch.equal(offset, pair.base[f"{name}.offset"].flatten().to(torch.int32)), name
        weights += codes.numel()
        differ += int((codes != pair.base[f"{name}.codes"].to(torch.int32)).sum())
    pair.cells["weights"] = f"{differ} of {weights:,}"
    assert differ == 0


def test_training_has_the_same_losses(pair: Pair) -> None:
    if not pair.record["rates"]:
        pytest.skip("a recipe has a loop of its own")
    worst = 0.0
    for name, losses in pair.record["losses"].items():
        theirs = pair.theirs.losses[name]
        assert len(set(losses)) == len(losses) > 2
        worst = max(worst, *(abs(a - b) / b for a, b in zip(losses, theirs, strict=True)))
    pair.cells["losses"] = f"{worst:.1g}"
    assert worst < 1e-5


def test_encodings_of_adapters_and_norms_are_equal(pair: Pair) -> None:
    count = 0
    for use in USES:
        for path, theirs in pair.theirs.cases[use].parameters.items():
            name = path.replace(".base_layer.", ".").replace(".0.weight", ".weight")
            if name in pair.theirs.base or name == "lm_head.weight":
                continue
            ours = numbers(pair.ours[use], name) or pytest.fail(f"{name} has no encoding")
            count += 1
            assert torch.equal(theirs[0], ours[0]), (name, theirs[0], ours[0])
            assert torch.equal(theirs[1], ours[1]), (name, theirs[1], ours[1])
    pair.cells["parameters"] = f"0 of {count}"


def test_encodings_of_activations_are_equal(pair: Pair, table: Table) -> None:
    every = [item for use in USES for item in compared(pair, use, pair.ours[use])]
    differ, most = differing(every)
    pair.cells["activations"] = f"{len(differ)} of {len(every)}" + (f", {most} ulp" if most else "")
    if (pair.record["model"], pair.record["workflow"], bool(pair.own)) == ("OPT", "qw", True):
        items = compared(pair, "first", pair.ours["first"])
        table.encodings = [
            row_of(item, pair.record["bits"]) for item in items if ".layers.1." not in item[1]
        ]
    if pair.record["workflow"] == "qwa":  # see table.py
        every = [item for item in every if not (is_input_of_an_adapter(item) or follows(item))]
    assert differing(every)[0] == []
    for use in USES:  # nothing else is quantized here
        assert activations(pair.ours[use]) <= {
            n for _, n, *_ in compared(pair, use, pair.ours[use])
        }


def test_logits_are_equal(pair: Pair) -> None:
    divided, shortcut = [], []
    for use in USES:
        ours, theirs = pair.ours[use]["logits"], pair.theirs.cases[use]
        largest = float(ours.abs().max())
        divided.append(float((theirs.logits - ours).abs().max()) / largest)
        shortcut.append(decibels(ours, theirs.shortcut))
    pair.cells["logits"] = ", ".join(f"{value:.2g}" for value in divided)
    pair.cells["shortcut"] = ", ".join(f"{value:.0f}" for value in shortcut)
    for use, value in zip(USES, divided, strict=True):
        inputs = [i for i in compared(pair, use, pair.ours[use]) if is_input_of_an_adapter(i)]
        assert value == 0 or (pair.record["workflow"] == "qwa" and differing(inputs)[0]), use


def test_our_own_placement_has_the_same_encodings_and_more(pair: Pair) -> None:
    if not pair.own:
        pytest.skip("written in Python only")
    every = [item for use in USES for item in compared(pair, use, pair.own[use])]
    differ, _ = differing(every)
    count = sum(len(activations(pair.own[use])) for use in USES)
    theirs = [decibels(pair.theirs.cases[use].logits, pair.own[use]["logits"]) for use in USES]
    pair.cells["own"] = f"{len(differ)} of {len(every)}; {count:,}"
    pair.cells["own_logits"] = ", ".join(f"{value:.0f}" for value in theirs)
    if pair.record["workflow"] == "qw":  # observed in float, so the placement has no influence
        assert differ == []
    assert min(theirs) > 10
