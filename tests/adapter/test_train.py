"""Training: only the adapter changes; divergence, checkpoints, resuming, equal settings."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainingArguments
from transformers.integrations import integration_utils

from conftest import flip_bit, packed_model
from qwlora import fingerprint
from qwlora.adapter.attach import LoraShape, attach
from qwlora.adapter.train import (
    TrainingReport,
    TrainingSettings,
    _arguments,
    check_loggers,
    train_adapter,
)
from qwlora.adapter.trainer import DIGESTS, delete_newer, divergence, last_checkpoint
from qwlora.data.sequences import IGNORED, Sequences
from qwlora.errors import MissingExtraError, QwloraWarning, TrainingError
from qwlora.formats import manifest
from qwlora.system.atomic import files_in

SHAPE = LoraShape(rank=4, alpha=8)
SETTINGS = TrainingSettings(6, 5e-3, 2, 1, "constant", checkpoint_steps=2, seed=0)
IDS = torch.arange(256).view(8, 32)
# gets worse while IDS is learned
OTHER = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(3))


def adapted(architecture: str = "llama", layers: int = 1, **shape: Any) -> PeftModel:
    model = packed_model(architecture, layers=layers)
    return attach(model.requires_grad_(False), replace(SHAPE, **shape), seed=0)


def weights(model: PeftModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("shape", [{}, {"dora": True, "target_modules": ["q_proj"]}], ids=str)
def test_training_moves_the_adapter_only(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = adapted(layers=2, **shape)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    identity = fingerprint(model)
    report = train_adapter(model, IDS, SETTINGS, tmp_path)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".lora_" in n}
    assert fingerprint(model) == identity
    assert report.losses[-1] < report.losses[0]
    assert len(report.losses) == report.steps == 6
    assert report.trainable_parameters == sum(before[n].numel() for n in moved)
    assert "forward" not in model.get_base_model().__dict__  # the own forward is restored


def test_the_kind_of_loss_and_checkpointing_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(folder: str, **settings: Any) -> dict[str, Tensor]:
        model = adapted()
        train_adapter(model, IDS, replace(SETTINGS, **settings), tmp_path / folder)
        return weights(model)

    plain = trained("plain")
    checkpointed = trained("checkpointed", gradient_checkpointing=True)
    refused = mock.Mock(side_effect=TrainingError("it needs the logits"))
    monkeypatch.setattr("qwlora.adapter.training_step.ChunkedLoss", refused)
    with pytest.warns(QwloraWarning, match="it needs the logits. Training uses that loss"):
        whole = trained("whole")
    for name, weight in plain.items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(weight, checkpointed[name])


def test_a_process_uses_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoDevices(TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 2  # as the Trainer counts them, where there is no launcher

    monkeypatch.setattr("qwlora.adapter.train.TrainingArguments", TwoDevices)
    model, seen = adapted(), []
    model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    train_adapter(model, IDS, SETTINGS, tmp_path)
    assert {tuple(given["input_ids"].shape) for given in seen} == {(2, 32)}


def test_two_processes_share_batches_and_do_not_broadcast_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _arguments(SETTINGS, tmp_path, 2, torch.device("cpu"))
    assert (arguments.per_device_train_batch_size, arguments.ddp_broadcast_buffers) == (1, False)
    with pytest.raises(TrainingError, match=r"batch_sequences \(3\) cannot be divided among 2"):
        _arguments(replace(SETTINGS, batch_sequences=3), tmp_path, 2, torch.device("cpu"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match="Launch without FSDP"):
        _arguments(SETTINGS, tmp_path, 2, torch.device("cpu"))


@pytest.mark.usefixtures("each_loss")
def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Also of few and of many targets, where a mean of means would be wrong."""
    labels = IDS.clone()
    labels[::2, :2] = labels[1::2, :28] = -100
    uneven: Any = [{"input_ids": i, "labels": t} for i, t in zip(IDS, labels, strict=True)]
    results = []
    for batch, steps in ((4, 1), (1, 4)):
        model, work = adapted(), tmp_path / f"{batch}"
        how = {"batch_sequences": batch, "accumulation_steps": steps, "steps": 2}
        report = train_adapter(model, uneven, replace(SETTINGS, **how), work)
        results.append((report.losses, weights(model)))
    (losses, large), (others, small) = results
    assert losses == pytest.approx(others, rel=1e-5)
    torch.testing.assert_close(large, small, rtol=1e-3, atol=1e-4)


def test_bfloat16_trains_close_to_float32(tmp_path: Path) -> None:
    settings = replace(SETTINGS, compute="bfloat16")
    for shape in ({}, {"dora": True}):
        model, exact = adapted(**shape), adapted(**shape)
        losses = train_adapter(model, IDS, settings, tmp_path / f"half {shape}").losses
        expected = train_adapter(exact, IDS, SETTINGS, tmp_path / f"full {shape}").losses
        assert all(w.dtype == torch.float32 for w in weights(model).values())
        assert losses != expected
        assert losses == pytest.approx(expected, rel=0.02)


def killed_after(step: int) -> Any:
    """A progress callback that ends the run after `step`, before its checkpoint is written."""

    def track(steps: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
        for i in steps:
            if i == step:
                raise KeyboardInterrupt
            yield i

    return track


@pytest.mark.parametrize("patience", [1, 3])
def test_the_best_evaluation_is_kept_wherever_runs_are_killed(
    tmp_path: Path, patience: int
) -> None:
    often = {"evaluation_steps": 3, "patience": patience, "checkpoint_steps": 1}
    drawn = {"accumulation_steps": 2, "schedule": "cosine"}
    settings = replace(SETTINGS, steps=60, learning_rate=2e-2, **often, **drawn)

    def train(folder: str, **options: Any) -> tuple[PeftModel, TrainingReport]:
        model = adapted(dropout=0.1)
        work = tmp_path / folder
        return model, train_adapter(model, IDS, settings, work, held_out=OTHER, **options)

    whole, expected = train("whole")
    losses, best = dict(expected.evaluations), expected.best_step or 0
    assert best == min(losses, key=losses.__getitem__)
    assert expected.steps == best + 3 * patience < 60
    with torch.no_grad():
        loss = float(whole.eval()(input_ids=OTHER, labels=OTHER).loss)
    assert loss == pytest.approx(losses[best], rel=1e-5)
    for step in range(best + 2, expected.steps, 3):
        with pytest.raises(KeyboardInterrupt):
            train("killed", track=killed_after(step))
    for least in (best + 1, best):  # the second had ended, and begins where the best was
        again, found = train("killed")
        assert found.resumed_from_step >= least
        for key in ("best_step", "steps", "losses", "evaluations"):
            assert getattr(found, key) == getattr(expected, key)
        assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(again).items())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IDS[:0], "training text has no sequence"),
        (IDS[:, :1], "fewer than two tokens"),
        (Sequences(IDS, torch.full_like(IDS, IGNORED)), "all labels are -100"),
        (torch.where(IDS == 34, 260, IDS), "to 260, but the model's vocabulary has 260"),
        (torch.where(IDS == 5, -3, IDS), "range from -3 to"),
        (IDS.double(), "input_ids are torch.float64"),
    ],
)
def test_unusable_text_is_named(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        train_adapter(adapted(), data, SETTINGS, tmp_path)
    held_out = replace(SETTINGS, evaluation_steps=1)
    message = message.replace("training text", "held-out text")
    with pytest.raises(TrainingError, match=message):
        train_adapter(adapted(), IDS, held_out, tmp_path, held_out=data)
    with pytest.raises(TrainingError, match="there is no held-out text"):
        train_adapter(adapted(), IDS, held_out, tmp_path)


def test_non_finite_loss_and_gradient_name_step_and_layer(tmp_path: Path) -> None:
    train_adapter(adapted(layers=2), IDS, SETTINGS, tmp_path / "loss")
    model, calls = adapted(layers=2), list[int]()
    first, second = model.get_base_model().model.layers
    first.register_forward_hook(lambda *_: calls.append(1))
    second.mlp.up_proj.register_forward_hook(
        lambda module, inputs, output: output * (torch.nan if len(calls) > 3 else 1)
    )
    message = r"loss is nan at step \d+; .*model.layers.1.mlp.up_proj; .*checkpoint-6\."
    with pytest.raises(TrainingError, match=message):
        train_adapter(model, IDS, replace(SETTINGS, steps=20), tmp_path / "loss")
    model, name = adapted(), "model.layers.0.mlp.up_proj.lora_A"
    model.get_parameter(f"base_model.model.{name}.default.weight").register_hook(
        lambda gradient: gradient * torch.inf
    )
    before = weights(model)
    with pytest.raises(TrainingError, match=rf"not finite at step 1; .* {name}.weight;"):
        train_adapter(model, IDS, SETTINGS, tmp_path / "gradient")
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())


def test_divergence_with_finite_numbers_stops(tmp_path: Path) -> None:
    def train(divergence: str) -> TrainingReport:
        settings = replace(SETTINGS, steps=60, learning_rate=10.0, clip=0.0, divergence=divergence)
        model = adapted("qwen3", layers=2, target_modules=["lm_head"])
        return train_adapter(model, IDS, settings, tmp_path / divergence)

    message = r"diverged: the loss is \d+\.\d+ at step \d+.* for 5 steps .*checkpoint.*: ignore"
    with pytest.raises(TrainingError, match=message):
        train("stop")
    assert train("ignore").steps == 60


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([3.0] * 10, False),
        # below twice the lowest mean, 2.36, for most of the five
        ([3.0, 2.5, 2.2, 2.1, 2.0, 4.0, 4.0, 4.0, 4.0, 9.0], False),
        ([3.0, 2.5, 2.2, 2.1, 2.0, 5.0, 5.0, 5.0, 5.0, 5.0], True),
        ([0.01] * 5 + [0.2] * 5, False),  # twenty times, but less than a nat
        ([3.0, 8.0, 9.0, 9.0, 9.0, 9.0], True),  # worse than chance, and than the first step
        ([9.0] * 6, False),  # a bad base is not a diverged run
        ([3.0, 9.0, 9.0], False),
    ],
)
def test_divergence_rule(losses: list[float], diverged: bool) -> None:
    found = divergence(losses, vocabulary=260)
    assert (found is not None) == diverged
    assert found is None or found[0] <= max(losses[0] + 1, math.log(260) + 1)


def mixed(steps: int, seed: int, share: float = 0.5) -> list[float]:
    """Losses of code and prose in random order, late in training."""
    generator = random.Random(seed)
    losses = []
    for step in range(steps):
        kind = 0.6 if generator.random() < share else 2.7
        losses.append(kind + 2 * math.exp(-step / 20) + generator.gauss(0, 0.1))
    return losses


def first_alarm(losses: list[float], start: int = 1) -> int | None:
    """The first step with a divergence."""
    steps = range(start, len(losses) + 1)
    return next((step for step in steps if divergence(losses[:step], 50_000)), None)


def test_mixed_data_is_not_divergence() -> None:
    for share in (0.5, 0.1, 0.9):
        runs = [mixed(1500, 0, share), *(mixed(120, seed, share) for seed in range(30))]
        assert not any(first_alarm(losses) for losses in runs)


@pytest.mark.parametrize("healthy", [100, 300, 3000])
@pytest.mark.parametrize(("times", "steps"), [(2.5, 50), (8.0, 15)])
def test_divergence_on_mixed_data_is_found_soon(healthy: int, times: float, steps: int) -> None:
    for seed in range(5):
        losses = mixed(healthy + 100, seed)
        for i in range(100):
            losses[healthy + i] *= 1 + (times - 1) * min(1, i / 10)
        assert healthy < (first_alarm(losses, healthy) or 0) <= healthy + 10 + steps


def checkpoint(work: Path, step: int, sealed: bool = True, best: int | None = None) -> Path:
    """A checkpoint as the Trainer writes it; without its digests it was interrupted."""
    folder = work / f"checkpoint-{step}"
    (folder / "distributed").mkdir(parents=True)
    (folder / "distributed" / "0.bin").write_bytes(bytes(range(100)))
    (folder / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
    if sealed:
        manifest.write(folder, DIGESTS, {}, files_in(folder))
    return folder


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "gone": Path.unlink,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "flipped": flip_bit,
}


@pytest.mark.parametrize("file", ["trainer_state.json", "distributed/0.bin", "digests.json"])
@pytest.mark.parametrize("how", DAMAGES)
def test_never_resumes_from_a_damaged_checkpoint(tmp_path: Path, file: str, how: str) -> None:
    whole, damaged = checkpoint(tmp_path, 2), checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == damaged
    DAMAGES[how](damaged / file)
    found = [last_checkpoint(tmp_path) for _ in "01"]
    assert found == [whole, whole]  # looking changes nothing for the next process
    delete_newer(tmp_path, whole)
    assert list(tmp_path.iterdir()) == [whole]


def test_never_resumes_where_the_best_checkpoint_is_damaged(tmp_path: Path) -> None:
    """Training ends with the adapter of the best evaluation."""
    assert last_checkpoint(tmp_path / "nowhere") is None
    first = checkpoint(tmp_path, 2)
    best = checkpoint(tmp_path, 4, best=4)
    assert checkpoint(tmp_path, 6, best=4) == last_checkpoint(tmp_path)
    (best / "distributed" / "0.bin").unlink()
    assert last_checkpoint(tmp_path) == first
    checkpoint(tmp_path, 10, sealed=False)  # interrupted
    assert last_checkpoint(tmp_path) == first


def test_loggers_receive_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, dict[str, float]]] = []

    class Recorder(integration_utils.TensorBoardCallback):
        def __init__(self) -> None:
            self.logging_dir = ""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            told.append((self.logging_dir, logs))

        on_train_begin = on_train_end = lambda *_, **__: None

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Recorder)
    check_loggers(["tensorboard"])
    with pytest.raises(MissingExtraError, match="'blackboard'"):
        check_loggers(["blackboard"])
    settings = replace(SETTINGS, report_to=("tensorboard",))
    train_adapter(adapted(), IDS, settings, tmp_path, logs=tmp_path / "logs")
    assert len([logs for _, logs in told if "loss" in logs and "grad_norm" in logs]) == 6
    assert {folder for folder, _ in told} == {str(tmp_path / "logs")}
