"""Calls of the Python API that fail halfway: a disk that is full at the n-th change, an error or
Ctrl-C at the n-th operator of torch. Folders and models stay as they were."""

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import qwlora
from conftest import byte_tokenizer, packed_model, tiny_model
from qwlora.nn.fingerprint import adapter_fingerprint
from qwlora.system.atomic import files_in

from .record import Record
from .victims import failing_at_change, seeds, start

pytestmark = pytest.mark.attack
IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS}
FILES, STEPS = 16, 8  # changes and operators at which each call fails, of those that it makes


def adapted(base: Any, *modules: str, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    shape: Any = {"r": 2, "target_modules": list(modules), "task_type": "CAUSAL_LM"}
    return get_peft_model(base, LoraConfig(**shape, init_lora_weights=False)).eval()


def floats() -> Any:
    return tiny_model("llama", layers=1)


def packed() -> Any:
    return packed_model("llama", layers=1)


def simulation(model: Any) -> Any:
    made = qwlora.simulate(model, BATCH)
    made.calibrate([BATCH])
    return made


def content(folder: Path) -> dict[str, str]:
    """Digests of the files that a reader sees."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in files_in(folder)
        if not name.startswith(".")
    }


Call = Callable[[], Any]


@pytest.fixture(scope="module")
def writes(warm: None) -> dict[str, tuple[Call | None, Call]]:
    """What is in the folder before, and the call; both with a relative path."""
    first, second, tokenizer = packed(), floats(), byte_tokenizer()
    qwlora.quantize_(second, "w3-block32", "rtn")
    trained = adapted(packed(), "q_proj", "down_proj")
    other = adapted(packed(), "v_proj", seed=2)
    simulated, again = simulation(trained), simulation(other)
    here = Path("folder")

    def exported(model: Any, adapter: Any) -> None:
        qwlora.save_adapter(adapter, Path("adapter"))
        qwlora.export(model, "hf", here, {"first": Path("adapter")}, tokenizer)

    return {
        "save_base, a new folder": (None, lambda: qwlora.save_base(first, here / "new")),
        "save_base, over a base with a tokenizer": (
            lambda: qwlora.save_base(first, here, tokenizer),
            lambda: qwlora.save_base(second, here),
        ),
        "save_adapter, over an adapter and above another": (
            lambda: [qwlora.save_adapter(other, f) for f in (here, here / "below")],
            lambda: qwlora.save_adapter(trained, here),
        ),
        "Simulation.save, over another": (lambda: again.save(here), lambda: simulated.save(here)),
        "export, hf": (None, lambda: exported(first, trained)),
        "export, onnx_each, over another": (
            lambda: qwlora.export(again, "onnx_each", here),
            lambda: qwlora.export(simulated, "onnx_each", here),
        ),
    }


def test_a_full_disk_leaves_folders_as_they_were(
    writes: dict[str, tuple[Call | None, Call]], record: Record, seed: int, tmp_path: Path
) -> None:
    def prepared(name: str, work: Path) -> Path:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with contextlib.chdir(work):
            if (before := writes[name][0]) is not None:
                before()
        return work / "folder"

    def run(name: str, moment: int, work: Path, into: Path) -> None:
        """Fail at a change; 0: at none."""
        warnings.simplefilter("ignore")
        folder = prepared(name, work)
        before = content(folder)
        with contextlib.chdir(work):
            changes = failing_at_change(writes[name][1], folder, moment)
        into.write_text(json.dumps([changes, before, content(folder)]))

    def attack(name: str, folder: Path) -> list[tuple[str, str, str]]:
        rows, into, work = list[tuple[str, str, str]](), folder / "result.json", folder / "work"
        moments = [0]
        while moments:
            moment = moments.pop(0)
            ended = start(lambda: run(name, moment, work, into), folder / "logs").wait()  # noqa: B023
            if ended.code:
                return [*rows, (name, f"crashed: {ended.err[-300:]}", f"change {moment}")]
            changes, before, after = json.loads(into.read_text())
            if not moment:
                whole = after
                moments = seeds(seed, name).sample(range(1, changes + 1), min(changes, FILES))
                continue
            # what cannot be deleted of the scratch folder is no reason to undo the call
            problem = "" if after in (before, whole) else f"{sorted(after)} of {sorted(before)}"
            rows.append((name, problem, f"full disk at change {moment} of {changes}"))
        return rows

    record.attack("python", writes, attack, tmp_path)
    assert record.rows["python"].keys() >= writes.keys()


class Failing(TorchDispatchMode):
    """Raises at the n-th operator, once; counts all."""

    def __init__(self, number: int, error: BaseException):
        super().__init__()
        self.number, self.error, self.count = number, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.number:
            raise self.error
        return func(*args, **kwargs or {})


def model_state(model: Any) -> Any:
    """What a caller can see of a model: its modules, modes, tensors and outputs."""
    if isinstance(model, qwlora.Simulation):
        return {
            name: (q.observer.batches, q.encoding and q.encoding.scale.tolist())
            for name, q in model.quantizers.items()
        }
    modules = [(path, type(m).__name__, m.training) for path, m in model.named_modules()]
    tensors = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
    return [modules, tensors, digest, qwlora.fingerprint(model), adapter_fingerprint(model)]


@pytest.fixture(scope="module")
def changes(warm: None, place: Path) -> dict[str, tuple[Call, Callable[[Any], Any]]]:
    """How the model is made, and the call on it."""
    one, two = place / "python-api" / "one", place / "python-api" / "two"
    qwlora.save_adapter(adapted(packed(), "q_proj", "down_proj"), one)
    qwlora.save_adapter(adapted(packed(), "v_proj", seed=2), two)
    codes = {name: layer.quantized for name, layer in qwlora.nn.packed_weights(packed()).items()}
    return {
        "load_adapter": (packed, lambda model: qwlora.load_adapter(model, one)),
        "load_adapter, a second one": (
            lambda: qwlora.load_adapter(packed(), one),
            lambda model: qwlora.load_adapter(model, two, adapter_name="two"),
        ),
        "quantize_": (floats, lambda model: qwlora.quantize_(model, "w4-block32", "search")),
        "quantize_, gptq": (
            floats,
            lambda model: qwlora.quantize_(model, "w4-block32", "gptq", calibration=IDS),
        ),
        "freeze_": (floats, lambda model: qwlora.freeze_(model, codes)),
        "Simulation.calibrate": (
            lambda: qwlora.simulate(packed(), BATCH),
            lambda made: made.calibrate([BATCH, {"input_ids": IDS.flip(0)}]),
        ),
    }


@contextlib.contextmanager
def stopped(call: Call, number: int, error: BaseException) -> Iterator[Failing]:
    with Failing(number, error) as mode, contextlib.suppress(type(error), qwlora.QwloraError):
        call()
    yield mode


def test_an_error_in_the_middle_leaves_models_as_they_were(
    changes: dict[str, tuple[Call, Callable[[Any], Any]]], record: Record, seed: int, tmp_path: Path
) -> None:
    def run(name: str, into: Path) -> None:
        warnings.simplefilter("ignore")
        make, call = changes[name]
        fresh = make()
        with stopped(lambda: call(fresh), 0, ValueError()) as whole:
            wanted = repr(model_state(fresh))
        moments = sorted(seeds(seed, name).sample(range(1, whole.count + 1), STEPS))
        rows = []
        for place, moment in enumerate(moments):
            error = (KeyboardInterrupt(), RuntimeError("out of memory"))[place % 2]
            model = make()
            before = repr(model_state(model))
            with stopped(lambda: call(model), moment, error):  # noqa: B023
                problem = "" if repr(model_state(model)) in (before, wanted) else "it changed"
            try:
                call(make() if repr(model_state(model)) == wanted else model)
            except qwlora.QwloraError as refusal:
                # half of the layers are packed: every later call says so
                problem = "" if "failed halfway" in str(refusal) else str(refusal)
            else:
                same = repr(model_state(model)) == wanted
                problem = problem or ("" if same else "the call again gives something else")
            rows.append([name, problem, f"{type(error).__name__} at operator {moment}"])
        into.write_text(json.dumps(rows))

    def attack(name: str, folder: Path) -> list[tuple[str, str, str]]:
        into = folder / "result.json"
        ended = start(lambda: run(name, into), folder / "logs").wait()
        if ended.code:
            return [(name, f"crashed: {ended.err[-600:]}", "")]
        return [tuple(row) for row in json.loads(into.read_text())]

    record.attack("python", changes, attack, tmp_path)
    assert record.rows["python"].keys() >= changes.keys()
