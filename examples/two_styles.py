"""Two LoRA styles on one frozen diffusion transformer: trained, exported, switched, drawn.

    pip install '.[onnx]' diffusers          in a clone; for the HTP's emulator, also '.[qnn]'
    python examples/two_styles.py OUT [--steps 200]

The transformer is SD3's class of diffusers with tiny sizes and random weights, and it draws in one
step: noise in, picture out. So the pictures show that adapters work and are switched, not what a
trained model draws. Load a real model with `from_pretrained`, and use your own training loop.

    OUT/base, OUT/stripes, OUT/rings     what was frozen and trained, for load_base and load_adapter
    OUT/onnx, OUT/qnn                    one base and two adapters for ONNX Runtime, and for the HTP
    OUT/*.png                            pictures of the simulation and of both runtimes
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor

import qwlora
from qwlora.grid.scheme import PerChannel, Scheme
from qwlora.targets.registry import TARGETS

SIZE, STYLES = 16, ("stripes", "rings")


def batch(seed: int) -> dict[str, Tensor]:
    """One batch of the transformer's inputs."""
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 3, SIZE, SIZE, generator=g),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=g),
        "pooled_projections": torch.randn(1, 64, generator=g),
        "timestep": torch.tensor([10]),
    }


def picture_of(style: str) -> Tensor:
    """What an adapter learns to draw: [1, 3, SIZE, SIZE], -1 to 1."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * 2, indexing="ij")
    wave = torch.sin(9 * x) if style == "stripes" else torch.cos(9 * (x * x + y * y))
    return torch.stack([wave, y, -wave])[None]


def draw(picture: Tensor, file: Path) -> None:
    """Write a picture as PNG, each value as 12 x 12 pixels."""
    pixels = ((picture[0].clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0)
    image = Image.fromarray(pixels.contiguous().numpy())
    image.resize((12 * SIZE, 12 * SIZE), Image.Resampling.NEAREST).save(file)


def main() -> None:
    """From freezing to pictures; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    chosen = parser.parse_args()
    out: Path = chosen.out
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        patch_size=2,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=SIZE,
    ).eval()

    # 1. freeze; the convolution needs 8 bits for the HTP
    model.requires_grad_(False)
    rules = [qwlora.LayerRule("pos_embed.proj", Scheme(8, granularity=PerChannel(0)))]
    qwlora.quantize_(model, "w4-channel", solver="rtn", rules=rules)
    qwlora.save_base(model, out / "base")

    # 2. two adapters, by diffusers' own method, trained on the integers
    for style in STYLES:
        layers = ["to_q", "to_v", "proj", "linear_2", "proj_out"]
        model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=layers), style)
        model.set_adapter(style)
        weights = [p for name, p in model.named_parameters() if f".{style}." in name]
        optimizer = torch.optim.Adam([p.requires_grad_(True) for p in weights], lr=5e-3)
        for step in range(chosen.steps):
            loss = (model(**batch(step)).sample - picture_of(style)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{style}: loss {float(loss):.4f}")
        model.requires_grad_(False)
        qwlora.save_adapter(model, out / style, adapter=style)

    # 3. simulate: one set of grids for both adapters, so that both fit into one graph of the HTP
    schemes = qwlora.Schemes(
        quantize_residual_adds=True,
        symmetric_matmul_second_input=True,
        adapter_weights=Scheme(8),
    )
    simulations = qwlora.simulate_adapters(model.eval(), batch(0), schemes, base_activations="none")
    batches = [batch(seed) for seed in range(4)]
    simulations.calibrate(batches)

    # 4. export, verify, switch in one session, draw
    has_htp = importlib.util.find_spec("onnxruntime_qnn") is not None
    for target in ("onnx", "qnn") if has_htp else ("onnx",):
        qwlora.export(simulations, target, out / target, sample=batch(0))
        for row in qwlora.verify(out / target, simulations, batches):
            value = "equal" if row.value is None else f"{row.value:.4g} {row.unit}"
            print(f"{target}: {'PASS' if row.passed else 'FAIL'} {row.what}: {value}")
        runtime, drawn = TARGETS[target].open(out / target, STYLES[0]), []
        for style in (*STYLES, STYLES[0]):
            runtime.use(out / target / style)
            drawn.append(runtime.run(simulations[style].bind(batch(9)))["sample"])
            draw(drawn[-1], out / f"{style}-{target}.png")
        print(f"{target}: equal on return: {torch.equal(drawn[0], drawn[2])}")
    for style in STYLES:
        draw(simulations[style].outputs(batch(9))["sample"], out / f"{style}-simulation.png")


if __name__ == "__main__":
    main()
