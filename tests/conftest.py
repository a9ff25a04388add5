"""Tiny random models of several architectures, with a tokenizer of their own: nothing is downloaded."""

import copy
import functools
import gc
import json
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
import yaml
from jaxtyping import install_import_hook

SHAPES_CHECKED = [
    f"qwlora.{module}"
    for module in ("grid.encoding", "grid.packing", "analysis.perplexity", "analysis.token_scores")
]
install_import_hook(SHAPES_CHECKED, "beartype.beartype")  # stays installed: modules come later

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402 (after the import hook)
from transformers import (  # noqa: E402
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging  # noqa: E402

from qwlora import quantize_  # noqa: E402
from qwlora.formats import manifest  # noqa: E402
from qwlora.formats.base_files import BaseWriter  # noqa: E402

transformers_logging.disable_progress_bar()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets background jobs ignore it

TESTS = Path(__file__).parent
LONG = ("pipeline", "cli", "simulation", "targets", "docs", "adapter", "quantize", "graph")
VOCABULARY = 260
ARCHITECTURES = ("llama", "gpt2", "opt", "qwen3")
# where each costs seconds: the two that differ most in the fast lane, the others in the slow one
EACH_ARCHITECTURE = (
    "llama",
    "gpt2",
    pytest.param("opt", marks=pytest.mark.slow),
    pytest.param("qwen3", marks=pytest.mark.slow),
)
SENTENCE = """the integer grid holds a weight in four bits and scale so that what was trained
is computed"""
WORDS = SENTENCE.split()

# Time limits belong into benchmarks: on a shared machine a deadline fails by chance.
hypothesis.settings.register_profile(
    "shared-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared-machine")


def tiny_model(architecture: str, seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """Layers of width 64, random weights that are large enough to matter.

    Capturing and exporting takes time in proportion to the layers: use one where one will do.
    """
    torch.manual_seed(seed)
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    positions = {"max_position_embeddings": 128}
    llama = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    llama |= {"num_attention_heads": 4, "num_key_value_heads": 2} | positions | ids
    model: PreTrainedModel
    match architecture:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=True))
        case "qwen3":
            config = Qwen3Config(**llama, head_dim=16, tie_word_embeddings=False)
            model = Qwen3ForCausalLM(config)
        case "gpt2":
            config = GPT2Config(n_embd=64, n_layer=layers, n_head=4, n_positions=128, **ids)
            model = GPT2LMHeadModel(config)
        case "opt":
            sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128} | positions
            heads = {"num_hidden_layers": layers, "num_attention_heads": 4}
            model = OPTForCausalLM(OPTConfig(**sizes, **heads, **ids))
        case "falcon":  # its linear layers are of a class of its own
            sizes = {"hidden_size": 64, "ffn_hidden_size": 128, "num_hidden_layers": layers}
            heads = {"num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
            model = FalconForCausalLM(FalconConfig(**sizes, **heads, **positions, **ids))
        case _:
            raise AssertionError(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def packed_model(architecture: str = "llama", seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """`tiny_model` in four bits, rounded to nearest."""
    model = tiny_model(architecture, seed, layers)
    quantize_(model, "w4-block32", "rtn")
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def text(seed: int, words: int) -> str:
    """Words in a seeded order."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(
        WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist()
    )


def reseal(folder: Path, name: str) -> None:
    """Let the record `name` list the files of `folder` as they are now, as an attacker would."""
    record = json.loads((folder / name).read_text())
    if files := record.pop("files", None):
        manifest.write(folder, name, record, files.keys() - {name})


def flip_bit(file: Path, place: int = -3) -> None:
    """Change one bit of the byte at `place`."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of folders with long tests come first, so that two workers end at the same time."""
    order = {folder: place for place, folder in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.relative_to(TESTS).parts[0], len(LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """In the lane that has all programs, a test that is skipped is one that nobody runs."""
    report = yield
    if report.skipped and item.get_closest_marker("client"):
        report.outcome = "failed"
        report.longrepr = f"skipped, although the lane has every program: {report.longrepr}"
    return report


@pytest.fixture
def own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with the model's own loss, not the chunked one."""
    monkeypatch.setattr("qwlora.adapter.training_step.ChunkedLoss", nullcontext)


@pytest.fixture(params=["chunked_loss", "own_loss"])
def each_loss(request: pytest.FixtureRequest) -> None:
    if request.param == "own_loss":
        request.getfixturevalue("own_loss")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face checkpoint folder of each architecture."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for architecture in ARCHITECTURES:
        tiny_model(architecture).save_pretrained(folder / architecture)
    tiny_model("llama", layers=1).save_pretrained(folder / "one-layer llama")
    names = (*ARCHITECTURES, "one-layer llama")
    for name in names:
        byte_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in names}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten short documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(10):
        (folder / f"{i}.txt").write_text(text(i, 60))
    return folder


def write_recipe(folder: Path, model: Path, corpus: Path, /, **sections: Any) -> Path:
    """Write a small recipe to `folder`; keyword arguments replace whole sections."""
    data = {"sequence_tokens": 32, "evaluation_sequences": 4, "calibration_sequences": 4}
    first = {"name": "first", "rank": 4, "steps": 6, "warmup_steps": 1, "checkpoint_steps": 2}
    content = {
        "name": "tiny",
        "preset": "fast",
        "model": {"source": str(model)},
        "data": {"source": str(corpus), **data},
        "adapters": [first],
        "verify": {"sequences": 2},
        **sections,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@dataclass
class Job:
    """Runs `recipe` over `out`; `said` is what the last run said."""

    recipe: Path
    out: Path
    said: list[str] = field(default_factory=list)

    def run(self, *verbs: str, changes: Sequence[str] = (), **options: Any) -> dict[str, Any]:
        from qwlora.pipeline import VERBS
        from qwlora.pipeline.run import run

        self.said.clear()
        options |= {"changes": tuple(changes), "say": self.said.append}
        return run(self.recipe, self.out, verbs or VERBS, **options)

    @property
    def done(self) -> list[str]:
        """The stages that the last run ran, in their order."""
        return [line.split(":")[0] for line in self.said if ": done" in line]


@pytest.fixture
def job_for(recipe_for: Any, tmp_path: Path) -> Callable[..., Job]:
    """A `Job` in `out` of the test's folder; arguments are those of `recipe_for`."""
    return lambda *arguments, **sections: Job(recipe_for(*arguments, **sections), tmp_path / "out")


@pytest.fixture
def recipe_for(tmp_path: Path, corpus: Path, checkpoints: dict[str, Path]) -> Any:
    """`write_recipe` to the test's folder, with the model of an architecture."""

    def write(architecture: str = "llama", **sections: Any) -> Path:
        return write_recipe(tmp_path, checkpoints[architecture], corpus, **sections)

    return write


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage_collector() -> None:
    """The collector looks no further through what was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quick_graphs() -> Iterator[None]:
    """What torch does for graphs of many layers costs more than it saves in those of one or two: it
    remembers what operators return, and registers all translations again for every file."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    filled = functools.cache(ONNXRegistry.from_torchlib)

    def registry(**options: int) -> ONNXRegistry:
        copied = copy.copy(filled(**options))
        copied.functions = {name: list(found) for name, found in copied.functions.items()}
        return copied

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._dynamo.config.fake_tensor_cache_enabled", False)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(registry))
        patch.setattr("qwlora.targets.onnx.onnx_model.TRANSLATIONS_KEPT", 64)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_stages() -> Iterator[None]:
    """Flushing files to the disk and collecting garbage takes longer than a stage of a tiny model: jobs
    do neither here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr("qwlora.pipeline.run.gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope="module")
def shared_captures() -> Iterator[None]:
    """Models of one structure are captured once; see `graph/shared_captures.py`."""
    from graph.shared_captures import CALLERS, shared_capture

    with pytest.MonkeyPatch.context() as patch:
        for caller in CALLERS:
            patch.setattr(f"qwlora.{caller}.capture", shared_capture)
        yield


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts an empty file system with the given options, like `size=100k` or `ro`; skips the test where that is not allowed."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
            capture_output=True,
            check=False,
        ).returncode:
            pytest.skip("mounting a file system needs root")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def loaded_at_finish(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that still have data when `BaseWriter.finish` is called."""
    found: list[str] = []
    finish = BaseWriter.finish

    def recorded(writer: BaseWriter, model: PreTrainedModel, *arguments: Any) -> str:
        found.extend(name for name, tensor in model.state_dict().items() if not tensor.is_meta)
        return finish(writer, model, *arguments)

    monkeypatch.setattr(BaseWriter, "finish", recorded)
    return found
