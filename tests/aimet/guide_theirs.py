"""AIMET's guides to QW-LoRA and QWA-LoRA, step by step, on the data of `write_guide.py`.

The steps and their order are those of AIMET's `apply_qwlora.py` and `apply_qwalora.py`. What is
different, and why:

    weights     the snippets round every parameter to 4 bits per tensor; "any method" is allowed, so
                matrices have the grids of our base, with ranges that AIMET's min-max finds
    bitwidths   the snippets have 4 bits for all parameters and 16 for all outputs; here adapters
                have 8 (`set_bitwidth_for_lora_adapters`), and norms 16
    adapters    two on one base, as AIMET's page about PEFT: `enable_adapter_and_load_weights` and
                `disable_lora_adapters`
    residuals   AIMET rounds the input of OPT's first norm, but not the same value in the residual
                stream; we round a value where it is computed. That quantizer is removed
    gradients   stay enabled for quantizers: AIMET then divides by scales as we do, see
                docs/log/aimet-oracle.md
    device      the CPU
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip(
    "aimet_torch", reason="runs in an environment with aimet-torch: make test-aimet"
)
pytest.importorskip("transformers", reason="make test-aimet installs it")

from aimet_torch.nn import QuantizationMixin
from aimet_torch.peft import (
    LoraLayer,
    PeftQuantUtils,
    replace_lora_layers_with_quantizable_layers,
    track_lora_meta_data,
)
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.utils import remove_all_quantizers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from qwlora.grid.scheme import Scheme

from .oracle import aimet_numbers, aimet_shape

NAMES = ("first", "second")


# As in the guide: positions are not simulated.
@QuantizationMixin.implements(OPTLearnedPositionalEmbedding)
class QuantizedOPTLearnedPositionalEmbedding(QuantizationMixin, OPTLearnedPositionalEmbedding):
    forward = OPTLearnedPositionalEmbedding.forward


Numbers = tuple[Tensor, Tensor]  # scale, offset for unsigned codes; flat


@dataclass
class Simulated:
    """One calibrated use case: encodings by path of the module, and the evaluation logits."""

    outputs: dict[str, Numbers]
    inputs: dict[str, Numbers]  # `path.1` for the second
    parameters: dict[str, Numbers]
    logits: Tensor
    shortcut: Tensor  # logits under no_grad


@dataclass
class Guide:
    """What the guide's steps left."""

    base: dict[str, tuple[Tensor, QuantizeDequantize]]  # unsigned codes by parameter
    losses: dict[str, list[float]] = field(default_factory=dict)
    cases: dict[str, Simulated] = field(default_factory=dict)


def run_guide(
    folder: Path, adapters: Path, workflow: str, bits: int, grids: dict[str, Scheme], rates: Any
) -> Guide:
    """The guide from a float model to the logits of the base and two adapters.

    Args:
        folder: what `write_guide.py` wrote for the model.
        adapters: the trained adapters.
        bits: of activations.
        grids: of the base's weights.
        rates: learning rate of each adapter that is trained; none: the guide's training is skipped.
    """
    texts = load_file(folder / "texts.safetensors")

    # [setup]
    config = AutoConfig.from_pretrained(folder / "float")
    config.use_cache = False
    config.return_dict = False
    model = AutoModelForCausalLM.from_pretrained(
        folder / "float", config=config, attn_implementation="eager"
    ).eval()

    # [freeze_base_model_weights]
    base = calculate_and_fuse_encodings_into_weights(model, grids)
    quantizers = {model.get_parameter(name): quantizer for name, (_, quantizer) in base.items()}
    guide = Guide(base)
    model.load_adapter(str(folder / "start"), is_trainable=True)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}

    # [lora_training] of QW-LoRA
    if workflow == "qw":
        for name, rate in rates.items():
            model.load_state_dict(start, strict=False)
            guide.losses[name] = train_one_epoch(model, texts["training"], rate)

    # [ptq], [create_quantsim]
    replace_lora_layers_with_quantizable_layers(model)
    (folder / "aimet").mkdir(exist_ok=True)
    adapter_tools = PeftQuantUtils(track_lora_meta_data(model, str(folder / "aimet"), "lora"))
    dummy = texts["calibration"][:1, :16]
    quantsim = QuantizationSimModel(
        model=model,
        dummy_input=(dummy, torch.ones_like(dummy)),
        default_output_bw=bits,
        default_param_bw=4,
        in_place=True,
    )
    adapter_tools.set_bitwidth_for_lora_adapters(quantsim, output_bw=bits, param_bw=8)
    for _, module in quantsim.named_qmodules():
        if isinstance(module, nn.LayerNorm):
            module.input_quantizers[0] = None
        for kind, quantizer in module.param_quantizers.items():
            parameter = module.get_parameter(kind)
            if parameter in quantizers:
                module.param_quantizers[kind] = quantizers[parameter]
            elif quantizer is not None and parameter.ndim == 1:
                quantizer.bitwidth, quantizer.symmetric = 16, True
                # else AIMET takes a grid that holds the values exactly, if it finds one
                with quantizer.compute_encodings():
                    quantizer(parameter)
                quantizer.allow_overwrite(False)

    def use(name: str) -> None:
        if name == "base":
            adapter_tools.disable_lora_adapters(quantsim)
            return
        torch.save(adapter_weights(adapters / name), folder / "aimet" / "adapter.bin")
        adapter_tools.enable_adapter_and_load_weights(
            quantsim, str(folder / "aimet" / "adapter.bin"), use_safetensor=False
        )

    def calibrate(model: nn.Module) -> None:
        for ids in texts["calibration"].split(1):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    # [qwa_lora]
    if workflow == "qwa":
        use("base")
        parts = []
        for layer in quantsim.model.modules():
            if isinstance(layer, LoraLayer):
                parts += [layer.lora_A, layer.lora_B, layer.add_lora_to_res, layer.mul_scale]
        with remove_all_quantizers(parts):
            quantsim.compute_encodings(calibrate)
            guide.cases["base"] = simulated(quantsim, texts["evaluation"])
            for module in quantsim.model.modules():
                if isinstance(module, QuantizerBase):
                    module.allow_overwrite(False)
            for name, rate in rates.items():
                renamed = {n.replace(".default.", ".0."): p for n, p in start.items()}
                quantsim.model.load_state_dict(renamed, strict=False)
                guide.losses[name] = train_one_epoch(quantsim.model, texts["training"], rate)

    # Compute all other encodings
    for name in ("base", *NAMES):
        if name not in guide.cases:
            use(name)
            quantsim.compute_encodings(calibrate)
            guide.cases[name] = simulated(quantsim, texts["evaluation"])
    return guide


def calculate_and_fuse_encodings_into_weights(
    model: nn.Module, grids: dict[str, Scheme]
) -> dict[str, tuple[Tensor, QuantizeDequantize]]:
    """Codes and quantizer of each parameter that has a grid; the model gets the rounded values."""
    found = {}
    for name, parameter in model.named_parameters():
        if name not in grids:
            continue
        scheme = grids[name]
        shape, _ = aimet_shape(scheme, tuple(parameter.shape))
        quantizer = QuantizeDequantize(shape, scheme.bitwidth, scheme.symmetric)
        with quantizer.compute_encodings():
            quantizer(parameter)
        rounded = quantizer(parameter.data).detach()
        codes = rounded.quantize().as_subclass(Tensor).to(torch.int32) - quantizer.qmin
        found[name] = (codes, quantizer)
        parameter.data = rounded.as_subclass(Tensor).contiguous()
        quantizer.allow_overwrite(False)
    return found


def train_one_epoch(model: nn.Module, texts: Tensor, rate: float) -> list[float]:
    """The guide's loop, which trains LoRA layers only; returns the losses."""
    trained = []
    for path, module in model.named_modules():
        if isinstance(module, QuantizerBase):
            continue
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(".lora_" in path)
            trained += [parameter] if ".lora_" in path else []
    optimizer = torch.optim.AdamW(trained, lr=rate)
    loss_fn = nn.CrossEntropyLoss()
    losses = []
    for ids in texts.split(1):
        optimizer.zero_grad()
        (logits,) = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        loss = loss_fn(logits[0, :-1], ids[0, 1:])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    """A PEFT adapter by the names of AIMET's LoRA layers."""
    weights = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace(".weight", ".0.weight"): weight
        for name, weight in weights.items()
    }


def logits_of(model: nn.Module, evaluation: Tensor) -> Tensor:
    rows = [
        model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].detach()
        for ids in evaluation.split(1)
    ]
    return torch.cat(rows).as_subclass(Tensor)


def simulated(quantsim: QuantizationSimModel, evaluation: Tensor) -> Simulated:
    outputs, inputs, parameters = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for path, module in quantsim.named_qmodules():
        (outputs[path],) = module.output_quantizers
        for number, quantizer in enumerate(module.input_quantizers):
            inputs[f"{path}.{number}" if number else path] = quantizer
        parameters |= {f"{path}.{kind}": q for kind, q in module.param_quantizers.items()}
    encodings = (
        {p: aimet_numbers(q) for p, q in known.items() if q is not None and q.is_initialized()}
        for known in (outputs, inputs, parameters)
    )
    with torch.no_grad():
        shortcut = logits_of(quantsim.model, evaluation)
    return Simulated(*encodings, logits_of(quantsim.model, evaluation), shortcut)
