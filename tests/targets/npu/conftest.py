"""Adapters of two ranks on one set of encodings, and their files for each target and layout."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from qwlora import LayerRule, Schemes, export, quantize_
from qwlora.grid.scheme import parse_scheme
from qwlora.simulation.adapter_simulations import AdapterSimulations, simulate_adapters
from simulation.tiny_architectures import inputs, make
from targets.npu.test_npu_graph import SCHEMES

IDS = torch.randint(3, 256, (1, 14), generator=torch.Generator().manual_seed(7))
SAMPLE = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
CONTEXT, PIECE = 96, 8
Files = Callable[..., Path]


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(256)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")))


def simulated(
    kind: str = "Llama",
    schemes: Schemes = SCHEMES,
    embeddings: str = "w8-tensor",
    alpha: int = 8,
    rope_theta: float | None = None,
) -> AdapterSimulations:
    """Adapters of two ranks and this second alpha, on layers of which one is in both."""
    torch.manual_seed(3)
    model = make(kind)
    if rope_theta is not None:
        model.config.rope_parameters["rope_theta"] = rope_theta
    quantize_(
        model,
        "w4-channel",
        solver="rtn",
        rules=[LayerRule("*embed_tokens", parse_scheme(embeddings))],
    )
    random: Any = {"init_lora_weights": False}
    first = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], **random)
    second = LoraConfig(r=4, lora_alpha=alpha, target_modules=["v_proj", "down_proj"], **random)
    adapted = get_peft_model(model, first, adapter_name="first")
    adapted.add_adapter("second", second)
    made = simulate_adapters(adapted.eval(), inputs(kind), schemes, "none")
    made.calibrate([{"input_ids": IDS}])
    return made


def write(
    made: AdapterSimulations,
    folder: Path,
    target: str = "qnn",
    layout: str | None = None,
    **more: Any,
) -> None:
    sizes = {"graphs": [PIECE, 1], "context": [CONTEXT], **more}
    words = tokenizer() if layout else None
    export(made, target, folder, tokenizer=words, layout=layout, sample=SAMPLE, **sizes)


@pytest.fixture(scope="package")
def simulations() -> AdapterSimulations:
    return simulated()


@pytest.fixture(scope="package")
def files(simulations: AdapterSimulations, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The folder of a target and layout, written once."""

    @cache
    def folder(target: str, layout: str | None = None) -> Path:
        made = tmp_path_factory.mktemp(target) / "bundle"
        write(simulations, made, target, layout)
        return made

    return folder
