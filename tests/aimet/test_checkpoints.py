"""aimet-torch takes the files of target `qairt_pipeline`: same integers, same logits.

write_checkpoints.py writes them with transformers 5; AIMET's tracer needs 4.49 or older.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .oracle import GroupedBlockQuantizeDequantize, QuantizationSimModel, QuantizeDequantize, ulps

load_file = pytest.importorskip("safetensors.torch").load_file
pytestmark = [pytest.mark.aimet, pytest.mark.filterwarnings("ignore")]
GRIDS = {  # bitwidth, symmetric, whether one scale a tensor, block
    "w4-tensor": (4, True, True, None),
    "w8-tensor-asymmetric": (8, False, True, None),
    "w4-channel": (4, True, False, None),
    "w4-channel-asymmetric": (4, False, False, None),
    "w8-block16": (8, True, False, 16),
    "w4-block16-asymmetric": (4, False, False, 16),
    "w4-lpbq16": (4, True, False, 16),
}
LOGITS = 1e-5  # of the largest


@pytest.fixture(params=GRIDS)
def grid(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(grid: str, request: pytest.FixtureRequest) -> Path:
    written: Path | None = request.config.getoption("--checkpoints")
    if written is None:
        pytest.skip("needs --checkpoints, the folder that write_checkpoints.py wrote")
    return written / grid


@pytest.fixture
def expected(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder / "expected.safetensors")
    return tensors


def loaded(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "base", attn_implementation="eager").eval()
    model.config.use_cache = model.config.return_dict = False  # for the tracer
    return model


def quantizer(grid: str, shape: tuple[int, int]) -> nn.Module:
    bitwidth, symmetric, is_tensor, block = GRIDS[grid]
    if block is None:
        return QuantizeDequantize(() if is_tensor else (shape[0], 1), bitwidth, symmetric)
    blocks: Any = {"bitwidth": bitwidth, "symmetric": symmetric, "block_size": (1, block)}
    scales = (shape[0], shape[1] // block)
    if "lpbq" not in grid:
        return QuantizeDequantize(scales, **blocks)
    return GroupedBlockQuantizeDequantize(
        scales, decompressed_bw=8, block_grouping=(1, scales[1]), **blocks
    )


def simulation(model: Any, ids: Tensor, grid: str) -> QuantizationSimModel:
    sim = QuantizationSimModel(model, ids, default_param_bw=4, default_output_bw=16)
    for _, module in layers(sim):
        module.param_quantizers["weight"] = quantizer(grid, tuple(module.weight.shape))
    return sim


def layers(sim: QuantizationSimModel) -> list[tuple[str, Any]]:
    """The quantized linear layers."""
    found = sim.model.named_modules()
    return [(n, m) for n, m in found if isinstance(m, nn.Linear) and n != "lm_head"]


def check_integers(sim: QuantizationSimModel, expected: dict[str, Tensor]) -> None:
    for name, module in layers(sim):
        known, quantizing = expected[f"{name}.weight.codes"], module.param_quantizers["weight"]
        scale = quantizing.get_scale().detach()
        assert ulps(scale.flatten(), expected[f"{name}.weight.scale"]) <= 2
        offset = (quantizing.get_offset().detach() + quantizing.qmin).broadcast_to(scale.shape)
        values = quantizing(module.weight).detach().as_subclass(Tensor)
        if scale.ndim == 2:
            width = known.shape[1] // scale.shape[1]
            scale, offset = (t.repeat_interleave(width, dim=1) for t in (scale, offset))
        assert torch.equal((values / scale).round() - offset, known.float())


def test_loaded_encodings_give_the_same_integers_and_logits(
    grid: str, folder: Path, expected: dict[str, Tensor]
) -> None:
    sim = simulation(loaded(folder), expected["ids"], grid)
    # what has no encoding, activations too, stays float
    sim.load_encodings(str(folder / "base" / "model_torch.encodings"), partial=False)
    check_integers(sim, expected)
    with torch.no_grad():
        logits = sim.model(expected["ids"])[0]
    assert (logits - expected["base"]).abs().max() <= LOGITS * expected["base"].abs().max()


def test_frozen_encodings_stay_what_they_are(
    grid: str, folder: Path, expected: dict[str, Tensor]
) -> None:
    sim = simulation(loaded(folder), expected["ids"], grid)
    sim.set_and_freeze_param_encodings(str(folder / "base" / "model_torch.encodings"))
    sim.compute_encodings(lambda model: model(expected["ids"]))
    check_integers(sim, expected)


def test_the_adapter_computes_what_was_trained(folder: Path, expected: dict[str, Tensor]) -> None:
    """In the oldest transformers and PEFT that read the files here."""
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(loaded(folder), folder / "first").eval()
    with torch.no_grad():
        logits = model(expected["ids"])[0]
    assert (logits - expected["adapter"]).abs().max() <= LOGITS * expected["adapter"].abs().max()
