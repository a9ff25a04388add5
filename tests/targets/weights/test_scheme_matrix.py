"""Every scheme of docs/support.md in every runtime: run there, or refused.

One tiny model has a layer of each scheme, so that a runtime is opened once for all schemes that a
target can hold together.
"""

import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qwlora import save_adapter
from qwlora.data.sequences import as_sequences
from qwlora.errors import ExportError
from qwlora.grid.scheme import Scheme, short_name
from qwlora.targets.proof.reference import LOGIT_DIFFERENCE
from qwlora.targets.refusals import Subject, Weight, refusals
from qwlora.targets.target import Target
from targets.client_programs import with_clients
from targets.proofs import verify_weights
from targets.support_matrix import SCHEMES, WEIGHTS
from targets.weights.bundles import linears, pack_linears, quantized, write_adapter, write_base
from targets.weights.test_gguf_target import float_model, tiny_gguf

pytestmark = pytest.mark.slow
IDS = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(3))
MATRICES = 7  # of a layer


SIZES = {  # matrices have blocks of 128
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}


def model_for(
    name: str, schemes: Sequence[Scheme], folder: Path = Path()
) -> tuple[Any, Path | None]:
    """A float model with a matrix for each scheme, and the file that it comes from."""
    layers = -(-len(schemes) // MATRICES)
    if name == "gguf":
        source = tiny_gguf(folder, "F32", **SIZES, num_hidden_layers=layers)
        return float_model(source), source
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, tie_word_embeddings=True)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval(), None


def problems(target: Target, *schemes: Scheme) -> list[str]:
    """Why a target cannot hold these schemes, one by one or together."""
    return refusals(target, Subject(weights={str(scheme): Weight(scheme) for scheme in schemes}))


def groups(target: Target, schemes: Sequence[Scheme]) -> list[list[Scheme]]:
    """The schemes that one base can have together."""
    found: list[list[Scheme]] = []
    for scheme in schemes:
        group = next((g for g in found if not problems(target, *g, scheme)), None)
        if group is None:
            found.append([scheme])
        else:
            group.append(scheme)
    return found


@pytest.mark.parametrize("name", with_clients(WEIGHTS))
def test_the_runtime_computes_every_scheme_that_the_target_holds(name: str, tmp_path: Path) -> None:
    target = WEIGHTS[name]
    held = [scheme for scheme in SCHEMES if not problems(target, scheme)]
    for number, schemes in enumerate(groups(target, held)):
        folder = tmp_path / str(number)
        folder.mkdir()
        model, source = model_for(name, schemes, folder)
        pack_linears(model, cycle(schemes), target.limits.has_float16_scales)
        write_base(target.backend, model, folder, source)
        torch.manual_seed(1)
        shape = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, shape).eval()
        save_adapter(adapted, folder / "trained" / "adapter")
        write_adapter(target.backend, folder, "adapter")
        runtime = target.open(folder)
        rounding = target.backend.rounding(adapted)
        parity = verify_weights(runtime, adapted, folder / "adapter", as_sequences(IDS), rounding)
        assert parity.problems == [], ", ".join(map(short_name, schemes))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_scheme_that_the_target_lacks_is_refused(name: str, tmp_path: Path) -> None:
    target = WEIGHTS[name]
    lacking = [scheme for scheme in SCHEMES if problems(target, scheme)]
    if not lacking:
        pytest.skip("it holds every scheme")
    model, source = model_for(name, lacking, tmp_path)
    pack_linears(model, cycle(lacking), target.limits.has_float16_scales)
    with pytest.raises(ExportError) as refusal:
        write_base(target.backend, model, tmp_path, source)
    (more,) = re.findall(r"; and (\d+) more", str(refusal.value)) or ["0"]
    listed = sum(f"{scheme}: " in str(refusal.value) for scheme in lacking)
    assert listed + int(more) == len({*lacking[: len(linears(model))]})
    assert list((tmp_path / "base").iterdir()) == []


@torch.no_grad()
def test_a_layer_whose_integers_are_off_by_one_is_noticed() -> None:
    """By the limit that runtimes keep, whichever layer and scheme it is."""
    model, _ = model_for("hf", SCHEMES)
    found = [
        (module, quantized(module.weight.detach(), scheme))
        for (_, module), scheme in zip(linears(model), cycle(SCHEMES), strict=False)
    ]
    for module, tensor in found:
        module.weight.copy_(tensor.dequantize())
    expected = model(IDS).logits
    for module, tensor in found:
        module.weight.copy_(tensor.encoding.dequantize(tensor.codes.int() + 1))
        difference = (model(IDS).logits - expected).abs().max()
        assert difference > 10 * LOGIT_DIFFERENCE * expected.abs().max(), tensor.encoding.scheme
        module.weight.copy_(tensor.dequantize())
