"""`export` to every target with adapters that are not of the base, damaged, or of another kind."""

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import qwlora
from conftest import byte_tokenizer, flip_bit, reseal, tiny_model
from qwlora.adapter.adapter_files import CONFIG, FILE, WEIGHTS
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
FLOATS = qwlora.Schemes(policy="weights-only")
GRIDS = qwlora.Schemes(  # which every target takes
    quantize_residual_adds=True,
    symmetric_matmul_second_input=True,
    key_value_bitwidth=8,
    adapter_weights=qwlora.Scheme(8),
)
# Schemes of bases, which all targets that take a base take, and all that take simulations.
BLOCKS, CHANNELS = "w4-bf16block32", "w4-channel"
MODULES = ["q_proj", "down_proj"]
Make = Callable[[Path], Any]


def lora(**settings: Any) -> LoraConfig:
    usual: dict[str, Any] = {"r": 2, "target_modules": MODULES, "task_type": "CAUSAL_LM"}
    return LoraConfig(**usual | settings, init_lora_weights=False)


GPT2 = lora(target_modules=["c_attn"], fan_in_fan_out=True)
KINDS: dict[str, Any] = {
    "IA3": IA3Config(
        target_modules=MODULES, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "DoRA": lora(use_dora=True),
    "LoRA with biases": lora(lora_bias=True),
    "LoRA and a module": lora(modules_to_save=["input_layernorm"]),
}


def base(scheme: str = BLOCKS, seed: int = 0, layers: int = 1, width: int = 64) -> Any:
    config = tiny_model("llama", layers=layers).config.to_dict()
    config |= {"hidden_size": width, "tie_word_embeddings": False}
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
            if any(part in path for part in ("ia3_", "magnitude", "modules_to_save", "B.bias")):
                parameter.add_(torch.rand_like(parameter))
    return wrapped.eval()


def ours(model: Any, folder: Path, config: Any = None, of: Any = None) -> None:
    """An adapter that records its base, or `of` as if it were that."""
    fingerprint = None if of is None else qwlora.fingerprint(of)
    qwlora.save_adapter(adapted(model, config or lora(), "default"), folder, fingerprint)


def of_peft(model: Any, folder: Path, config: Any = None) -> None:
    """An adapter that does not record its base."""
    adapted(model, config or lora(), "default").save_pretrained(folder)


def mergeable(folder: Path) -> None:
    model = adapted(base(), lora(), "default")
    qwlora.mergeable_(model)
    qwlora.save_adapter(model, folder)


def claimed(folder: Path) -> None:
    """The adapter of another model, whose record was edited to name this base."""
    ours(base(seed=4), folder)
    setting(FILE, base_fingerprint=qwlora.fingerprint(base()))(folder)


def changed(change: Make, is_sealed: bool = False) -> Make:
    """A right adapter, changed after it was saved; sealed: its record agrees with it."""

    def make(folder: Path) -> None:
        ours(base(), folder)
        change(folder)
        if is_sealed:
            reseal(folder, FILE)

    return make


def number(value: float) -> Make:
    """Replace one number of an adapter."""

    def change(content: dict[str, torch.Tensor]) -> None:
        next(iter(content.values())).view(-1)[3] = value

    return lambda folder: tensors(change, WEIGHTS)(folder, folder)


def setting(file: str = CONFIG, **values: Any) -> Make:
    return lambda folder: edit(file, **values)(folder, folder)


OTHER = r"Load it onto its own base, or train it again"
AGAIN = r"[Cc]opy it again, or train it again"
FIT = r"[Uu]se its own base"
KIND = r"only LORA is supported. Train one"
FACTORS = r"only LoRA factors of linear layers .*Train without dora"
# What is wrong with a folder: what makes it, and what the refusal says.
FOLDERS: dict[str, tuple[Make, str]] = {
    "of another model": (lambda f: ours(base(seed=4), f), OTHER),
    "of the same model on another grid": (lambda f: ours(base("w8-channel"), f), OTHER),
    "a value changed": (changed(lambda f: flip_bit(f / WEIGHTS)), AGAIN),
    "alpha changed": (changed(setting(lora_alpha=999)), AGAIN),
    "the base of its record changed": (changed(setting(FILE, base_fingerprint="0" * 64)), OTHER),
    "of another model, its record changed": (claimed, AGAIN),
    "NaN": (changed(number(torch.nan), is_sealed=True), AGAIN),
    "infinity": (changed(number(torch.inf), is_sealed=True), AGAIN),
    "NaN, no record": (changed(lambda f: [number(torch.nan)(f), os.remove(f / FILE)]), AGAIN),
    "of more layers": (lambda f: of_peft(base(layers=2), f), FIT),
    "of more layers, for this base": (lambda f: ours(base(layers=2), f, of=base()), FIT),
    "of a wider model": (lambda f: of_peft(base(width=96), f), FIT),
    "of a wider model, for this base": (lambda f: ours(base(width=96), f, of=base()), FIT),
    "of another rank than it says": (changed(setting(r=1), is_sealed=True), FIT),
    "of another architecture": (lambda f: of_peft(tiny_model("gpt2"), f, GPT2), FIT),
    "IA3": (lambda f: of_peft(base(), f, KINDS["IA3"]), KIND),
    "LoHa": (lambda f: of_peft(base(), f, LoHaConfig(target_modules=MODULES)), KIND),
    "prompt tuning": (
        lambda f: of_peft(base(), f, PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=4)),
        KIND,
    ),
    "DoRA": (lambda f: ours(base(), f, KINDS["DoRA"]), FACTORS),
    "LoRA with biases": (lambda f: ours(base(), f, KINDS["LoRA with biases"]), FACTORS),
    "LoRA and a module": (lambda f: ours(base(), f, KINDS["LoRA and a module"]), FACTORS),
    "of an embedding": (lambda f: ours(base(), f, lora(target_modules=["embed_tokens"])), FACTORS),
    "mergeable": (mergeable, r"Merge it .*and export the merged base"),
    "activated": (
        lambda f: of_peft(base(), f, lora(alora_invocation_tokens=[5])),
        "alora_invocation_tokens: .*not supported",
    ),
    "a base": (lambda f: qwlora.save_base(base(), f), r"give a folder that PEFT or save_adapter"),
    "nothing": (lambda f: None, r"give a folder that PEFT or save_adapter"),
}


def simulations(
    model: Any, config: Any = None, schemes: qwlora.Schemes = GRIDS, names: Any = ("right", "wrong")
) -> AdapterSimulations:
    wrapped = adapted(model, config or lora(), *names)
    made = qwlora.simulate_adapters(wrapped, BATCH, schemes, "none")
    made.calibrate([BATCH])
    return made


def simulation() -> qwlora.Simulation:
    made = qwlora.simulate(adapted(base(CHANNELS), lora(), "wrong"), BATCH, GRIDS)
    made.calibrate([BATCH])
    return made


def value_(model: Any, value: float) -> None:
    """Replace one number of an adapter in a model."""
    path = next(path for path, _ in model.named_parameters() if "lora_A.wrong" in path)
    model.get_parameter(path).data.view(-1)[3] = value


def replaced_(model: Any, **settings: Any) -> None:
    """Replace an adapter in a model."""
    model.delete_adapter("wrong")
    model.add_adapter("wrong", lora(**settings))


def change_base_(model: Any) -> None:
    model.get_base_model().model.norm.weight.data.mul_(2)


OTHER_BASE = r"adapter wrong has another base. Simulate all on one base"
BASE_CHANGED = r"the base of .* has changed since .*Simulate it again"
SINCE = r"adapter wrong of .* has changed since .*Simulate it again"
SWITCHED = r"adapter wrong has .*only LoRA factors can be switched. Train without them"
# What happens to a model that was simulated, and what the refusal says.
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "the base changed": (change_base_, BASE_CHANGED),
    "a value changed": (lambda model: value_(model, 1.0), SINCE),
    "NaN": (lambda model: value_(model, torch.nan), SINCE),
    "of another rank": (lambda model: replaced_(model, r=4), SINCE),
    "of another layer": (lambda model: replaced_(model, target_modules=["v_proj"]), SINCE),
}
# An attack: what gives the model or simulations, and folders of adapters; what the refusal says.
Attacks = dict[str, tuple[Callable[[], tuple[Any, Any]], str]]


def given(made: Any, adapters: Any = None, *changes: partial[Any]) -> Callable[[], tuple[Any, Any]]:
    """What gives these, after the changes."""

    def give() -> tuple[Any, Any]:
        for change in changes:
            change()
        return made, adapters

    return give


@pytest.fixture(scope="module")
def folders(warm: None, place: Path) -> Path:
    """Of adapters: the right one, and those in `FOLDERS`."""
    folder = place / "wrong-adapters"
    ours(base(), folder / "right")
    for name, (make, _) in FOLDERS.items():
        make(folder / name)
    return folder


def names(target: str) -> list[str]:
    """Names that no adapter can have."""
    taken = sorted(TARGETS[target].taken_names)
    return [*taken, taken[0].upper(), "RIGHT", "", ".wrong", "../wrong", "wrong/wrong", "wrong one"]


def said_of(name: str) -> str:
    return f"adapters cannot be called .*{re.escape(repr(name))}.*Use letters"


def on_base(folders: Path, target: str) -> Attacks:
    """On a target that takes a base."""
    model, right = base(), folders / "right"
    attacks: Attacks = {
        name: (
            given(model, {"right": right, "wrong": folders / name}),
            f"{re.escape(repr(str(folders / name)))}.*{said}",
        )
        for name, (_, said) in FOLDERS.items()
    }
    for name in names(target):
        attacks[f"called {name!r}"] = given(model, {"right": right, name: right}), said_of(name)
    return attacks


def on_changed(made: Any, model: Any, folders: Path) -> Attacks:
    """On a target that takes simulations of this model."""
    attacks: Attacks = {
        way: (given(made, None, partial(change, model)), said)
        for way, (change, said) in CHANGES.items()
    }
    return attacks | {"a folder": (given(made, {"wrong": folders / "right"}), "omit adapters=")}


def swap(made: AdapterSimulations, wrong: Any, name: str = "wrong") -> None:
    """Replace the second adapter's simulation, or give it another name."""
    del made["wrong"]
    made[name] = wrong


def on_simulations(folders: Path) -> dict[str, Attacks]:
    """On targets that take simulations of several adapters, by target."""
    made, twin = simulations(base(CHANNELS)), simulations(base(CHANNELS))["wrong"]
    attacks = on_changed(made, made["wrong"].origin.model, folders)
    changes = partial(change_base_, twin.origin.model), partial(swap, made, twin)
    attacks["of a base that changed"] = given(made, None, *changes), BASE_CHANGED
    others: dict[str, Any] = {"more layers": {"layers": 2}, "a wider model": {"width": 96}}
    for way, settings in {"another model": {"seed": 4}, **others}.items():
        wrong = simulations(base(CHANNELS, **settings))["wrong"]
        attacks[f"of {way}"] = given(made, None, partial(swap, made, wrong)), OTHER_BASE
    for kind, config in KINDS.items():
        for what, schemes in (("grids", GRIDS), ("floats", FLOATS)):
            other = simulations(base(CHANNELS), config, schemes, ["wrong"])
            attacks[f"{kind}, {what}"] = given(other), SWITCHED
    wrapped = adapted(base(CHANNELS), lora(), BASE)
    attacks[f"called {BASE!r}"] = (
        lambda: (qwlora.simulate_adapters(wrapped, BATCH, GRIDS), None),
        "an adapter is called 'base'.*Load it under another name",
    )
    return {
        target: {
            f"called {name!r}": (
                given(made, None, partial(swap, made, made["wrong"], name)),
                said_of(name),
            )
            for name in names(target)
        }
        | attacks
        for target in TARGETS
        if TARGETS[target].is_simulated and TARGETS[target].holds_factors_only
    }


@pytest.fixture(scope="module")
def attacks(folders: Path) -> dict[str, Attacks]:
    """By target."""
    made, several = simulation(), on_simulations(folders)
    alone = on_changed(made, made.origin.model, folders)
    return {
        name: several.get(name, alone) if target.is_simulated else on_base(folders, name)
        for name, target in TARGETS.items()
    }


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
    attacks: dict[str, Attacks], record: Record, tmp_path: Path
) -> None:
    def attack(trial: tuple[str, str], own: Path) -> list[tuple[str, str, str]]:
        (target, way), place = trial, own / "place"
        give, said = attacks[target][way]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "there").mkdir()
        (place / "there" / "mine").write_text("mine")

        def run(folder: Path) -> None:
            made, adapters = give()
            exported(made, target, folder, adapters)

        problems = []
        for folder in (place / "new", place / "there"):
            ended = python(lambda: run(folder), own / "logs")  # noqa: B023
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
    alone, several, model = simulation(), simulations(base(CHANNELS)), base()

    def export(name: str, own: Path) -> dict[str, str]:
        target, made = TARGETS[name], model
        if target.is_simulated:
            made = several if target.holds_factors_only else alone
        adapters = None if target.is_simulated else {"right": folders / "right"}
        ended = python(lambda: exported(made, name, own / name, adapters), own / "logs")
        return {"error": ended.err if ended.code or not any((own / name).iterdir()) else ""}

    results = parallel(export, list(TARGETS), tmp_path)
    assert not {n: r["error"] for n, r in zip(TARGETS, results, strict=True) if r["error"]}
