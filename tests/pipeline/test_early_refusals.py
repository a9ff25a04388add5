"""What cannot end well is refused, and what is doubtful is said, before anything is quantized."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cli.command_line import answered, refused
from conftest import byte_tokenizer, tiny_model
from pipeline.test_pipeline_npu_targets import HTP
from qwlora import Scheme, quantize_
from qwlora.errors import CalibrationError, GridError, SourceError, TrainingError
from qwlora.grid.encoding import measure
from qwlora.grid.scheme import PerBlock
from qwlora.recipe import load_recipe
from qwlora.recipe.model_files import second_rounding
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase
from simulation.tiny_architectures import make

FIRST = {"name": "first", "rank": 4, "steps": 2, "warmup_steps": 0}
DORA = {"name": "b", "continue_from": "{tmp}/dora", "unknown_base": "accept", "steps": 0}
PAIRS = {"data": {"source": "{tmp}/pairs.jsonl", "sequence_tokens": 64}}
LONG = {"data": {"source": "{tmp}/text", "sequence_tokens": 160}}
WHOLE_TEXT = {"source": "{tmp}/text", "sequence_tokens": 32}
BASE_TEXT = {"preset": "balanced", "data": {}, "adapters": [{"name": "a", "data": WHOLE_TEXT}]}


def exporting(target: str, **sections: Any) -> dict[str, Any]:
    return {"export": {"targets": [target]}, **sections}


EXPERTS = exporting("openvino", model={"source": "{tmp}/mixtral"})
FLOAT_EMBEDDINGS = exporting("qnn", base={"weights": "w4-channel"}, simulation=HTP["simulation"])
DOCUMENTS = {"workflow": "qwa-lora", **PAIRS}
DORA_AND_LORA = {"adapters": [FIRST, DORA], "simulation": {"base_activations": "none"}}
RULES = {"rules": [{"match": "*.sofmax", "bitwidth": 8}]}
IDLE_RULE = {"workflow": "qwa-lora", "simulation": RULES}
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("gpt2", LONG, SourceError, "160 tokens, but GPT2.* for 128"),
    ("gpt2", BASE_TEXT, SourceError, "512 tokens, but GPT2.* for 128"),
    ("gpt2", exporting("hf"), GridError, r"target hf: .*c_attn\.weight.*Conv1D"),
    ("opt", exporting("gguf"), GridError, "target gguf: .*this model is opt"),
    ("opt", exporting("mlx"), GridError, "Model type opt not supported"),
    ("llama", EXPERTS, TrainingError, "target openvino: adapter first changes .*experts"),
    ("llama", FLOAT_EMBEDDINGS, GridError, "embed_tokens.*weights: w8-tensor"),
    ("llama", DOCUMENTS, TrainingError, "packs several documents into a sequence"),
    ("opt", PAIRS, SourceError, "OPT.*Set data.packing to none"),
    ("llama", DORA_AND_LORA, TrainingError, r"first and b cannot share all .*\[64\].*DoRA"),
    ("one-layer llama", IDLE_RULE, CalibrationError, r"'\*.sofmax' matches no value.*softmax"),
]
MARKED = [pytest.param(*c, marks=pytest.mark.client) if "mlx" in str(c) else c for c in CASES]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipes name."""
    folder = tmp_path_factory.mktemp("files")
    make("Mixtral").save_pretrained(folder / "mixtral")
    byte_tokenizer().save_pretrained(folder / "mixtral")
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    dora = get_peft_model(tiny_model("llama"), config)
    dora.save_pretrained(folder / "dora", save_embedding_layers=False)
    pairs = [{"prompt": f"what is {i}", "completion": f"it is {i}"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "text").mkdir()
    for i in range(9):
        (folder / "text" / f"{i}.txt").write_text(f"the text number {i} " * 60)
    return folder


@pytest.mark.filterwarnings("ignore::qwlora.formats.manifest.UnverifiedWarning")
@pytest.mark.parametrize(("architecture", "sections", "error", "message"), MARKED)
def test_what_cannot_end_well_is_refused_early(
    architecture: str, sections: Any, error: Any, message: str, files: Path, job_for: Any
) -> None:
    named = json.loads(json.dumps(sections).replace("{tmp}", str(files)))
    job = job_for(architecture, **named)
    with pytest.raises(error, match=message):
        job.run()
    assert not (job.out / "adapters").exists()


def test_run_and_check_refuse_the_same_early(job_for: Any) -> None:
    job, change = job_for(), "base.solver=keep"
    with pytest.raises(SourceError, match="has no integers to keep") as caught:
        job.run("quantize", changes=[change])
    assert not job.out.exists()
    assert refused("check", job.recipe, "--set", change) == f"qwlora: {caught.value}\n"


def test_kept_scales_that_are_no_float16_are_refused(recipe_for: Any, tmp_path: Path) -> None:
    quantize_(model := tiny_model("llama", layers=1), "w4-block32", "rtn")
    (tmp_path / "kept").mkdir()
    TARGETS["hf"].backend.write_base(ExportedBase(model, byte_tokenizer()), tmp_path / "kept")
    changes = (f"model.source={tmp_path / 'kept'}", "base.solver=keep", "export.targets=[gguf]")
    said = refused("check", recipe_for(), *(f"--set={change}" for change in changes))
    assert re.search(r"target gguf: .*weight: .*its scales are float32", said)


def test_check_refuses_a_context_and_says_what_replaces_bos(job_for: Any, tmp_path: Path) -> None:
    job = job_for(export={"targets": ["qairt"], "layout": "genie"})
    model = tiny_model("llama", layers=1)
    model.config.bos_token_id, model.config.eos_token_id = None, 2
    model.save_pretrained(tmp_path / "model")
    (tokenizer := byte_tokenizer()).save_pretrained(tmp_path / "model")
    change = f"--set=model.source={tmp_path / 'model'}"
    noted = f"no bos-token; genie_config.json has token {tokenizer.pad_token_id}"
    assert noted in answered("check", job.recipe, change)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sliding_window": 64}))
    assert "at most 64" in refused("check", job.recipe, change)


def test_check_and_run_say_that_integers_are_rounded_again(job_for: Any, tmp_path: Path) -> None:
    model, scheme = tiny_model("llama", layers=1), Scheme(3, True, PerBlock(32))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                weight.copy_(measure(weight, scheme).fake_quantize(weight))
    model.save_pretrained(tmp_path / "rounded")
    byte_tokenizer().save_pretrained(tmp_path / "rounded")
    job = job_for(preset="fast")
    assert second_rounding(load_recipe(job.recipe)) is None
    change = f"model.source={tmp_path / 'rounded'}"
    said = answered("check", job.recipe, "--set", change)
    assert re.search("a second time.*model.source to the original GGUF file", said)
    results = job.run("quantize", changes=[change])
    assert sum("a second time" in line for line in job.said) == 1
    assert "a second time" in results["base"]["second_rounding"]
