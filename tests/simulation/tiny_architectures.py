"""Tiny random models of many kinds and inputs for them. Only this file knows what they are called; the package does not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from qwlora.simulation.placement_rules import PlacementRule

VOCABULARY = 256
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ENCODER = {"hidden_size": 64, "intermediate_size": 128}
ENCODER |= {"num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**ENCODER, **IDS, "num_key_value_heads": 2, "max_position_embeddings": 128}
MOE = {"num_experts_per_tok": 2}

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Tiny:
    """A model, its keyword arguments for a seed, what is to have another grid than the rest, and how far a layer of the exported file may be off.

    The sine of an angle of hundreds of radians: the last bit of that angle in float32 is several steps of a 16-bit sine, and runtimes differ in it.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Inputs]

    rules: tuple[PlacementRule, ...] = ()
    layer_steps: float = 2.0
    layer_mean_steps: float = 0.05


def make(name: str, layers: int | None = None) -> nn.Module:
    """The model; of a decoder, with its first `layers` only: a graph takes time by the layer."""
    torch.manual_seed(0)
    model: Any = with_large_weights(ALL[name].model())
    if layers is not None:
        del model.get_decoder().layers[layers:]
        model.config.num_hidden_layers = layers
    return model


def with_large_weights(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with weights that are large enough to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4 if float(parameter.std()) < 0.05 else 1)
    return model.eval()


def inputs(name: str, seed: int = 0) -> Inputs:
    """Keyword arguments of the model's forward."""
    return ALL[name].inputs(torch.Generator().manual_seed(seed))


def _ids(g: torch.Generator, batch: int = 2, tokens: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=g)


def _noise(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)


def _text(g: torch.Generator) -> Inputs:
    ids = _ids(g)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _typed(g: torch.Generator) -> Inputs:
    return {**_text(g), "token_type_ids": torch.randint(0, 2, (2, 12), generator=g)}


def _sequence_to_sequence(g: torch.Generator) -> Inputs:
    return {**_text(g), "decoder_input_ids": _ids(g, tokens=7)}


IMAGE = {"sample_size": 16, "in_channels": 4, "out_channels": 4}
UNET = {
    **IMAGE,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
XL = {"attention_head_dim": (4, 8), "use_linear_projection": True}
XL |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 16}
XL |= {"projection_class_embeddings_input_dim": 32 + 6 * 16}
JOINT = {"attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32}
SD3 = {**IMAGE, **JOINT, "patch_size": 2, "num_layers": 2, "caption_projection_dim": 64}
SD3 |= {"pooled_projection_dim": 64, "pos_embed_max_size": 16}
FLUX = {**JOINT, "patch_size": 1, "in_channels": 32, "num_layers": 1, "num_single_layers": 1}
FLUX |= {"pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True}


def diffuser(kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        model: nn.Module = getattr(diffusers, kind)(**sizes)
        return model

    return build


def _latents(g: torch.Generator) -> Inputs:
    return {
        "sample": _noise(g, 2, 4, 16, 16),
        "timestep": torch.tensor([10, 500]),
        "encoder_hidden_states": _noise(g, 2, 7, 32),
    }


def _latents_xl(g: torch.Generator) -> Inputs:
    added = {"text_embeds": _noise(g, 2, 32), "time_ids": torch.full((2, 6), 16.0)}
    return {**_latents(g), "added_cond_kwargs": added}


def _joint(g: torch.Generator) -> Inputs:
    return {
        "hidden_states": _noise(g, 2, 4, 16, 16),
        "encoder_hidden_states": _noise(g, 2, 7, 32),
        "pooled_projections": _noise(g, 2, 64),
        "timestep": torch.tensor([10, 500]),
    }


def _packed_latents(g: torch.Generator) -> Inputs:
    rows = torch.arange(16)
    image = torch.stack([torch.zeros(16), rows // 4, rows % 4], -1)
    return {
        "hidden_states": _noise(g, 2, 16, 32),
        "encoder_hidden_states": _noise(g, 2, 7, 32),
        "pooled_projections": _noise(g, 2, 32),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": image,
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, **IDS}
OPT = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
OPT |= {"max_position_embeddings": 128, "word_embed_proj_dim": 64}
NEOX = {**ENCODER, **IDS, "max_position_embeddings": 128}
QWEN3_MOE = {**DECODER, **MOE, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32}
WHISPER = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
WHISPER |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, **IDS}
WHISPER |= {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
WHISPER |= {"decoder_start_token_id": 1}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "vocab_size": VOCABULARY}
GEMMA3 = {**DECODER, "head_dim": 16, "sliding_window": 8}
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention"]}
NARROW_ENCODER = {**ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
CLIP = {**ENCODER, **IDS, "max_position_embeddings": 32}
VIT = {**ENCODER, "image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 5}

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "patch_size": 4}
VISION |= {"num_attention_heads": 2, "image_size": 16}
QWEN2_VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
IMAGE_TOKENS = {"image_token_id": 5, "video_token_id": 6}
IMAGE_TOKENS |= {"vision_start_token_id": 3, "vision_end_token_id": 4}
GEMMA3_TOKENS = {"mm_tokens_per_image": 4, "boi_token_index": 3, "eoi_token_index": 4}
GEMMA3_TOKENS |= {"image_token_index": 5}
SMOLVLM = {"image_token_id": 5, "scale_factor": 2}
QWEN2_TEXT = {**DECODER, "rope_parameters": MROPE}
LLAMA_TEXT = {"model_type": "llama", **DECODER}

VISION_LANGUAGE: dict[str, Callable[[], Any]] = {
    "Qwen2-VL": lambda: t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(text_config=QWEN2_TEXT, vision_config=QWEN2_VISION, **IMAGE_TOKENS)
    ),
    "SmolVLM": lambda: t.SmolVLMForConditionalGeneration(
        t.SmolVLMConfig(text_config=LLAMA_TEXT, vision_config=VISION, **SMOLVLM)
    ),
    "Gemma 3, with images": lambda: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(text_config=GEMMA3, vision_config=VISION, **GEMMA3_TOKENS)
    ),
    "LLaVA": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config=LLAMA_TEXT,
            vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            image_token_index=5,
        )
    ),
}


def image_and_text(model: Any, seed: int = 0) -> Inputs:
    """What the language model of one of these reads: embeddings of text, and of an image in place of four tokens, with positions of three axes for the model that counts them."""
    g = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings()(_ids(g)).detach()
    embeddings[:, 3:7] = _noise(g, 2, 4, 64) * embeddings.std()
    positions = torch.arange(12).expand(2, 12)
    if "mrope_section" in (model.config.get_text_config().rope_parameters or {}):
        image = torch.tensor([[3, 3, 3, 3], [3, 3, 4, 4], [3, 4, 3, 4]])[:, None].expand(3, 2, 4)
        positions = positions.repeat(3, 1, 1)
        positions[..., 7:] -= 2
        positions[..., 3:7] = image
    mask = torch.ones(2, 12, dtype=torch.long)
    return {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": positions}


# At 8 bits two experts may be equally likely, and who is then the second of them no two runtimes agree about.
ROUTER = (PlacementRule("*.mlp.gate", bitwidth=16),)
U_NET = "UNet2DConditionModel"
ANGLES: dict[str, Any] = {"layer_steps": 8, "layer_mean_steps": 0.25}

ALL: dict[str, Tiny] = {
    "Llama": Tiny(lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)), _text),
    "OPT": Tiny(lambda: t.OPTForCausalLM(t.OPTConfig(**OPT)), _text),
    "GPT-2": Tiny(lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)), _text),
    "GPT-NeoX": Tiny(lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**NEOX)), _text),
    "Qwen2": Tiny(lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)), _text),
    "Qwen3": Tiny(lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER, head_dim=16)), _text),
    "Gemma 3": Tiny(lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GEMMA3)), _text),
    "Phi-3": Tiny(lambda: t.Phi3ForCausalLM(t.Phi3Config(**DECODER)), _text),
    "Mistral": Tiny(lambda: t.MistralForCausalLM(t.MistralConfig(**DECODER)), _text),
    "Mixtral": Tiny(
        lambda: t.MixtralForCausalLM(t.MixtralConfig(**DECODER, **MOE, num_local_experts=4)),
        _text,
        rules=ROUTER,
    ),
    "Qwen3-MoE": Tiny(lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**QWEN3_MOE)), _text, ROUTER),
    "BERT, classification": Tiny(
        lambda: t.BertForSequenceClassification(t.BertConfig(**NARROW_ENCODER, num_labels=3)),
        _typed,
    ),
    "ViT, classification": Tiny(
        lambda: t.ViTForImageClassification(t.ViTConfig(**VIT)),
        lambda g: {"pixel_values": _noise(g, 2, 3, 16, 16)},
    ),
    "Whisper": Tiny(
        lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER)),
        lambda g: {"input_features": _noise(g, 2, 8, 40), "decoder_input_ids": _ids(g, tokens=7)},
    ),
    "T5": Tiny(lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)), _sequence_to_sequence),
    "CLIP text": Tiny(lambda: t.CLIPTextModel(t.CLIPTextConfig(**CLIP)), _text),
    "Stable Diffusion UNet": Tiny(diffuser(U_NET, **UNET, attention_head_dim=8), _latents),
    "Stable Diffusion XL UNet": Tiny(diffuser(U_NET, **UNET, **XL), _latents_xl, **ANGLES),
    "SD3": Tiny(diffuser("SD3Transformer2DModel", **SD3), _joint),
    "Flux": Tiny(diffuser("FluxTransformer2DModel", **FLUX), _packed_latents, **ANGLES),
}
