"""Every scheme of docs/support.md, and some others: held exactly and computed, or refused.

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
from qwlora.grid.scheme import Scheme, parse_scheme, short_name
from qwlora.nn import packed_weights
from qwlora.targets.proof.reference import LOGIT_DIFFERENCE
from qwlora.targets.refusals import Subject, Weight, refusals
from qwlora.targets.target import Target
from simulation.tiny_architectures import with_large_weights
from targets.client_programs import with_clients
from targets.proofs import verify_weights
from targets.support_matrix import SCHEMES, WEIGHTS
from targets.weights.bundles import (
    linears,
    pack_linears,
    quantized,
    read_base,
    write_adapter,
    write_base,
)
from targets.weights.test_gguf_target import float_model, tiny_gguf

IDS = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(3))
MATRICES = 7  # of a layer


SIZES = {"hidden_size": 128, "intermediate_size": 256}  # matrices have blocks of 128
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4}
SIZES |= {"vocab_size": 300, "max_position_embeddings": 128}
NAMES = ("w4-tensor", "w5-tensor-asymmetric", "w4-block16", "w4-lpbq32", "w7-block32", "w7-channel")
EVERY = [*SCHEMES, *map(parse_scheme, NAMES)]


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
    return with_large_weights(LlamaForCausalLM(config)), None


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


def packed(name: str, schemes: Sequence[Scheme], folder: Path) -> tuple[Any, Path | None]:
    """A model that a target can hold, or not, with a matrix on each scheme."""
    model, source = model_for(name, schemes, folder)
    pack_linears(model, cycle(schemes), WEIGHTS[name].limits.has_float16_scales)
    return model, source


@pytest.mark.parametrize("name", ["hf", "mlx", "gguf", "qairt_pipeline"])
def test_every_scheme_that_a_target_holds_is_read_back(name: str, tmp_path: Path) -> None:
    target = WEIGHTS[name]
    held = [scheme for scheme in EVERY if not problems(target, scheme)]
    if target.limits.has_float16_scales:  # no LPBQ has such scales
        held = [scheme for scheme in held if "lpbq" not in short_name(scheme)]
    assert held
    for number, schemes in enumerate(groups(target, held)):
        folder = tmp_path / str(number)
        folder.mkdir()
        model, source = packed(name, schemes, folder)
        write_base(target.backend, model, folder, source)
        found, expected = packed_weights(read_base(folder / "base")), packed_weights(model)
        assert found.keys() == expected.keys()
        for path, layer in expected.items():
            values, others = found[path].tensor.dequantize(), layer.tensor.dequantize()
            scheme = layer.encoding.scheme
            is_turned = name not in ("hf", "gguf") and bool((layer.encoding.scale < 0).any())
            if not is_turned:  # by others, so that scales are positive
                assert torch.equal(found[path].codes, layer.codes), scheme
            if name == "mlx" and not scheme.float_offset:  # it adds offset * scale
                rounding = torch.finfo(torch.float32).eps * float(others.abs().max())
                assert float((values - others).abs().max()) <= 2 * rounding, scheme
            else:
                assert torch.equal(values, others), scheme


@pytest.mark.slow
@pytest.mark.parametrize("name", with_clients(WEIGHTS))
def test_the_runtime_computes_every_scheme_that_the_target_holds(name: str, tmp_path: Path) -> None:
    target = WEIGHTS[name]
    held = [scheme for scheme in SCHEMES if not problems(target, scheme)]
    for number, schemes in enumerate(groups(target, held)):
        folder = tmp_path / str(number)
        folder.mkdir()
        model, source = packed(name, schemes, folder)
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


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "openvino"])  # it holds all
def test_a_scheme_that_the_target_lacks_is_refused(name: str, tmp_path: Path) -> None:
    target = WEIGHTS[name]
    lacking = [scheme for scheme in EVERY if problems(target, scheme)]
    assert lacking
    model, source = packed(name, lacking, tmp_path)
    with pytest.raises(ExportError) as refusal:
        write_base(target.backend, model, tmp_path, source)
    (more,) = re.findall(r"; and (\d+) more", str(refusal.value)) or ["0"]
    listed = sum(f"{scheme}: " in str(refusal.value) for scheme in lacking)
    assert listed + int(more) == len({*lacking[: len(linears(model))]})
    assert list((tmp_path / "base").iterdir()) == []


@pytest.mark.slow
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
