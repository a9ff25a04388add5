"""What each target holds: docs/support.md, written from what the code refuses and runtimes ran.

python -m targets.support_matrix schemes          from `tests`: rewrites the table of schemes
python -m targets.support_matrix architectures    runs every architecture in every runtime
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.pytorch_utils import Conv1D

from conftest import byte_tokenizer
from qwlora import quantize_, save_adapter
from qwlora.data.sequences import as_sequences
from qwlora.errors import CaptureError, ExportError
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme, parse_scheme, short_name
from qwlora.nn.packed_layer import packed_weights
from qwlora.targets.refusals import Subject, Weight, refusals
from qwlora.targets.registry import TARGETS, VLLM
from qwlora.targets.weights.weights_folder import layer_kind
from simulation.tiny_architectures import DECODER, make, with_large_weights
from targets.proofs import verify_weights
from targets.weights.bundles import write_adapter, write_base

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
ARCHITECTURES = ("Llama", "Qwen3", "Gemma 3", "Phi-3", "Mistral", "GPT-2", "OPT", "Mixtral")
WEIGHTS = {name: t for name, t in TARGETS.items() if not t.is_simulated}
SCHEMES = [
    parse_scheme(f"w{bits}-{kind}{end}")
    for bits in (2, 3, 4, 5, 6, 8)
    for end in ("", "-asymmetric")
    for kind in ("block32", "block64", "block128", "channel")
]
SCHEMES += [
    parse_scheme(f"w{bits}-{kind}{size}")
    for kind in ("signed", "bf16block")
    for bits in (2, 3, 4, 5, 6, 8)
    for size in (32, 64, 128)
]
SCHEMES += [
    Scheme(bits, False, granularity, float_offset=True)
    for bits in (2, 3, 4, 5, 8)
    for granularity in (PerBlock(32), PerBlock(64), PerBlock(128), PerChannel())
]


def table(rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def scheme_table() -> str:
    """Which schemes each target holds exactly. Blocks of 32, 64 and 128 are held alike."""
    refusing: dict[tuple[str, str], str] = {}  # by kind of grid and bits
    for scheme in SCHEMES:
        subject = Subject(weights={"all": Weight(scheme)})
        targets = {**TARGETS, "hf in vLLM": replace(TARGETS["hf"], limits=VLLM)}
        problems = {name: refusals(target, subject) for name, target in targets.items()}
        form = r"(?:w|int)(\d)[- ](.*?)(?: ?(?:32|64|128))?(-asymmetric)?"
        ((bits, kind, _),) = re.findall(f"^{form}$", short_name(scheme))
        kind = kind if scheme.symmetric else "asymmetric"  # blocks and channels are held alike
        kind = "float offset" if scheme.float_offset else kind
        found = ", ".join(name for name, problem in problems.items() if problem) or "none"
        assert refusing.setdefault((kind, bits), found) == found, scheme
    rows: dict[str, dict[str, str]] = {}
    for (kind, bits), names in refusing.items():
        grids = rows.setdefault(names, {})
        grids[kind] = f"{grids[kind]}, {bits}" if kind in grids else f"{kind} {bits}"
    order = sorted(rows, key=lambda names: (names != "none", len(names)))
    cells = (("; ".join(rows[names].values()), names) for names in order)
    return table([("grid and its bits", "not held by"), *cells])


def outcome(architecture: str, name: str) -> str:
    """`yes` if the runtime computes base and adapter, or why it does not."""
    target = WEIGHTS[name]
    if target.missing():
        return "not run"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        grid = "w4-bf16block32" if name == "executorch" else "w4-block32"
        model, tokenizer = made(architecture, grid), byte_tokenizer()
        kinds = [layer_kind(layer) for layer in packed_weights(model).values()]
        weights = {kind.name: Weight(None, kind=kind) for kind in kinds}
        subject = Subject(weights=weights, model=model, tokenizer=tokenizer)
        if problems := refusals(target, subject):
            why = problems[0].partition(", but this model is")[0]
            return f"no: {re.sub('^[A-Z0-9]+: ', '', why)}"
        try:
            write_base(target.backend, model, folder)
            adapted = with_adapter(model)
            save_adapter(adapted, folder / "trained" / "adapter")
            write_adapter(target.backend, folder, "adapter")
            ids = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(1))
            runtime, rounding = target.open(folder), target.backend.rounding(adapted)
            text, adapter = as_sequences(ids), folder / "adapter"
            found = verify_weights(runtime, adapted, adapter, text, rounding)
        except (ExportError, CaptureError) as error:
            first = (str(error).splitlines()[1:] or [str(error)])[0]  # of the layers, or the whole
            return f"no: {first.rpartition(': ')[2]}"
        return "no: more than rounding differs" if found.problems else "yes"


def made(architecture: str, grid: str = "w4-block32") -> Any:
    """A tiny random model with 4-bit integers."""
    if architecture == "Gemma 3":  # mlx-lm asks for the sixth layer, the first with full attention
        torch.manual_seed(0)
        sizes = {**DECODER, "num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16}
        model: Any = with_large_weights(Gemma3ForCausalLM(Gemma3TextConfig(**sizes)))
    else:
        model = make(architecture)
    quantize_(model, grid, solver="search")
    return model


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
    text = written("Architectures")
    assert {architecture, f"`{name}`"} <= {*re.findall(r"`\w+`|[A-Z][\w-]+(?: 3)?", text)}
    rows = re.findall(rf"^\| (.+) in `{name}` \| (.+) \|$", text, re.MULTILINE)
    return next((f"no: {why}" for who, why in rows if architecture in who.split(", ")), "yes")


def _rewrite(heading: str, make_table: Callable[[], str]) -> None:
    old = re.search(r"\| .*\|", written(heading), re.DOTALL)
    assert old is not None
    PAGE.write_text(PAGE.read_text().replace(old[0], make_table()))


def _architecture_table() -> str:
    refused: dict[tuple[str, str], list[str]] = {}
    for architecture in ARCHITECTURES:
        for name in WEIGHTS:
            print(architecture, name, result := outcome(architecture, name), flush=True)
            if result != "yes":
                refused.setdefault((name, result.removeprefix("no: ")), []).append(architecture)
    cells = ((f"{', '.join(a)} in `{name}`", why) for (name, why), a in refused.items())
    return table([("does not run", "because"), *cells])


if __name__ == "__main__":
    if sys.argv[1] == "schemes":
        _rewrite("Schemes", scheme_table)
    else:
        _rewrite("Architectures", _architecture_table)
