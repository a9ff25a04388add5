"""Our simulation of a small Llama equals aimet-torch's, if placements are equal.

Compared are every encoding, every quantized value, and the logits. Our half is written by
`write_simulations.py` with transformers 5; AIMET's tracer needs 4.49 or older. Encodings and
simulated values are equal bit for bit if gradients are enabled, where AIMET divides by the scale.
Under `torch.no_grad()` it multiplies by the reciprocal, which changes some codes and all values
computed from them; then logits differ by at most `SHORTCUT_ERROR`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwlora.grid.encoding import Encoding
from qwlora.grid.scheme import Scheme

from .llama import ForwardLogits, adapt_, llama, make_modules_
from .oracle import (
    QuantizationMixin,
    QuantizationSimModel,
    QuantizeDequantize,
    aimet_numbers,
    aimet_shape,
    ulps,
)
from .table import Comparison, Table

load_file = pytest.importorskip("safetensors.torch").load_file
pytestmark = [pytest.mark.aimet, pytest.mark.filterwarnings("ignore")]
CASES = 6
SHORTCUT_ERROR = 0.002  # of the largest logit
READ_BY = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm.mul"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm.mul"),
    "down_proj": "mlp.mul",
}


@dataclass
class Ours:
    """Our half of a case, as `write_simulations.py` wrote it."""

    record: dict[str, Any]
    encodings: dict[str, Encoding]
    weights: dict[str, Tensor]
    adapter: dict[str, Tensor]
    batches: dict[str, Tensor]
    results: dict[str, Tensor]

    @property
    def values(self) -> dict[str, Tensor]:
        """The simulated values by name."""
        named = {name.partition("values."): value for name, value in self.results.items()}
        return {name: value for (_, prefix, name), value in named.items() if prefix}

    def activation_of(self, path: str) -> str | None:
        """Our name for the output of AIMET's module at `path`."""
        values = [n for n in self.encodings if f"values.{n}" in self.results]
        named = [n for n in values if path in (n, n.rpartition(".")[0])]
        exact = [n for n in named if n == path] or named
        assert len(exact) <= 1, f"{path} could be {exact}"
        return exact[0] if exact else None


@dataclass
class Pair:
    """Both sides of one case, calibrated on the same batches."""

    ours: Ours
    simulation: QuantizationSimModel
    plain: Tensor
    activations: dict[str, list[nn.Module]]  # AIMET's quantizers by our name
    parameters: dict[str, nn.Module]


@pytest.fixture(scope="module", params=range(CASES))
def pair(request: pytest.FixtureRequest) -> Pair:
    folder = request.config.getoption("--simulations")
    if folder is None:
        pytest.skip(
            "our half is missing: make test-aimet, or tests/aimet/write_simulations.py FOLDER and "
            "--simulations FOLDER"
        )
    here = folder / f"{request.param}"
    record = json.loads((here / "case.json").read_text())
    known = load_file(here / "encodings.safetensors")
    encodings = {
        name: Encoding(Scheme.from_json(scheme), known[f"{name}.scale"], known[f"{name}.offset"])
        for name, scheme in record["schemes"].items()
    }
    parts = ("float", "adapter", "batches", "results")
    tensors = (load_file(here / f"{part}.safetensors") for part in parts)
    return make_pair(Ours(record, encodings, *tensors))


def make_pair(ours: Ours) -> Pair:
    """AIMET's calibrated simulation, its placement matched to ours or compared with it."""
    model = llama(ours.record["model"], ours.weights)
    if not ours.record["as_aimet"]:
        make_modules_(model)
    if ours.adapter:
        adapt_(model, ours.adapter, ours.record["scaling"])
    wrapped = ForwardLogits(model)
    example = inputs(ours.batches["evaluation"])
    with torch.no_grad():
        plain = wrapped(*example)
        bitwidth = ours.encodings["lm_head.linear"].scheme.bitwidth
        simulation = QuantizationSimModel(
            wrapped, example, default_output_bw=bitwidth, default_param_bw=8
        )
    activations: dict[str, list[nn.Module]] = {}
    parameters: dict[str, nn.Module] = {}
    for path, module in quantized_modules(simulation):
        place_parameters_(path, module, ours, parameters)
        if not ours.record["as_aimet"]:
            place_output_(path, module, ours)
        for name, quantizer in placed(path, module, ours):
            activations.setdefault(name, []).append(quantizer)
    batches = sorted(name for name in ours.batches if name.startswith("calibration"))
    simulation.compute_encodings(lambda m: [m(*inputs(ours.batches[name])) for name in batches])
    return Pair(ours, simulation, plain, activations, parameters)


def inputs(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.ones_like(ids)


def quantized_modules(simulation: QuantizationSimModel) -> Iterator[tuple[str, nn.Module]]:
    for path, module in simulation.model.named_modules():
        if isinstance(module, QuantizationMixin):
            yield path.removeprefix("model."), module


def place_parameters_(
    path: str, module: nn.Module, ours: Ours, found: dict[str, nn.Module]
) -> None:
    """Set quantizers of our schemes on the parameters that have an encoding on both sides."""
    for kind in module.param_quantizers:
        name = f"{path.removesuffix('.linear')}.{kind}"
        scheme = ours.encodings[name].scheme
        shape, block_size = aimet_shape(scheme, tuple(getattr(module, kind).shape))
        found[name] = module.param_quantizers[kind] = QuantizeDequantize(
            shape, scheme.bitwidth, scheme.symmetric, block_size=block_size
        )


def place_output_(path: str, module: nn.Module, ours: Ours) -> None:
    """Quantize each value where it is computed, and nowhere else, as we do."""
    name = ours.activation_of(path)
    scheme = ours.encodings[name].scheme if name else None
    module.output_quantizers[0] = (
        QuantizeDequantize((), scheme.bitwidth, scheme.symmetric) if scheme else None
    )
    for i in range(len(module.input_quantizers)):
        module.input_quantizers[i] = None


def placed(path: str, module: nn.Module, ours: Ours) -> Iterator[tuple[str, nn.Module]]:
    """AIMET's activation quantizers of one module, by our names."""
    if module.output_quantizers[0] is not None:
        name = ours.activation_of(path)
        assert name, f"AIMET quantizes the output of {path}, and we do not"
        yield name, module.output_quantizers[0]
    if len(module.input_quantizers) and module.input_quantizers[0] is not None:
        owner, _, last = path.rpartition(".")
        yield f"{owner.rpartition('.')[0]}.{READ_BY[last]}", module.input_quantizers[0]


def values_of(pair: Pair) -> dict[str, Tensor]:
    """Outputs of AIMET's modules in one simulated forward, by our names."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda m, i, output, name=name: seen.__setitem__(name, output.detach())
        )
        for path, module in quantized_modules(pair.simulation)
        if (name := pair.ours.activation_of(path)) and module.output_quantizers[0] is not None
    ]
    try:
        seen["logits"] = pair.simulation.model(*inputs(pair.ours.batches["evaluation"])).detach()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_both_float_models_are_equal(pair: Pair) -> None:
    """In float, without quantizers, both versions of transformers compute the same logits."""
    assert torch.equal(pair.plain, pair.ours.results["plain"])


def test_same_values_are_quantized(pair: Pair) -> None:
    ours = set(pair.ours.values)
    assert set(pair.activations) == ours
    assert set(pair.parameters) == set(pair.ours.encodings) - ours
    assert len(ours) > 15


def test_encodings_and_values_are_equal(pair: Pair, comparison: Comparison, table: Table) -> None:
    name = comparison.name = f"simulation of a 2-layer Llama, {pair.ours.record['name']}"
    for known in (pair.activations, {n: [q] for n, q in pair.parameters.items()}):
        for encoding_name, quantizers in known.items():
            encoding = pair.ours.encodings[encoding_name]
            for quantizer in quantizers:
                scale, offset = aimet_numbers(quantizer)
                comparison.tensors += 1
                comparison.scales += scale.numel()
                apart = ulps(scale, encoding.scale.flatten())
                comparison.worst_ulps = max(comparison.worst_ulps, apart)
                comparison.scales_differ += int((scale != encoding.scale.flatten()).sum())
                comparison.offsets_differ += int((offset != encoding.offset.flatten()).sum())
    expected = pair.ours.values | {"logits": pair.ours.results["simulated"]}
    dividing = values_of(pair)
    with torch.no_grad():
        shortcut = values_of(pair)
    for value_name, value in dividing.items():
        comparison.values += value.numel()
        comparison.values_differ += int((value != expected[value_name]).sum())
        comparison.shortcut_differ += int((shortcut[value_name] != expected[value_name]).sum())
    largest = float(expected["logits"].abs().max())
    moved, difference, between = (
        float((a - b).abs().max()) / largest
        for a, b in (
            (expected["logits"], pair.plain),
            (dividing["logits"], expected["logits"]),
            (shortcut["logits"], expected["logits"]),
        )
    )
    table.notes.append(
        f"**{name}**: largest difference of logits of {value.shape[0]} x {value.shape[1]} tokens, "
        f"relative to the largest logit. From the float model: {moved:.2g}; from AIMET: "
        f"{difference:.2g}; from AIMET under `no_grad`: {between:.2g} (allowed {SHORTCUT_ERROR})."
    )
    assert comparison.worst_ulps == 0
    assert comparison.offsets_differ == 0
    assert comparison.values_differ == 0
    assert moved > 10 * difference
    assert between <= SHORTCUT_ERROR
