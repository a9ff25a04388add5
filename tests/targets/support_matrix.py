"""What each target holds: docs/support.md, written from what the code refuses and runtimes ran.

python -m targets.support_matrix schemes          from `tests`: rewrites the table of schemes
python -m targets.support_matrix architectures    runs every architecture in every runtime
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.pytorch_utils import Conv1D

from conftest import byte_tokenizer
from formats.gguf_models import metadata_of, stored_shapes, write_file
from qwlora import quantize_, save_adapter
from qwlora.data.sequences import as_sequences
from qwlora.errors import CaptureError, ExportError
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme, SignedBlock, short_name
from qwlora.nn.packed_layer import packed_weights
from qwlora.targets.canonical_adapter import read_canonical
from qwlora.targets.registry import TARGETS, vllm_problem
from qwlora.targets.target import ExportedBase
from qwlora.targets.target_compatibility import refusals
from qwlora.targets.weights.weights_folder import layer_kind
from simulation.tiny_architectures import DECODER, make, with_large_weights
from targets.proofs import verify_weights

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
ARCHITECTURES = ("Llama", "Qwen3", "Gemma 3", "Phi-3", "Mistral", "GPT-2", "OPT", "Mixtral")
WEIGHTS = {name: t for name, t in TARGETS.items() if not t.is_simulated}
GGUF: dict[str, tuple[str, dict[str, Any]]] = {  # what a GGUF file calls it, and more metadata
    "Llama": ("llama", {}),
    "Qwen3": ("qwen3", {"qwen3.attention.key_length": 128, "qwen3.attention.value_length": 128}),
    "Gemma 3": (
        "gemma3",
        {"gemma3.attention.key_length": 256, "gemma3.attention.value_length": 256},
    ),
    "Phi-3": ("phi3", {}),
    "Mistral": ("llama", {}),
    "GPT-2": ("gpt2", {}),
}
NOT_IN_GGUF = {  # what transformers takes for every file
    "Qwen3": {"head_dim": 128},
    "Gemma 3": {"head_dim": 256},  # for which attention is scaled
    "GPT-2": {"n_positions": 1024},
}
SPECIAL_TOKENS = {"bos": 1, "eos": 2, "padding": 0}
SCHEMES = [
    *(
        Scheme(bits, symmetric, granularity)
        for bits in (2, 3, 4, 5, 6, 8)
        for symmetric in (True, False)
        for granularity in (PerBlock(32), PerBlock(64), PerBlock(128), PerChannel())
    ),
    *(
        Scheme(bits, granularity=SignedBlock(size))
        for bits in (2, 3, 4, 5, 6, 8)
        for size in (32, 64, 128)
    ),
    *(
        Scheme(bits, False, granularity, float_offset=True)
        for bits in (2, 3, 4, 5, 8)
        for granularity in (PerBlock(32), PerBlock(64), PerBlock(128), PerChannel())
    ),
]


def table(rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def scheme_table() -> str:
    """Which scheme each target holds exactly."""
    rows: list[tuple[str, ...]] = [("grid", *TARGETS, "hf in vLLM")]
    for scheme in SCHEMES:
        cells = ("no" if target.scheme_problem(scheme) else "yes" for target in TARGETS.values())
        rows.append((short_name(scheme), *cells, "no" if vllm_problem([scheme]) else "yes"))
    return table(rows)


def outcome(architecture: str, name: str) -> str:
    """`yes` if the runtime computes base and adapter, or why it does not."""
    target = WEIGHTS[name]
    if target.missing():
        return "not run"
    if name == "gguf" and architecture not in GGUF:
        return "no: transformers reads no GGUF files of it"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for part in ("base", "trained", "adapter"):
            (folder / part).mkdir()
        model, source = made(architecture, name, folder)
        kinds = {layer_kind(layer): ["one"] for layer in packed_weights(model).values()}
        if problems := refusals(target, kinds=kinds, model_type=model.config.model_type):
            return f"no: {problems[0].partition(': one')[0]}"
        try:
            target.backend.write_base(
                ExportedBase(model, byte_tokenizer(), source), folder / "base"
            )
            adapted = with_adapter(model)
            save_adapter(adapted, folder / "trained")
            canonical = read_canonical(folder / "trained")
            target.backend.write_adapter(canonical, folder / "base", folder / "adapter")
            ids = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(1))
            runtime = target.open(folder)
            rounding = target.backend.rounding(adapted)
            found = verify_weights(
                runtime, adapted, folder / "adapter", as_sequences(ids), rounding
            )
        except (ExportError, CaptureError) as error:
            first = (str(error).splitlines()[1:] or [str(error)])[0]  # of the layers, or the whole
            return f"no: {first.rpartition(': ')[2]}"
        problems = found.problems
        return "no: more than rounding differs" if problems else "yes"


def made(architecture: str, name: str, folder: Path) -> tuple[Any, Path | None]:
    """A tiny random model with 4-bit integers, and its GGUF file if target `name` needs one."""
    if architecture == "Gemma 3":  # mlx-lm asks for the sixth layer, the first with full attention
        torch.manual_seed(0)
        config = Gemma3TextConfig(**{**DECODER, "num_hidden_layers": 6}, head_dim=16)
        model: Any = with_large_weights(Gemma3ForCausalLM(config))
    else:
        model = make(architecture)
    if name != "gguf":
        quantize_(model, "w4-block32", solver="search")
        return model, None
    kind, more = GGUF[architecture]
    if architecture == "Mistral":
        model = make("Llama")  # what its GGUF files call it
    for key, value in NOT_IN_GGUF.get(architecture, {}).items():
        setattr(model.config, key, value)
    tokens = {f"tokenizer.ggml.{n}_token_id": token for n, token in SPECIAL_TOKENS.items()}
    source = write_file(
        folder / "random.gguf",
        kind,
        {**metadata_of(kind, model.config, kind), "tokenizer.ggml.model": "no_vocab"}
        | tokens
        | more,
        stored_shapes(kind, model.config),
        lambda tensor, shape: "Q4_0" if tensor.startswith("blk") and len(shape) > 1 else "F32",
        tokens=model.config.vocab_size,
    )
    return load_precomputed(open_checkpoint(source)), source


def with_adapter(model: Any) -> PeftModel:
    """An adapter on all linear layers; PEFT's own choice of all includes experts."""
    heads = (model.get_output_embeddings(), None)
    layers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in heads
    ]
    config = LoraConfig(r=4, target_modules=layers, init_lora_weights=False)
    return get_peft_model(model, config).eval()


def written(heading: str) -> str:
    """The table under a heading of the page."""
    return PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]


def cell(architecture: str, name: str) -> str:
    """What the page says about an architecture and a target."""
    rows = [line.strip("| ").split(" | ") for line in written("Architectures").splitlines()]
    header = next(row for row in rows if row[0] == "architecture")
    row = next(row for row in rows if row[0] == architecture)
    return row[header.index(name)]


def _rewrite(heading: str, make_table: Callable[[], str]) -> None:
    old = re.search(r"\| .*\|", written(heading), re.DOTALL)
    assert old is not None
    PAGE.write_text(PAGE.read_text().replace(old[0], make_table()))


def _architecture_table() -> str:
    rows: list[tuple[str, ...]] = [("architecture", *WEIGHTS)]
    for architecture in ARCHITECTURES:
        cells: list[Any] = []
        for name in WEIGHTS:
            cells.append(outcome(architecture, name))
            print(architecture, name, cells[-1], flush=True)
        rows.append((architecture, *cells))
    return table(rows)


if __name__ == "__main__":
    if sys.argv[1] == "schemes":
        _rewrite("Schemes", scheme_table)
    else:
        _rewrite("Architectures", _architecture_table)
