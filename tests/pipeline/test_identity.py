"""What makes a stage stale: keys of the recipe, each the stages that read it. And what does not:
paths, names, machines, releases, missing sources, and how recipe.yaml is written."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib.metadata import Distribution, version
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from cli.command_line import answered
from conftest import text
from pipeline.conftest import planned, pretend_run
from qwlora.pipeline.commands.push import prepared
from qwlora.pipeline.job import Judge, job_recipe
from qwlora.pipeline.results import read_job, rebuild_reports
from qwlora.pipeline.run import run
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.store import Store
from qwlora.recipe import implied
from qwlora.recipe.whole_recipe import Recipe
from qwlora.report.verdict import verdict
from qwlora.system.seen import Seen
from qwlora.targets.target import Target

# KEY: OLD -> NEW [with KEY=VALUE ...] => the stages that read it [as the keys that they name]
# `;` is between changes that are tried one by one. `-`: not set. The stages that need these are
# stale, too; all others are current.
ROWS = """
name: a -> b; device: auto -> cpu; evaluate: own -> all =>
preset: fast -> balanced => quantize train/first as base.solver|adapters.first.init
workflow: qw-lora -> qwa-lora => train/* calibrate/_base as workflow|quantize/activations
reference: - -> float => evaluate/adapted/* evaluate/simulated/*
seed: 0 -> 1 => quantize/sample TEXTS export/gguf* as seed
seed: 0 -> 1 with export.canary=none => quantize/sample TEXTS as seed
seed: 0 -> 1 with reference=float => quantize/sample TEXTS export/gguf* as seed

model.source: model -> other; model.source: a.gguf -> c.gguf => FLOAT
model.source: model -> same; model.source: a.gguf -> b.gguf =>
model.trust_remote_code: false -> true => FLOAT
model.encodings: a.json -> b.json; model.keep_float: [] -> [lm_head] with KEEP => quantize
model.block_order: - -> channel; model.prefix: - -> x with KEEP => quantize

data.source: text -> third => FIRST
data.split: train -> test with ROWS data.source=rows data.text_column=a => TEXTS as data.source (its content, split
data.text_column: a -> b with ROWS => TEXTS as data.source (its content, split, columns
data.prompt_column: a -> b with ROWS data.completion_column=c => TEXTS as columns
data.completion_column: a -> b with ROWS data.prompt_column=c => TEXTS as columns
data.messages_column: m -> n with ROWS => TEXTS as columns
data.instruction_column: a -> b with ROWS data.output_column=c => TEXTS as columns
data.input_column: a -> b with ROWS data.instruction_column=c data.output_column=d => TEXTS as columns
data.output_column: a -> b with ROWS data.instruction_column=c => TEXTS as columns
data.subset: - -> x; data.empty_records: error -> skip with ROWS data.text_column=a =>
data.repeated: remove -> keep with ROWS data.text_column=a =>
data.chat_template: a.json -> b.json with ROWS data.messages_column=m => TEXTS
data.prompt_format: auto -> plain with ROWS data.prompt_column=a data.completion_column=b => TEXTS
data.prompt_format: auto -> plain with ROWS data.messages_column=m =>
data.turns: together -> apart with ROWS data.messages_column=m => TEXTS
data.turns: together -> apart; data.packing: - -> join; data.most_lost: 0.5 -> 0.6 =>
data.packing: - -> none => TEXTS
data.sequence_tokens: 32 -> 16 => quantize/sample TEXTS
data.held_out: 0.2 -> 0.3 => TEXTS as held_out
data.evaluation: - -> third => FIRST as evaluation
data.evaluation_sequences: 4 -> 2 => evaluate/* train/first
data.evaluation_sequences: 4 -> 2 with SHARED => evaluate/* train/first calibrate/first calibrate/second
data.calibration_sequences: 8 -> 4 => RANGES

base.solver: gptq -> search; base.weights: w4-signed32 -> w5-signed32 => quantize
base.solver: gptq -> search with reference=float => quantize
base.weights: w4-signed32 -> w04-signed032 =>
base.rules.0.match: lm_head -> x; base.rules.0.weights: w5-signed32 -> w8-signed32 with RULE => quantize
base.rules.0: {match: x, weights: w5-signed32} -> {match: x, keep: float} with RULE => quantize as base.rules.0.keep
base.rules.0.solver: rtn -> search with RULE export.targets=[onnx] => quantize
base.rotation: - -> hadamard => FLOAT
base.bits: - -> 5; base.size: - -> 60kB => quantize
base.gptq.damping: 0.01 -> 0.02; base.gptq.activation_order: false -> true => quantize
base.gptq.damping: 0.01 -> 0.02 with base.solver=search adapters.0.init=zero =>
base.gptq.sweeps: 2 -> 3; base.tuning.steps: 2 -> 3 => quantize
base.tuning.learning_rate: 3e-3 -> 2e-3; base.tuning.compute: auto -> float32 => quantize
base.calibration_sequences: 32 -> 16 => quantize/sample quantize
base.calibration.0.text: job -> third => quantize
base.calibration.0.text: text -> third with RECOVERY => quantize train/first
base.calibration.0.weight: 1.0 -> 2.0 => quantize/sample quantize as base.calibration.
base.calibration.1.temperature: 1.0 -> 0.5 => quantize/sample
base.calibrate_on: - -> [second] => quantize calibrate/_base

adapters.0.name: first -> one =>
adapters.1.data: {source: more} -> {source: third} => SECOND as adapters.second.data.source
adapters.0.continue_from: peft -> other with START => train/first evaluate/imported/first
adapters.0.continue_from: peft -> peft2; adapters.0.unknown_base: refuse -> accept with START =>
adapters.0.objective: text -> recovery => train/first
adapters.0.rank: 16 -> 8 => train/first calibrate/_base
adapters.0.rank: 16 -> 8 with reference=float => train/first train/first/float calibrate/_base
adapters.0.rank: 16 -> 8 with export.targets=[qairt_pipeline] => train/first export/qairt_pipeline/* as rank
adapters.0.steps: 6 -> 7 with export.targets=[qairt_pipeline] => train/first
adapters.0.steps: 6 -> 7 with reference=float => train/first train/first/float
adapters.0.epochs: - -> 2 with adapters.0.steps=60 => train/first as epochs
adapters.0.init: qera -> svd => train/first as init
adapters.0.init: qera -> svd with reference=float => train/first as init
adapters.0.init_share: - -> 0.25 => train/first
adapters.0.init_share: - -> 0.5 =>
adapters.0.alpha: 32.0 -> 16.0; adapters.0.dropout: 0.0 -> 0.1 => train/first
adapters.0.rslora: false -> true; adapters.0.alpha_pattern: {} -> {q_proj: 4.0} => train/first
adapters.0.target_parameters: [] -> [x]; adapters.0.dora: false -> true with EACH => train/first
adapters.0.mergeable: false -> true with EACH => train/first
adapters.0.target_modules: all-linear -> [q_proj] => train/first calibrate/_base as target_modules
adapters.0.rank_pattern: {} -> {q_proj: 4} => train/first calibrate/_base
adapters.0.layers: - -> [0] => train/first calibrate/_base as layers
adapters.0.steps: 6 -> 7; adapters.0.batch_sequences: 1 -> 2 => train/first
adapters.0.accumulation_steps: 1 -> 2; adapters.0.learning_rate: 1e-3 -> 2e-3 => train/first
adapters.0.weight_decay: 0.0 -> 0.1; adapters.0.schedule: cosine -> linear => train/first
adapters.0.warmup_steps: 5 -> 4; adapters.0.clip: 1.0 -> 2.0 => train/first
adapters.0.compute: auto -> float32; adapters.0.gradient_checkpointing: false -> true => train/first
adapters.0.evaluation_steps: 3 -> 2; adapters.0.patience: - -> 2 => train/first
adapters.0.divergence: stop -> ignore; adapters.0.report_to: [] -> [wandb] =>
adapters.0.checkpoint_steps: 10 -> 5 =>

simulation.policy: npu -> matmul-inputs; simulation.inputs: tokens -> embeddings => RANGES
simulation.rules.0: {match: x, bitwidth: 8} -> {match: x, keep: float} with VALUE => RANGES as simulation.rules.0.keep
simulation.rules.0.match: lm_head -> x; simulation.rules.0.bitwidth: 8 -> 16 with VALUE => RANGES
simulation.rules.0.symmetric: - -> true; simulation.rules.0.observer: - -> sqnr with VALUE => RANGES
simulation.rules.0.force: false -> true; simulation.rules.0.of: - -> activations with VALUE => RANGES
simulation.rules.0.minimum: 0.0 -> -1.0 with VALUE simulation.rules.0.maximum=1.0 => RANGES
simulation.rules.0.maximum: 1.0 -> 2.0 with VALUE simulation.rules.0.minimum=0.0 => RANGES
simulation.activation_bitwidth: 16 -> 8; simulation.activation_symmetric: false -> true => RANGES
simulation.observer: min-max -> sqnr => RANGES
simulation.observer: min-max -> sqnr with workflow=qwa-lora => quantize/activations RANGES
simulation.observer: min-max -> sqnr with SHARED => calibrate RANGES
simulation.percentile: 99.9 -> 99.0 with simulation.observer=percentile => RANGES
simulation.percentile: 99.9 -> 99.0 =>
simulation.calibration_tokens: - -> 32; simulation.unseen: error -> float => RANGES
simulation.residual_adds: float -> quantize; simulation.key_value_bitwidth: - -> 8 => RANGES
simulation.symmetric_matmul_second_input: false -> true => RANGES
simulation.adapter_weights: w8-channel -> w8-tensor => RANGES
simulation.adapter_activation_bitwidth: - -> 8 => RANGES
simulation.base_activations: all -> adapter_only => RANGES

export.targets: [onnx] -> [onnx, gguf] =>
export.targets: [onnx] -> [onnx, gguf] with base.bits=5 => quantize
export.encodings_version: 1.0.0 -> 2.0.0; export.opset: - -> 18 with NPU => export/qairt
export.use_cases: - -> [first, none] with NPU => calibrate/_use_cases
export.use_cases: - -> [first, second, none] with NPU =>
export.graphs: {tokens: [4]} -> {tokens: [8]} with NPU => export/qairt as export.graphs.tokens
export.graphs: {context: [256]} -> {context: [512]} with NPU => export/qairt as export.graphs.context
export.embedding_bits: - -> 32 with export.targets=[hf, onnx] => export/*
export.embedding_bits: - -> 16 with export.targets=[hf, onnx] =>
export.embedding_bits: - -> 16 with export.targets=[gguf] => export/*
export.canary: generated -> none with export.targets=[gguf] => export/*
export.canary: generated -> held_out with export.targets=[hf] => export/*
export.canary: generated -> none with NPU =>
export.proof: generated -> none => verify/*/first verify/*/second
export.layout: - -> genie with NPU => export/qairt
verify.sequences: 8 -> 9; verify.perplexity_difference: 0.003 -> 0.002 => verify/*
"""
STAGES = {
    "FLOAT": "evaluate/float evaluate/float/* quantize/sample quantize",
    "TEXTS": "quantize train/* calibrate/* verify/* evaluate/*",
    "FIRST": "quantize train/first calibrate/first calibrate/_base verify/*/first verify/onnx "
    "evaluate/float evaluate/base evaluate/adapted/first evaluate/simulated/first",
    "SECOND": "train/second calibrate/second verify/*/second evaluate/*/second",
    "RANGES": "calibrate/*",
}
GIVEN = {
    "KEEP": "base.solver=keep model.encodings=a.json base.tuning.steps=0 export.targets=[onnx] "
    "base.calibration=[job]",
    "ROWS": "data.source=rows.jsonl adapters.1.data=null",
    "RULE": "base.rules=[{match: lm_head, weights: w5-signed32}]",
    "START": "adapters.0={name: first, continue_from: peft, unknown_base: accept}",
    "EACH": "export.targets=[onnx_each] adapters.0.init=zero",
    "RECOVERY": "adapters.0.objective=recovery adapters.0.init=zero base.calibration=[{text: text}]",
    "SHARED": "simulation.base_activations=adapter_only",
    "VALUE": "simulation.rules=[{match: lm_head, bitwidth: 8}]",
    "NPU": "export.targets=[qairt] simulation.residual_adds=quantize "
    "simulation.key_value_bitwidth=8 simulation.symmetric_matmul_second_input=true "
    "simulation.base_activations=none",
}


def single_rows() -> Iterator[str]:
    """A row for each change; what is after `with` and `=>` holds for all changes of a row."""
    for row in filter(None, ROWS.splitlines()):
        changes, rest = re.fullmatch(r"(.*?)(( with .*)? =>.*)", row).group(1, 2)
        yield from (f"{change}{rest}" for change in changes.split("; "))


def models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [found for part in get_args(annotation) for found in models(part)]


def keys(section: type[BaseModel] = Recipe, path: str = "") -> Iterator[str]:
    """All keys of a recipe; an adapter's own data has those of the data section."""
    for name, field in section.model_fields.items():
        inner, many = models(field.annotation), "list" in str(field.annotation)
        if not inner or path + name == "adapters[].data":
            yield path + name
        else:
            yield from keys(inner[0], f"{path}{name}{'[]' * many}.")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A recipe, next to everything that a row names."""
    folder = tmp_path_factory.mktemp("identity")
    for name in ("model", "same", "other"):
        shutil.copytree(checkpoints["one-layer llama"], folder / name)
    os.utime(folder / "same" / "model.safetensors", ns=(1, 1))
    for number, name in enumerate(("text", "more", "third")):
        (folder / name).mkdir()
        for document in range(8):
            (folder / name / f"{document}.txt").write_text(text(10 * number + document, 60))
    for name in ("rows", "peft", "peft2"):
        (folder / name).mkdir()
    for number, name in enumerate(("rows/train.jsonl", "rows/test.jsonl", "rows.jsonl")):
        rows = [{k: text(5 * n + i + number, 60) for i, k in enumerate("abcd")} for n in range(8)]
        for row, (name_, keys_) in product(rows, {"m": "ab", "n": "cd"}.items()):
            turns = zip(("user", "assistant"), keys_, strict=True)
            row[name_] = [{"role": role, "content": row[key]} for role, key in turns]
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = {"other/generation_config.json": "{}", "same/README.md": "a card"}
    files |= {"same/.DS_Store": "of a file manager", "peft2/README.md": "a card"}
    files |= {f"{name}/adapter_config.json": "{}" for name in ("peft", "peft2")}
    files |= {"a.gguf": "same", "b.gguf": "same", "c.gguf": "other", "a.json": "1", "b.json": "2"}
    for name, content in files.items():
        (folder / name).write_text(content)
    first = {"name": "first", "steps": 6, "evaluation_steps": 3}
    second = {"name": "second", "steps": 6, "data": {"source": "more"}, "init": "zero"}
    sections = {
        "model": {"source": "model"},
        "data": {"source": "text", "sequence_tokens": 32, "evaluation_sequences": 4},
        "base": {"calibration": [{"text": "job"}, {"text": "model"}], "tuning": {"steps": 2}},
        "adapters": [first, second],
        "export": {"targets": ["onnx", "gguf"]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return folder / "recipe.yaml"


SEEN = Seen()


def parsed(row: str) -> tuple[list[str], list[str], list[str], list[str]]:
    """Changes before and after, stages, and what they name."""
    change, _, effect = row.partition(" =>")
    change, _, given = change.partition(" with ")
    key, _, values = change.partition(": ")
    stages, _, named = effect.partition(" as ")
    for name, more in GIVEN.items():
        given = given.replace(name, more)
    for name, more in STAGES.items():
        stages = stages.replace(name, more)
    common = re.split(r" (?=[\w.]+=)", given) if given else []
    both = [[*common, *([f"{key}={v}"] * (v != "-"))] for v in values.split(" -> ")]
    key = re.sub(
        r"^adapters\.(\d)", lambda m: ("adapters.first", "adapters.second")[int(m[1])], key
    )
    return *both, stages.split(), (named or key).split("|")


@pytest.mark.parametrize("row", single_rows())
def test_a_key_makes_stale_what_reads_it(row: str, recipe: Path, tmp_path: Path) -> None:
    old, new, patterns, named = parsed(row)
    before, after = (planned(recipe, *changes, seen=SEEN) for changes in (old, new))
    store = Store(tmp_path)
    pretend_run(store, before)
    judge = Judge(after, store)
    for there, place in judge.moves().items():
        store.records[place] = store.records.pop(there)
    judge.again()
    lines = {s.name: judge.differences(s) for s in after if judge.differences(s)}
    known = [stage.name for stage in after if stage.place in store.records]
    expected = {name for name in known if any(fnmatch(name, p) for p in patterns)}
    assert lines.keys() == expected
    for name, found in lines.items():
        assert any(key in line for key in named for line in found), f"{name}: {found}"
    stale = expected | {stage.name for stage in after} - {*known}
    for stage in after:
        stale |= {stage.name} if stale & {*stage.needs.values()} else set()
    assert judge.stale.keys() == stale


def test_each_key_has_a_row() -> None:
    rows = [row.split(": ")[0] for row in single_rows()]
    rows += [row.partition(" as ")[2] for row in single_rows()]
    known = {re.sub(r"\.\d\b", "[]", row) for row in rows}
    assert {*keys()} - known == set()


def _in_recipe(place: Path, change: Callable[[str], str]) -> None:
    """Edit the recipe of the job by hand."""
    file = place / "job" / "recipe.yaml"
    before = file.read_text()
    file.write_text(change(before))
    assert file.read_text() != before


def _other_release(place: Path, patch: pytest.MonkeyPatch) -> None:
    known = Distribution.version
    own = property(lambda d: "99.0" if d.name == "qwlora" else known.fget(d))
    patch.setattr(Distribution, "version", own)
    assert version("qwlora") == "99.0"


def _other_processor(place: Path, patch: pytest.MonkeyPatch) -> None:
    is_fast = implied.auto_compute("cpu") == "bfloat16"
    patch.setattr(implied, "auto_compute", lambda device: "float32" if is_fast else "bfloat16")
    patch.setattr("qwlora.system.machine.processor_name", lambda: "Other 1")


def shown(job: Path) -> list[Any]:
    """What the read-only commands show: the state, the verdict, and what would be uploaded."""
    read = read_job(job)
    (page,) = rebuild_reports([job])
    assert "No verdict yet" not in page.read_text()
    found = [read.state, verdict(read).kind, *read.results["perplexity"].keys()]
    for adapter in (None, *(a.name for a in job_recipe(job).adapters)):
        with prepared(job, "me/mine", adapter) as upload:
            found += [sorted(upload.files), len(upload.notes)]
    return found


def _model_moved(place: Path, patch: pytest.MonkeyPatch) -> None:
    (place / "model").rename(place / "elsewhere")
    _in_recipe(place, lambda text: text.replace(f"{place}/model", f"{place}/elsewhere"))


def _renamed_by_hand(place: Path, patch: pytest.MonkeyPatch) -> None:
    _in_recipe(place, lambda text: "# mine\n" + text.replace("name: first", "name: one"))


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "the model moved": _model_moved,
    "the job moved": lambda place, patch: (place / "job").rename(place / "moved"),
    "no texts": lambda place, patch: [shutil.rmtree(place / name) for name in ("text", "more")],
    "no model": lambda place, patch: shutil.rmtree(place / "model"),
    "no runtime": lambda place, patch: patch.setattr(Target, "missing", lambda *_: "it is away"),
    "another release": _other_release,
    "another processor": _other_processor,
    "an adapter renamed by hand": _renamed_by_hand,
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_stale(change, finished, tmp_path, monkeypatch) -> None:
    def no_stage(context: Any, stage: Stage, *folders: Path) -> dict[str, Any]:
        raise AssertionError(f"{stage.name} ran")

    place = Path(shutil.copytree(finished, tmp_path / "place"))
    _in_recipe(place, lambda text: text.replace(str(finished), str(place)))
    before = shown(place / "job")
    CHANGES[change](place, monkeypatch)
    monkeypatch.setattr("qwlora.pipeline.run.run_stage", no_stage)
    (job,) = (file.parent for file in place.glob("*/recipe.yaml"))
    name = job_recipe(job).adapters[0].name
    assert shown(job) == before
    assert answered("generate", job, "a", "--models", f"base,{name}", "--max-new-tokens", "2")
    assert name in answered("adapters", "list", job)
    assert "adapters/second: good" in answered("adapters", "check", job)
    assert run(job / "recipe.yaml", job)["run"]["state"] == "finished"
    assert shown(job) == before
    answered("adapters", "rename", job, name, "renamed")
    assert shown(job) == before
    answered("adapters", "remove", job, "second", "--yes")
    assert run(job / "recipe.yaml", job)["run"]["state"] == "finished"
    assert [*read_job(job).results["train"]] == ["renamed"]
