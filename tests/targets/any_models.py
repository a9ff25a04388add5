"""Small models that are no causal language models, with two adapters trained on different data."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import qwlora
from qwlora import LayerRule, Scheme, Schemes
from qwlora.grid.scheme import parse_scheme
from qwlora.simulation.adapter_simulations import AdapterSimulations
from simulation.tiny_architectures import SD3, UNET, diffuser, make

HTP = Schemes(
    quantize_residual_adds=True, symmetric_matmul_second_input=True, adapter_weights=Scheme(8)
)
EIGHT_BITS = {nn.Conv2d: parse_scheme("w8-channel"), nn.Embedding: Scheme(8)}  # for the HTP
ADAPTERS = ("first", "second")
Batch = dict[str, Tensor]


class Cnn(nn.Module):
    """A classifier of images; one convolution has no bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, stride=2, bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(image))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def classified_image(adapter: str, g: torch.Generator) -> tuple[Batch, Tensor]:
    """An image, and which of its halves is brighter: the left one, or the upper one."""
    image = torch.randn(1, 3, 12, 12, generator=g)
    axis = 3 if adapter == "first" else 2
    label = torch.randint(0, 2, (1,), generator=g)
    image.narrow(axis, 6 * int(label), 6).add_(1)
    return {"image": image}, label


def classified_text(adapter: str, g: torch.Generator) -> tuple[Batch, Tensor]:
    """Token ids, and whether the first or the last one is below the middle of the vocabulary."""
    ids = torch.randint(3, 99, (1, 12), generator=g)
    label = (ids[:, 0 if adapter == "first" else -1] < 51).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, label


def noisy_picture(adapter: str, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Vertical or horizontal stripes and noise, and the noise: [1, 4, 16, 16] each."""
    noise, phase = (torch.randn(1, 4, *size, generator=g) for size in ((16, 16), (1, 1)))
    wave = torch.sin(torch.linspace(-9, 9, 16) + phase).expand(1, 4, 16, 16)
    return noise + (wave if adapter == "first" else wave.mT), noise


def unet_step(adapter: str, g: torch.Generator) -> tuple[Batch, Tensor]:
    picture, noise = noisy_picture(adapter, g)
    text = torch.randn(1, 7, 32, generator=g)
    return {"sample": picture, "timestep": torch.tensor([10]), "encoder_hidden_states": text}, noise


def dit_step(adapter: str, g: torch.Generator) -> tuple[Batch, Tensor]:
    picture, noise = noisy_picture(adapter, g)
    return {
        "hidden_states": picture,
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=g),
        "pooled_projections": torch.randn(1, 64, generator=g),
        "timestep": torch.tensor([10]),
    }, noise


def one_layer_bert() -> Any:
    model: Any = make("BERT, classification")
    del model.bert.encoder.layer[1:]
    return model


@dataclass(frozen=True)
class Kind:
    """A model, the layers with LoRA, an example for an adapter with what it has to answer, and
    layers that stay float."""

    build: Callable[[], Any]
    layers: str | list[str]
    example: Callable[[str, torch.Generator], tuple[Batch, Tensor]]
    schemes: Schemes = HTP
    tower: str = ""


KINDS = {
    "cnn": Kind(Cnn, ["first", "second", "head"], classified_image),
    "bert": Kind(one_layer_bert, ["query", "value"], classified_text),
    "dit": Kind(diffuser("SD3Transformer2DModel", **SD3), ["to_q", "to_v"], dit_step),
    "unet": Kind(
        diffuser("UNet2DConditionModel", **UNET, attention_head_dim=8),
        ["to_q", "to_k", "to_v", "to_out.0"],
        unet_step,
    ),
}


def batches(kind: str, seed: int = 1) -> list[Batch]:
    """Three examples, of both adapters, that no adapter was trained on."""
    g = torch.Generator().manual_seed(seed)
    return [KINDS[kind].example(adapter, g)[0] for adapter in ("first", "second", "first")]


def frozen(kind: str, rank: int = 2) -> nn.Module:
    """The model on integers, with two untrained adapters: of diffusers, by its own method."""
    torch.manual_seed(0)
    model = KINDS[kind].build().eval().requires_grad_(False)
    rules = [LayerRule(KINDS[kind].tower, None)] if KINDS[kind].tower else []
    rules += [
        LayerRule(name, EIGHT_BITS[type(module)])
        for name, module in model.named_modules()
        if type(module) in EIGHT_BITS
    ]
    qwlora.quantize_(model, "w4-channel", solver="rtn", rules=rules)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=KINDS[kind].layers)
    if type(model).__module__.startswith("diffusers"):
        for name in ADAPTERS:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                model.add_adapter(lora, name)
        return model
    adapted = get_peft_model(model, lora, ADAPTERS[0])
    adapted.add_adapter(ADAPTERS[1], lora)
    return adapted


def train_(model: Any, kind: str, steps: int) -> dict[str, list[float]]:
    """A few steps of Adam for each adapter on its own examples; returns the losses by adapter."""
    losses = {}
    for number, adapter in enumerate(ADAPTERS):
        model.set_adapter(adapter)
        own = f".{adapter}.weight"
        weights = [p for name, p in model.named_parameters() if "lora_" in name and own in name]
        optimizer = torch.optim.Adam([p.requires_grad_(True) for p in weights], lr=1e-2)
        g, found = torch.Generator().manual_seed(10 + number), []
        for _ in range(steps):
            batch, expected = KINDS[kind].example(adapter, g)
            answer = model(**batch)
            answer = answer if isinstance(answer, Tensor) else answer[0]
            if expected.is_floating_point():
                loss = mse_loss(answer, expected)
            else:
                loss = cross_entropy(answer.flatten(0, -2), expected.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        losses[adapter] = found
        model.requires_grad_(False)
    return losses


def simulated(kind: str, mode: Any = "all", steps: int = 3) -> AdapterSimulations:
    """Calibrated simulations of two trained adapters."""
    model = frozen(kind)
    train_(model, kind, steps)
    made = qwlora.simulate_adapters(model.eval(), batches(kind)[0], KINDS[kind].schemes, mode)
    made.calibrate(batches(kind))
    return made
