"""The side of AIMET: it runs in an environment with aimet-torch, transformers 4.49 and peft.

    python aimet_theirs.py FOLDER     for `aimet.py`: the steps of AIMET's QW-LoRA guide

The model is transformers' own, as in the guide. AIMET quantizes modules; operators that are
functions (products of attention, rotary embeddings, residual adds) stay float.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import aimet_torch  # registers Llama's norms itself
import torch
from aimet_torch.common.quantsim_config.config_utils import get_path_for_target_config
from aimet_torch.peft import (
    PeftQuantUtils,
    replace_lora_layers_with_quantizable_layers,
    track_lora_meta_data,
)
from aimet_torch.quantization.affine import GroupedBlockQuantizeDequantize, QuantizeDequantize
from aimet_torch.quantsim import QuantizationSimModel
from peft import PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aimet.llama import ForwardLogits  # the tests' own
from measuring import Phases, machine_line, train_

CONFIG = "htp_quantsim_config_v75_per_channel_linear"
NAMES = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
EXPORT = {**NAMES, "dynamo": False, "opset_version": 21}
PACKAGES = ("torch", "transformers", "peft", "onnx", "aimet-torch")


def quantizer_of(name: str, weight: Tensor, block: int | None) -> QuantizeDequantize:
    """4 bits for linear layers, 8 for embeddings and the head, which are one tensor or not."""
    outputs, inputs = weight.shape
    if "embed_tokens" in name or "lm_head" in name:
        return QuantizeDequantize((), 8, True)
    if block is None:
        return QuantizeDequantize((outputs, 1), 4, True)
    return GroupedBlockQuantizeDequantize(
        (outputs, inputs // block), 4, True, 8, None, (1, block), block_grouping=(1, -1)
    )


def round_weights_(model: nn.Module, block: int | None) -> dict[Tensor, QuantizeDequantize]:
    """Step 1 of the guide: put every matrix on its grid; returns the quantizers by parameter."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            quantizer = quantizer_of(name, parameter, block)
            with quantizer.compute_encodings():
                quantizer(parameter)
            parameter.data = quantizer(parameter.data).detach().as_subclass(Tensor).contiguous()
            quantizer.allow_overwrite(False)
            found[parameter] = quantizer
    return found


def place_weights_(
    simulation: QuantizationSimModel, base: dict[Tensor, QuantizeDequantize]
) -> None:
    """Step 1's quantizers; 8 bits per tensor for the adapter, 16 for norms."""
    for _, module in simulation.named_qmodules():
        for kind in module.param_quantizers:
            weight = module.get_parameter(kind)
            bits = 16 if weight.ndim == 1 else 8
            own = base.get(weight) or QuantizeDequantize((), bits, True)
            module.param_quantizers[kind] = own


def differing_weights(found: dict[str, nn.Parameter], expected: Path) -> dict[str, int]:
    """How many of the base's rounded weights are not bit for bit those in the file."""
    weights, differ = 0, 0
    with safe_open(expected, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            expected_weight = file.get_tensor(name)
            weights += expected_weight.numel()
            differ += int((expected_weight != found[name]).sum())
    return {"weights": weights, "differ": differ}


def run_guide(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "settings.json").read_text())
    phases, texts = Phases(), load_file(folder / "texts.safetensors")
    out = folder / "aimet"
    out.mkdir(exist_ok=True)

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "float", attn_implementation="eager")
    with phases("quantize"):
        base = round_weights_(model, settings["block"])
    weights = dict(model.named_parameters(remove_duplicate=False))
    adapted = PeftModel.from_pretrained(model, folder / "start", is_trainable=True)
    training = texts["training"].split(1)
    with phases("train"):
        losses = train_(adapted, training[: settings["compared_steps"]])
    set_peft_model_state_dict(adapted, load_file(folder / "trained" / "adapter_model.safetensors"))

    adapted.requires_grad_(False).eval()
    replace_lora_layers_with_quantizable_layers(adapted)
    wrapped = ForwardLogits(adapted)
    adapters = PeftQuantUtils(track_lora_meta_data(wrapped, str(out), "lora"))
    ids = texts["evaluation"][:1, : settings["graph_tokens"]]
    example = (ids, torch.ones_like(ids))
    with phases("simulate"):
        simulation = QuantizationSimModel(
            wrapped,
            example,
            default_output_bw=16,
            config_file=get_path_for_target_config(CONFIG),
            in_place=True,
        )
        place_weights_(simulation, base)
    own = {n: p.detach().clone() for n, p in simulation.model.named_parameters() if ".lora_" in n}
    own = {name: p for name, p in own.items() if name.endswith(".weight")}
    torch.save(own, out / "adapter.bin")

    @torch.no_grad()
    def logits(model: nn.Module, text: str) -> list[Tensor]:
        return [model(each, torch.ones_like(each)) for each in texts[text].split(1)]

    def use_adapter() -> None:
        adapters.enable_adapter_and_load_weights(simulation, out / "adapter.bin", False)

    def calibrate(model: nn.Module) -> None:
        adapters.disable_lora_adapters(simulation)
        logits(model, "calibration")
        use_adapter()
        logits(model, "calibration")

    with phases("calibrate"):
        simulation.compute_encodings(calibrate)
    with phases("evaluate"):
        simulated = {"adapter": torch.cat(logits(simulation.model, "evaluation"))}
        adapters.disable_lora_adapters(simulation)
        simulated["base"] = torch.cat(logits(simulation.model, "evaluation"))
    save_file(simulated, folder / "aimet-logits.safetensors")
    use_adapter()
    with phases("export"):
        simulation.onnx.export(example, str(out / "model.onnx"), **EXPORT)
        adapters.export_adapter_weights(simulation, str(out), "adapter")
    with phases("export for the HTP"):
        (out / "qdq").mkdir(exist_ok=True)
        qdq = str(out / "qdq" / "model.onnx")
        aimet_torch.onnx.export(simulation, example, qdq, prequantize_constants=True, **EXPORT)
    activations = sum(
        q is not None
        for _, module in simulation.named_qmodules()
        for q in (*module.input_quantizers, *module.output_quantizers)
    )
    return {
        "machine": machine_line(PACKAGES),
        "phases": phases.figures,
        "losses": losses,
        "base_weights": differing_weights(weights, folder / "rounded.safetensors"),
        "activation_quantizers": activations,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run_guide(Path(sys.argv[1]))))
