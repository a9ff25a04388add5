"""Peak memory and disk of each stage before it runs, right to a third. `qwlora plan` prints them.
Also its time, if an earlier job in the directory has such a stage from this machine.

Computed from shapes: no weights and no text are read, and no model runs. docs/log/plan.md compares
with measured peaks.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from qwlora.analysis.generate_text import SAMPLED_AT_ONCE
from qwlora.errors import duration, listed, size
from qwlora.formats.model_source import fetch
from qwlora.nn.packed_layer import tensor_out_in
from qwlora.nn.packed_tensor import PackedTensor
from qwlora.pipeline.job import Judge, sources_of
from qwlora.pipeline.plan import make_plan
from qwlora.pipeline.results import last_status
from qwlora.pipeline.stage import SAMPLE, ZERO, Stage
from qwlora.pipeline.stages.job_context import skeleton
from qwlora.pipeline.store import NAME, Store
from qwlora.quantize.layer_rules import plan_layers
from qwlora.recipe import Recipe
from qwlora.recipe.implied import REFERENCE, is_calibrated, is_compared
from qwlora.system.machine import machine, memory_limit_bytes
from qwlora.system.progress import untracked
from qwlora.targets.proof.prove import LAYER_TOKENS
from qwlora.targets.registry import TARGETS

FLOAT = 4.0  # bytes
# Measured: Python, torch, transformers and ONNX Runtime without a model (docs/log/plan.md).
PROCESS = 0.6e9
Memory = dict[str, float]  # bytes, by what holds them
LESS = {  # keys of the recipe that reduce a stage's memory; for the others the length of its text
    "quantize": "base.calibration: [job], tuning.steps: 0, or solver: search and init: zero",
    "train": "gradient_checkpointing: true, batch_sequences or data.sequence_tokens",
}


@dataclass(frozen=True)
class Forecast:
    """Bytes that a stage needs: memory at its peak, and disk for what the job keeps."""

    stage: str
    peak: float
    memory: Memory
    disk: float
    settings: str
    seconds: float | None = None  # None: not known

    @property
    def largest_part(self) -> str:
        return max(self.memory, key=lambda part: self.memory[part])


@dataclass(frozen=True)
class Estimates:
    """Forecasts of all stages, and the bytes that this machine has."""

    stages: Sequence[Forecast]
    memory_limit: int | None
    disk_free: int

    @property
    def disk(self) -> float:
        return sum(stage.disk for stage in self.stages)

    @property
    def largest(self) -> Forecast:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def summary(self) -> str:
        peak, stage = size(self.largest.peak), self.largest.stage
        time = "" if self.seconds is None else f", time {duration(self.seconds)}"
        return f"estimate: peak memory {peak} in {stage}, disk {size(self.disk)}{time}"

    @property
    def seconds(self) -> float | None:
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None

    @property
    def problems(self) -> list[str]:
        limit, by_part = self.memory_limit or math.inf, dict[str, list[Forecast]]()
        for stage in self.stages:
            if stage.peak > limit:
                by_part.setdefault(stage.largest_part, []).append(stage)
        problems = []
        for part, stages in by_part.items():
            most, less = max(stage.peak for stage in stages), [stage.settings for stage in stages]
            problems.append(
                f"the {part} in {listed(stage.stage for stage in stages)}: up to {size(most)} are "
                f"needed, but this machine has {size(limit)}. To use less memory: "
                + "; ".join(dict.fromkeys(less))
            )
        if self.disk > self.disk_free:
            problems.append(
                f"the job needs {size(self.disk)} of disk, but only {size(self.disk_free)} are "
                "free. Choose another --out, or free space"
            )
        return problems

    def to_json(self) -> dict[str, Any]:
        peak = max((stage.peak for stage in self.stages), default=0.0)
        whole = {"peak": peak, "disk": self.disk, "problems": self.problems}
        whole["seconds"] = self.seconds
        return asdict(self) | whole


def plan_job(recipe: Recipe, out: Path) -> Estimates:
    """Estimate the stages that a run of the recipe would run now."""
    store = Store(out)
    judge = Judge(make_plan(recipe, sources_of(recipe, store, untracked, reads=False)), store)
    return estimate(recipe, [stage for stage in judge.plan if stage.name in judge.stale], judge)


def estimate(recipe: Recipe, stages: Sequence[Stage], judge: Judge) -> Estimates:
    """Estimate `stages` of a job."""
    out = judge.store.path
    differ = [line for s in judge.plan if s.verb == "quantize" for line in judge.differences(s)]
    is_same = last_status(out).get("run", {}).get("machine") == machine()
    is_same = is_same and not any(line.startswith("model") for line in differ)
    costs, stays, forecasts = Costs(recipe, stages), Memory(), []
    for stage in stages:
        memory, disk = costs.of(stage)
        # The zero adapter's simulation stays in memory until the adapters are compared with it.
        memory = memory | stays if stage.adapter or stage.verb == "verify" else memory
        stays = costs.zero_adapter if stage.kind == ZERO else stays
        less, peak = LESS.get(stage.verb, "data.sequence_tokens"), PROCESS + sum(memory.values())
        seconds = _seconds(stage, judge, recipe) if is_same else None
        forecasts.append(Forecast(stage.name, peak, memory, disk, less, seconds))
    folder = out.expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return Estimates(forecasts, memory_limit_bytes(), shutil.disk_usage(existing).free)


def _seconds(stage: Stage, judge: Judge, recipe: Recipe) -> float | None:
    """How long a stage takes, by an earlier one of its kind."""
    records, kinds = judge.store.records, (stage.kind, stage.kind.removesuffix("/on"))
    same = [r for kind in kinds for r in records.values() if r.stage == kind]
    record = next(filter(None, [records.get(stage.place), *same]), None)
    if record is None or stage.verb != "train":
        return None if record is None else record.seconds
    trained = record.results.get(REFERENCE, record.results)["train"][NAME]
    adapter = next(a for a in recipe.adapters if a.name == stage.adapter)
    before = record.inputs["adapter"]
    step_sequences = before["batch_sequences"] * before["accumulation_steps"]
    # Epochs are those of the text that was trained on: the plan reads none.
    epochs, sequences = trained.get("epochs"), 0.0
    if epochs:
        sequences = trained["steps"] * step_sequences / epochs
    step, ran = trained["step_seconds"], trained["steps"] - trained["resumed_from_step"]
    steps = adapter.steps_on(round(sequences)) * adapter.step_sequences / step_sequences
    return max(record.seconds - step * ran, 0.0) + step * steps


class Costs:
    """Bytes that the stages of a recipe need. Tied tensors count once."""

    def __init__(self, recipe: Recipe, stages: Sequence[Stage]):
        self.recipe, base, model = recipe, recipe.base, cast(Any, skeleton(recipe.model))
        location = fetch(recipe.model.source)
        self.has_floats = location.holds_floats
        vocabulary, width = model.get_input_embeddings().weight.shape
        self.layers: int = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
        self.logits, self.hidden = FLOAT * vocabulary, FLOAT * width  # of a token
        self.packed = self.codes = self.scales = 0
        self.matrices: list[tuple[int, ...]] = []  # (out, in), without head and experts
        scheme, solver = base.scheme, base.solver.replace("keep", "rtn")
        for name, assigned in plan_layers(model, scheme, solver, base.layer_rules()).items():
            shape = tuple(tensor_out_in(model, name).shape)
            self.codes += math.prod(shape)
            self.scales += math.prod(assigned.scheme.scale_shape(shape))
            self.packed += PackedTensor.empty(assigned.scheme, shape).nbytes
            self.matrices += [shape] * (len(shape) == 2 and shape[0] != vocabulary)
        # Inputs and outputs of the matrices for a token. Measured: autograd keeps 0.8 (bfloat16) to
        # 1.1 (float32) times as much (docs/log/plan.md). Left out: experts, which look at their
        # data. An adapter of all layers has as many values for each rank.
        self.products = FLOAT * sum(map(sum, self.matrices))
        values = [parameter.numel() for parameter in model.parameters()]
        self.floats, self.kept = FLOAT * sum(values), FLOAT * (sum(values) - self.codes)
        # Measured: a GGUF file's largest tensor is copied twice; 16-bit files stay mapped.
        files, self.copies = sum(f.stat().st_size for f in location.files), 2 * FLOAT * max(values)
        self.loading = self.copies if location.gguf_file else files * (files < 0.9 * self.floats)
        self.float_model = {"float model": self.floats, "loading the float model": self.loading}
        self.is_whole = location.gguf_file or any(s.kind == "evaluate/float" for s in stages)
        # 16-bit floats of the base's files stay mapped.
        self.base: Memory = {"packed base": self.packed + 1.5 * self.kept}
        # Measured: 26 operators of 60 kB for each matrix. What stays float is copied.
        self.graph = self.base | {"captured graph": 1.56e6 * len(self.matrices) + self.kept}
        self.zero_adapter: Memory = {"simulated zero adapter": sum(self.graph.values())}

    def of(self, stage: Stage) -> tuple[Memory, float]:
        """Memory at the peak of a stage, without the process; and disk."""
        recipe, (verb, *kinds) = self.recipe, stage.kind.split("/")
        adapter = next((a for a in recipe.adapters if a.name == stage.adapter), recipe.adapters[0])
        tokens = recipe.data_of(stage.text or stage.adapter).sequence_tokens
        logits, products = tokens * self.logits, tokens * self.products
        trained = adapter.rank * self.products
        if stage.kind == SAMPLE:
            # The cache of keys and values is copied when it grows.
            cache = 2 * FLOAT * tokens * self.layers * min(out for out, _ in self.matrices)
            return self.float_model | {"key-value cache": 2 * SAMPLED_AT_ONCE * cache}, 0
        if verb == "evaluate":
            is_float = kinds[0] in ("float", "imported", REFERENCE)
            memory = {} if is_float else self.graph if kinds[0] == "simulated" else self.base
            scores = 4 * logits
            if is_float or (self.has_floats and is_compared(kinds[0], stage.text or "")):
                memory = memory | {"float model": self.floats}
                # Logits are computed once the copies of loading are gone.
                scores = max(scores, self.loading)
            return memory | {"loading, or logits": scores}, 0
        if verb == "quantize":
            squares = FLOAT * sum(out**2 + inner**2 for out, inner in self.matrices)
            memory = {"float values": 1.5 * self.kept + 2 * FLOAT * self.codes / self.layers}
            if self.is_whole:
                memory = {"float model": self.floats, "copies of the largest tensor": self.copies}
            if recipe.base.tuning.steps:
                memory = self.float_model | self.base | {"activations": products + 6 * logits}
            elif is_calibrated(recipe):
                # The hidden states of all sequences pass the model block by block. The solvers of a
                # block hold as much as its moments.
                states = recipe.base.calibration_sequences * tokens * self.hidden
                memory |= {"hidden states": states, "second moments": 2 * squares / self.layers}
            return memory, self.packed + self.kept
        if verb == "train":
            rows = adapter.batch_sequences / (self.layers if adapter.gradient_checkpointing else 1)
            memory = {"adapter and optimizer": 4 * trained, "activations": rows * products}
            if kinds or adapter.objective == "recovery":
                memory |= self.float_model
            elif adapter.init != "zero":
                # Float weights are read before the first step, and released.
                before = self.float_model
                if adapter.init == "qera":
                    before = before | {"second base": self.packed + self.kept}
                memory = max(memory, before, key=lambda parts: sum(parts.values()))
            return memory if kinds else self.base | memory, trained
        if verb not in ("export", "verify"):  # calibrate
            return self.graph | {"logits": 2 * logits}, trained
        target, graphs = TARGETS[kinds[0]], recipe.export.graphs_of(kinds[0])
        memory = self.graph if target.is_simulated else self.base
        stored = self.packed + self.kept / (2 if target.is_simulated else 1)  # 16-bit embeddings
        files = self.floats if target.writes_floats or graphs else stored
        if verb == "verify":
            # Measured: comparing layers holds 8 times their inputs and outputs (docs/log/plan.md).
            values = 8 * min(tokens, LAYER_TOKENS) * self.products + 3 * logits
            parts = {"files": files, "values": values if target.is_simulated else 3 * logits}
            # The float model generates the text of the proof before the files are opened.
            parts = max(parts, self.float_model, key=lambda held: sum(held.values()))
            return memory | parts, 0
        if target.has_base and stage.adapter:
            return memory, trained
        # Measured: text of encodings for each scale; four times as much as Python objects.
        text = self.scales * (190 if target.writes_floats else 24 if target.is_simulated else 0)
        onnx = memory["captured graph"] + 2 * self.kept + self.codes if target.is_simulated else 0
        copies = 1 if not graphs or target.has_cases else len(graphs.tokens) * len(graphs.context)
        memory = memory | {"files": files + onnx, "encodings as text": 4 * text}
        return memory, copies * (files + text)
