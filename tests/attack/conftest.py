"""Attacks on the product: what is attacked is built once, and what held is counted.

pytest tests/attack -m attack --reliability docs/log/reliability.md --attack-seed 20
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import qwlora
from conftest import byte_tokenizer, text, tiny_model

from . import jobs
from .record import MARKER, Record
from .targets import Target, again_target, merge_target, stage_target
from .victims import command, start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="write the table of attacks into this file")
    parser.addoption("--attack-seed", type=int, default=20, help="where and when attacks hit")


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    value: int = request.config.getoption("--attack-seed", default=20)
    print(f"attack seed {value}")
    return value


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest, seed: int) -> Iterator[Record]:
    collected = Record()
    yield collected
    path = request.config.getoption("--reliability", default=None)
    if path:
        text = path.read_text().partition(MARKER)[0]
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        made = f"Seed {seed}, {versions}, Python {platform.python_version()}, on the CPU."
        path.write_text(f"{text}{MARKER}\n{made}\n\n{collected.to_markdown()}")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything is kept."""
    return tmp_path_factory.mktemp("attack")


@pytest.fixture(scope="session")
def corpus(place: Path) -> Path:
    folder = place / "corpus"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(text(i, 60))
    return folder


@pytest.fixture(scope="session")
def two_layers(place: Path) -> Path:
    return _model(place / "two-layers", layers=2)


@pytest.fixture(scope="session")
def one_layer(place: Path) -> Path:
    """Its graph is captured in half of the time."""
    return _model(place / "one-layer", layers=1)


def _model(folder: Path, layers: int) -> Path:
    tiny_model("llama", layers=layers).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def warm(place: Path, one_layer: Path, corpus: Path) -> None:
    """Import and initialize in this process what forked ones would each do again."""
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # its monitor is a thread
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    recipe = jobs.write_recipe(place / "warm.yaml", one_layer, corpus)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import onnxscript  # noqa: F401
        import torch.onnx._internal.exporter._core  # noqa: F401

        for module in pkgutil.walk_packages(qwlora.__path__, "qwlora."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        for verb in ("quantize", "train", "calibrate"):
            with pytest.raises(SystemExit) as ended:
                command(verb, recipe, "--out", place / "warm")()
            assert not ended.value.code
    assert start(lambda: None, place / "logs").wait().code == 0


@pytest.fixture(scope="session")
def tuned(warm: None, place: Path, two_layers: Path, corpus: Path) -> jobs.Job:
    return jobs.build("tuned", place / "tuned", two_layers, corpus)


@pytest.fixture(scope="session")
def qwa(warm: None, place: Path, one_layer: Path, corpus: Path) -> jobs.Job:
    return jobs.build("qwa", place / "qwa", one_layer, corpus)


@pytest.fixture(scope="session")
def shared(warm: None, place: Path, one_layer: Path, corpus: Path) -> jobs.Job:
    return jobs.build("shared", place / "shared", one_layer, corpus)


@pytest.fixture(scope="session")
def targets(place: Path, tuned: jobs.Job, qwa: jobs.Job, shared: jobs.Job) -> list[Target]:
    """The commands that are killed, and that find the disk full."""
    again = place / "again"
    return [
        stage_target(tuned, "quantize", "gptq, tuning, second moments"),
        stage_target(qwa, "quantize", "search, workflow qwa-lora"),
        stage_target(tuned, "train", "start from qera"),
        stage_target(qwa, "train", "workflow qwa-lora"),
        stage_target(qwa, "calibrate", "one adapter"),
        stage_target(shared, "calibrate", "two adapters, shared encodings"),
        stage_target(qwa, "export", "onnx"),
        stage_target(qwa, "verify", "onnx"),
        stage_target(qwa, "evaluate", "four perplexities"),
        merge_target(tuned, "float", again / "float"),
        merge_target(tuned, "requantized", again / "requantized"),
        again_target(qwa, "quantize", "base.weights=w3-signed32", again / "quantize"),
        again_target(tuned, "train", "adapters.0.steps=7", again / "train"),
    ]
