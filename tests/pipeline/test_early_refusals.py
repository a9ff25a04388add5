"""What cannot end well is refused before anything is made of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from conftest import byte_tokenizer, tiny_model
from qwlora.errors import CalibrationError, GridError, SourceError, TrainingError
from simulation.tiny_architectures import make

FIRST = {"name": "first", "rank": 4, "steps": 2, "warmup_steps": 0}
HTP = {
    "residual_adds": "quantize",
    "symmetric_matmul_second_input": True,
    "key_value_bitwidth": 8,
    "adapter_weights": "w8-tensor",
    "base_activations": "none",
}
DORA = {"name": "b", "continue_from": "{tmp}/dora", "unknown_base": "accept", "steps": 0}
PAIRS = {"data": {"source": "{tmp}/pairs.jsonl", "sequence_tokens": 64}}
LONG = {"data": {"source": "{tmp}/text", "sequence_tokens": 160}}
WHOLE_TEXT = {"source": "{tmp}/text", "sequence_tokens": 32}
BASE_TEXT = {"preset": "balanced", "data": {}, "adapters": [{"name": "a", "data": WHOLE_TEXT}]}


def exporting(target: str, **sections: Any) -> dict[str, Any]:
    return {"export": {"targets": [target]}, **sections}


CASES: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "longer than the positions": ("gpt2", LONG, SourceError, "160 tokens, but GPT2.* for 128"),
    "text of the base": ("gpt2", BASE_TEXT, SourceError, "512 tokens, but GPT2.* for 128"),
    "Conv1D": ("gpt2", exporting("hf"), GridError, r"target hf: .*c_attn\.weight.*Conv1D"),
    "OPT for gguf": ("opt", exporting("gguf"), GridError, "target gguf: .*this is opt"),
    "OPT for mlx": ("opt", exporting("mlx"), GridError, "Model type opt not supported"),
    "experts": (
        "llama",
        exporting("openvino", model={"source": "{tmp}/mixtral"}),
        TrainingError,
        "target openvino: adapter first changes .*experts",
    ),
    "embeddings of the HTP": (
        "llama",
        exporting("qnn", base={"weights": "w4-channel"}, simulation=HTP),
        GridError,
        "embed_tokens.*weights: w8-tensor",
    ),
    "documents in a sequence": (
        "llama",
        {"workflow": "qwa-lora", **PAIRS},
        TrainingError,
        "packs several documents into a sequence",
    ),
    "a model that mixes documents": ("opt", PAIRS, SourceError, "OPT.*Set data.packing to none"),
    "DoRA next to LoRA": (
        "llama",
        {"adapters": [FIRST, DORA], "simulation": {"base_activations": "none"}},
        TrainingError,
        r"first and b cannot share all .*_vector: none and \[64\].*DoRA",
    ),
    "a rule for nothing": (
        "one-layer llama",
        {"workflow": "qwa-lora", "simulation": {"rules": [{"match": "*.sofmax", "bitwidth": 8}]}},
        CalibrationError,
        r"'\*.sofmax' matches no value.*softmax",
    ),
}


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
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.client) if "mlx" in c else c for c in CASES]
)
def test_what_cannot_end_well_is_refused_early(case: str, files: Path, job_for: Any) -> None:
    architecture, sections, error, message = CASES[case]
    named = json.loads(json.dumps(sections).replace("{tmp}", str(files)))
    job = job_for(architecture, **named)
    with pytest.raises(error, match=message):
        job.run()
    assert not (job.out / "adapters").exists()
