"""Activated LoRA acts from its invocation on, as in PEFT, and keeps the base's cache before it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.testing import assert_close

import qwlora
from adapter.test_adapter import base, drawn, own_loop
from conftest import byte_tokenizer
from qwlora.adapter.adapter_deltas import rounding_losses, unpack_
from qwlora.adapter.adapter_files import adapter_report
from qwlora.adapter.attach import LoraShape, attach
from qwlora.errors import CaptureError, ExportError, MergeError, TrainingError
from qwlora.targets.canonical_adapter import read_canonical
from qwlora.targets.weights.hf import TransformersRuntime

SHAPE = LoraShape(4, 8, alora_invocation_tokens=[7, 8])
IDS = torch.randint(9, 90, (4, 20), generator=torch.Generator().manual_seed(0))
IDS[0, 2:4] = IDS[0, 11:13] = IDS[1, :2] = IDS[2, -2:] = torch.tensor([7, 8])
STARTS = (11, 0, 18, 20)  # the last has none


def test_trains_and_computes_as_peft_does_on_floats(tmp_path: Path) -> None:
    floats: Any = base()
    unpack_(floats)
    ours = attach(base(), SHAPE, seed=0).train()
    theirs = get_peft_model(floats, ours.peft_config["default"]).train()
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    with qwlora.memory_saving(ours):
        losses = own_loop(ours, steps=4)
    assert_close(own_loop(theirs, steps=4), losses, rtol=1e-4, atol=0.0)
    qwlora.save_adapter(ours, tmp_path)
    assert adapter_report(tmp_path, tmp_path).kind == "activated LoRA"
    with torch.no_grad():
        logits, alone = ours.eval()(IDS).logits, base()(IDS).logits
        assert_close(logits, theirs.eval()(IDS).logits, rtol=1e-3, atol=1e-3)
        assert torch.equal(qwlora.load_adapter(base(), tmp_path)(IDS).logits, logits)
    for row, start in enumerate(STARTS):
        assert torch.equal(logits[row, :start], alone[row, :start])
        assert not (logits[row, start:] == alone[row, start:]).all(-1).any()


@torch.no_grad()
def test_the_bases_cache_before_the_invocation_stays_valid() -> None:
    model, ids, start = drawn(attach(base(), SHAPE, seed=0)), IDS[:1], STARTS[0]
    whole = model(ids, use_cache=True)
    with model.disable_adapter():
        alone = model(ids, use_cache=True).past_key_values
        before = model(ids[:, :start], use_cache=True).past_key_values
    for layer, other in zip(whole.past_key_values.layers, alone.layers, strict=True):
        for own, cached in ((layer.keys, other.keys), (layer.values, other.values)):
            assert torch.equal(own[:, :, :start], cached[:, :, :start])
            assert not torch.equal(own, cached)
    resumed = model(ids[:, start:], past_key_values=before).logits
    assert_close(resumed, whole.logits[:, start:], rtol=1e-4, atol=1e-4)
    tokens = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model(tokens).logits[0, 19:-1].argmax(-1), tokens[0, 20:])
    assert TransformersRuntime(model).decode(ids, 5) == tokens[0, 20:].tolist()


def test_is_refused_where_all_tokens_are_alike(tmp_path: Path) -> None:
    model = attach(base(), SHAPE, seed=0).eval()
    qwlora.save_adapter(model, tmp_path)
    with pytest.raises(ExportError, match=r"activated LoRA.* every token.* hf or gguf"):
        read_canonical(tmp_path)
    with pytest.raises(CaptureError, match=r"activated LoRA.* hf or gguf"):
        qwlora.simulate(model, {"input_ids": IDS})
    for merge in (rounding_losses, qwlora.merged_model):
        with pytest.raises(MergeError, match=r"^the adapter is activated LoRA.* its invocation"):
            merge(model)
    with pytest.raises(TrainingError, match=r"Activated LoRA \(of linear layers\) cannot.*embed"):
        attach(base("qwen3"), LoraShape(4, 8, 0, ["embed_tokens"], alora_invocation_tokens=[7]), 0)


def test_a_job_trains_exports_and_proves_it(job_for: Any, tmp_path: Path) -> None:
    texts = [f"Q: {place} or {place + 1}?\nA: {place * 7}, as before" for place in range(10)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    data = {"source": str(tmp_path / "text.jsonl"), "sequence_tokens": 40, "packing": "none"}
    adapter = {"name": "first", "steps": 4, "warmup_steps": 1, "alora_invocation": "\nA:"}
    job = job_for("one-layer llama", data=data, adapters=[adapter], export={"targets": ["hf"]})
    for change, message in (
        ("data.packing=join", "adapter first: activated LoRA .* not join"),
        ("adapters.0.alora_invocation=Answer", "nothing to learn from 8 of 8"),
        ("adapters.0.alora_invocation=[256]", r"\[256\]\) has nothing .* 8 of 8"),  # the last token
    ):
        with pytest.raises(TrainingError, match=message):
            job.run(changes=[change])
    assert job.run()["parity"]["hf"]["first"]["passed"]
    config = json.loads((job.out / "export/hf/first/adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == byte_tokenizer()("\nA:")["input_ids"]
    assert "Activated LoRA: first." in (job.out / "export/hf/README.md").read_text()
