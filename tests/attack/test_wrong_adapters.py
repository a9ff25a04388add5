"""`export` to every target with adapters that are not of the base, damaged, or of another kind.

The ways in which a folder is wrong are tested in adapter/test_adapter.py, and changes of a model
that was simulated in simulation/test_changed_model.py: here, some of each for every target.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import qwlora
from conftest import byte_tokenizer, flip_bit, reseal, tiny_model
from qwlora.adapter.adapter_files import FILE, WEIGHTS
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.system.parameter_names import BASE
from qwlora.targets.registry import TARGETS

from .hostile_models import edit, tensors
from .record import Record
from .test_python_api import model_state
from .victims import parallel, python

pytestmark = [
    pytest.mark.attack,
    # of the adapters that PEFT saved: they have no digests
    pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning"),
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
]
IDS = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
GRIDS = qwlora.Schemes(  # which every target takes
    quantize_residual_adds=True,
    symmetric_matmul_second_input=True,
    key_value_bitwidth=8,
    adapter_weights=qwlora.Scheme(8),
)
# Schemes of bases, which all targets that take a base take, and all that take simulations.
BLOCKS, CHANNELS = "w4-bf16block32", "w4-channel"
MODULES = ["q_proj", "down_proj"]


def lora(**settings: Any) -> LoraConfig:
    usual: dict[str, Any] = {"r": 2, "target_modules": MODULES, "task_type": "CAUSAL_LM"}
    return LoraConfig(**usual | settings, init_lora_weights=False)


def base(scheme: str = BLOCKS, seed: int = 0, layers: int = 1) -> Any:
    config = tiny_model("llama", layers=layers).config.to_dict() | {"tie_word_embeddings": False}
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(**config)).eval()
    rules = [qwlora.LayerRule("*embed_tokens", qwlora.Scheme(8))] * (scheme == CHANNELS)
    qwlora.quantize_(model, scheme, "rtn", rules=rules)
    return model


def adapted(model: Any, config: Any, *names: str) -> Any:
    """`model` with adapters of random values."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config, names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if any(part in path for part in ("magnitude", "modules_to_save", "B.bias")):
                parameter.add_(torch.rand_like(parameter))
    return wrapped.eval()


def save(folder: Path, config: Any = None, of: Any = None, **settings: Any) -> None:
    """An adapter of `base(**settings)` that records its base, or `of` as if it were that."""
    fingerprint = None if of is None else qwlora.fingerprint(of)
    model = adapted(base(**settings), config or lora(), "default")
    qwlora.save_adapter(model, folder, fingerprint)


def save_ia3(folder: Path) -> None:
    config = IA3Config(target_modules=MODULES, feedforward_modules=["down_proj"])
    get_peft_model(base(), config).save_pretrained(folder)


def save_mergeable(folder: Path) -> None:
    model = adapted(base(), lora(), "default")
    qwlora.mergeable_(model)
    qwlora.save_adapter(model, folder)


def save_claimed(folder: Path) -> None:
    """The adapter of another model, whose record was edited to name this base."""
    save(folder, seed=4)
    edit(FILE, base_fingerprint=qwlora.fingerprint(base()))(folder, folder)


def save_flipped(folder: Path) -> None:
    save(folder)
    flip_bit(folder / WEIGHTS)


def save_nan(folder: Path) -> None:
    """A number that is not finite, in a record that agrees."""

    def change(content: dict[str, torch.Tensor]) -> None:
        next(iter(content.values())).view(-1)[3] = torch.nan

    save(folder)
    tensors(change, WEIGHTS)(folder, folder)
    reseal(folder, FILE)


OTHER = r"Load it onto its own base, or train it again"
AGAIN = r"[Cc]opy it again, or train it again"
FACTORS = r"only LoRA factors of linear layers .*Train without dora"
# What is wrong with a folder: what makes it, and what the refusal says.
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "of another model": (lambda f: save(f, seed=4), OTHER),
    "of another model, its record changed": (save_claimed, AGAIN),
    "a value changed": (save_flipped, AGAIN),
    "NaN": (save_nan, AGAIN),
    "of more layers, for this base": (lambda f: save(f, of=base(), layers=2), r"[Uu]se its own"),
    "IA3": (save_ia3, r"only LORA is supported. Train one"),
    "DoRA": (lambda f: save(f, lora(use_dora=True)), FACTORS),
    "LoRA with biases": (lambda f: save(f, lora(lora_bias=True)), FACTORS),
    "LoRA and a module": (lambda f: save(f, lora(modules_to_save=["input_layernorm"])), FACTORS),
    "of an embedding": (lambda f: save(f, lora(target_modules=["embed_tokens"])), FACTORS),
    "mergeable": (save_mergeable, r"Merge it .*and export the merged base"),
    "nothing": (lambda f: f.mkdir(), r"give a folder that PEFT or save_adapter"),
}
# An attack: the model or simulations, folders of adapters, and what the refusal says.
Attack = tuple[Any, Any, str]


def simulations(config: Any = None) -> AdapterSimulations:
    wrapped = adapted(base(CHANNELS), config or lora(), "right", "wrong")
    made = qwlora.simulate_adapters(wrapped, BATCH, GRIDS, "none")
    made.calibrate([BATCH])
    return made


def simulation() -> qwlora.Simulation:
    made = qwlora.simulate(adapted(base(CHANNELS), lora(), "wrong"), BATCH, GRIDS)
    made.calibrate([BATCH])
    return made


def change_(made: Any) -> Any:
    """Change the base of simulations."""
    one = made["wrong"] if isinstance(made, AdapterSimulations) else made
    one.origin.model.get_base_model().model.norm.weight.data.mul_(2)
    return made


def renamed(made: AdapterSimulations, name: str) -> AdapterSimulations:
    """The simulations, with another name for the second adapter."""
    parts = {name if old == "wrong" else old: one for old, one in made.items()}
    return AdapterSimulations(parts, "none")


@pytest.fixture(scope="module")
def folders(warm: None, place: Path) -> Path:
    """Of adapters: the right one, and those in `FOLDERS`."""
    folder = place / "wrong-adapters"
    save(folder / "right")
    for name, (make, _) in FOLDERS.items():
        make(folder / name)
    return folder


@pytest.fixture(scope="module")
def attacks(folders: Path) -> dict[str, dict[str, Attack]]:
    """By target."""
    model, right = base(), folders / "right"
    one, several = simulation(), simulations()
    changed = "the base of .* has changed since .*Simulate it again"
    of_one: dict[str, Attack] = {
        "a folder": (one, {"wrong": right}, "omit adapters="),
        "the base changed": (change_(simulation()), None, changed),
    }
    of_several: dict[str, Attack] = {
        "a folder": (several, {"wrong": right}, "omit adapters="),
        "the base changed": (change_(simulations()), None, changed),
        "LoRA with biases": (simulations(lora(lora_bias=True)), None, "only LoRA factors can be"),
    }
    of_base: dict[str, Attack] = {
        way: (model, {"right": right, "wrong": folders / way}, rf"{re.escape(way)}'.*{said}")
        for way, (_, said) in FOLDERS.items()
    }
    found: dict[str, dict[str, Attack]] = {}
    for target, known in TARGETS.items():
        if known.is_simulated and not known.holds_factors_only:
            found[target] = of_one
            continue
        found[target] = dict(of_several if known.is_simulated else of_base)
        # In simulations, "base" is the zero adapter; simulate_adapters refuses it for another one.
        taken = sorted(known.taken_names - ({BASE} if known.is_simulated else set()))
        for name in (*taken, taken[0].upper(), "RIGHT", "", ".wrong", "../wrong", "wrong one"):
            said = f"adapters cannot be called .*{re.escape(repr(name))}.*Use letters"
            of_name = (model, {"right": right, name: right}, said)
            if known.is_simulated:
                of_name = (renamed(several, name), None, said)
            found[target][f"called {name!r}"] = of_name
    return found


def state(made: Any) -> list[Any]:
    """What a caller can see of a model, or of simulations and their models."""
    if isinstance(made, AdapterSimulations):
        return [(name, state(each)) for name, each in made.items()]
    models = [made.origin.model] if isinstance(made, qwlora.Simulation) else []
    return [model_state(each) for each in (made, *models)]


def exported(made: Any, target: str, folder: Path, adapters: Any) -> None:
    """`export`, which leaves `made` as it was."""
    before = repr(state(made))
    try:
        sizes: Any = {"graphs": [8, 1], "context": [32], "sample": BATCH}
        qwlora.export(made, target, folder, adapters, byte_tokenizer(), **sizes)
    finally:
        assert repr(state(made)) == before, "what was exported changed"


def test_wrong_adapters_are_refused(
    attacks: dict[str, dict[str, Attack]], record: Record, tmp_path: Path
) -> None:
    def attack(trial: tuple[str, str], own: Path) -> list[tuple[str, str, str]]:
        (target, way), place = trial, own / "place"
        made, adapters, said = attacks[target][way]
        shutil.rmtree(place, ignore_errors=True)
        (place / "there").mkdir(parents=True)
        (place / "there" / "mine").write_text("mine")
        problems = []
        for folder in (place / "new", place / "there"):
            ended = python(lambda: exported(made, target, folder, adapters), own / "logs")  # noqa: B023
            problems.append(ended.refused())
            if not re.search(said, ended.err, re.DOTALL):
                problems.append(f"it does not say {said!r}: {ended.err[-600:]}")
            left = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
            if left != ["there", "there/mine"]:
                problems.append(f"left {left}")
        return [(target, "; ".join(filter(None, problems)), way)]

    trials = [(target, way) for target in attacks for way in attacks[target]]
    record.attack("adapters", trials, attack, tmp_path)
    assert record.rows["adapters"].keys() == TARGETS.keys()


def test_right_adapters_are_exported(folders: Path, tmp_path: Path) -> None:
    """Else the attacks above would prove nothing."""
    alone, several, model = simulation(), simulations(), base()

    def export(name: str, own: Path) -> dict[str, str]:
        target, made = TARGETS[name], model
        if target.is_simulated:
            made = several if target.holds_factors_only else alone
        adapters = None if target.is_simulated else {"right": folders / "right"}
        ended = python(lambda: exported(made, name, own / name, adapters), own / "logs")
        return {"error": ended.err if ended.code or not any((own / name).iterdir()) else ""}

    results = parallel(export, list(TARGETS), tmp_path)
    assert not {n: r["error"] for n, r in zip(TARGETS, results, strict=True) if r["error"]}
