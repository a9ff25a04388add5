"""What each stage of a job will need, before it runs: peak memory and disk; and what does not fit.
`qwlora plan` prints it, and `qwlora run` begins with it.

Shapes come from the model's configuration, activations from running the model's own code on tensors
without data (`traced_models.py`). What stages hold at the same time is written down here, next to
the reason. Weights are never read.

Memory counts what is alive at the peak of a stage, and the process itself with its libraries. The
allocator's unused pages are not counted.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwlora.adapter.chunked_loss import CHUNK_LOGITS
from qwlora.errors import size
from qwlora.export.registry import TARGETS
from qwlora.formats.base_files import SHARD_BYTES
from qwlora.formats.model_source import fetch
from qwlora.formats.user_path import user_path
from qwlora.grid.activation_observer import VALUES
from qwlora.pipeline.job.digests import Digests
from qwlora.pipeline.plan.plan import (
    Stage,
    UnreadTexts,
    has_float_model,
    is_compared,
    make_plan,
    needs_moments,
    resolve_compute,
)
from qwlora.pipeline.plan.traced_models import TracedModels
from qwlora.quantize.solvers import SOLVERS
from qwlora.recipe import Adapter, Data, Recipe
from qwlora.system.memory import memory_limit_bytes, return_freed_memory, rss_bytes
from qwlora.system.progress import Track, untracked

FLOAT = 4  # bytes
_SCORED_AT_ONCE = 2**22  # logits; analysis/token_scores.py
# Bytes of Python objects for each operator of a captured graph: its node with metadata and stack
# trace in torch's program, the same in the simulation's module; in ONNX, nodes and values.
_NODE_BYTES, _ONNX_NODE_BYTES = 60_000, 60_000
# A scale in an encodings file: two Python numbers in lists, and 24 characters of text, twice.
_SCALE_BYTES = 120


@dataclass(frozen=True)
class Forecast:
    """What a stage will need.

    Args:
        memory: bytes at the peak, by what holds them.
        disk: bytes that the stage writes and the job keeps.
        settings: keys of the recipe that make the stage need less memory, with what they do.
    """

    stage: str
    memory: Mapping[str, float]
    disk: float = 0
    settings: tuple[str, ...] = ()

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimates:
    """Forecasts of all stages, and what there is.

    Args:
        memory_limit: bytes that the process may use; None if it is not known.
        disk_free: bytes free where the job is written; None if it is not known.
    """

    stages: tuple[Forecast, ...]
    memory_limit: int | None
    disk_free: int | None

    @property
    def disk(self) -> float:
        """Of all stages."""
        return sum(stage.disk for stage in self.stages)

    @property
    def largest(self) -> Forecast:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def summary(self) -> str:
        return (
            f"estimate: peak memory {size(int(self.largest.peak))} in {self.largest.stage}, disk "
            f"{size(int(self.disk))}"
        )

    @property
    def problems(self) -> list[str]:
        """What does not fit, and what would make it fit."""
        problems = []
        for stage in self.stages:
            if self.memory_limit is not None and stage.peak > self.memory_limit:
                most = max(stage.memory, key=lambda part: stage.memory[part])
                remedy = " or ".join(stage.settings) or "a smaller model"
                problems.append(
                    f"{stage.stage} needs {size(int(stage.peak))}, and this machine has "
                    f"{size(self.memory_limit)}. Most of it is {most} "
                    f"({size(int(stage.memory[most]))}). Less memory: {remedy}"
                )
        if self.disk_free is not None and self.disk > self.disk_free:
            problems.append(
                f"the job needs {size(int(self.disk))} of disk, and {size(self.disk_free)} are "
                "free. Choose another --out, or free space"
            )
        return problems

    def to_json(self) -> dict[str, Any]:
        stages = [{**asdict(stage), "peak": stage.peak} for stage in self.stages]
        derived = {"peak": self.largest.peak, "disk": self.disk, "problems": self.problems}
        return {**asdict(self), **derived, "stages": stages}


def plan_job(recipe: Recipe, out: Path, track: Track = untracked) -> Estimates:
    """Estimate all stages of a recipe. Reads configurations and headers, no weights and no text.

    Raises:
        CaptureError: the model does not run without data, as most mixtures of experts.
    """
    recipe = resolve_compute(recipe)
    plan = make_plan(recipe, UnreadTexts(recipe), Digests(trust_mtime=True))
    return estimate(recipe, plan, out, track)


def estimate(
    recipe: Recipe,
    stages: Sequence[Stage],
    out: Path,
    track: Track = untracked,
    holds_float_model: bool = False,
) -> Estimates:
    """Estimate `stages` of a recipe; see `plan_job`.

    Args:
        holds_float_model: whether this process has loaded the float model already.
    """
    keeps = holds_float_model or any(stage.name == "evaluate/float" for stage in stages)
    forecaster = Forecaster(recipe, keeps_float_model=keeps)
    forecasts = [
        forecaster.stage(stage) for stage in track(list(stages), "estimating", len(stages))
    ]
    # Resident memory of this process with what its stages import, after the runs without data.
    importlib.import_module("qwlora.pipeline.plan.preflight")  # the Trainer and everything below
    for target in recipe.export.targets:
        TARGETS[target].missing()  # imports its packages
    gc.collect()
    return_freed_memory()
    process = float(rss_bytes())
    if holds_float_model:
        process -= FLOAT * forecaster.models.values
    folder, free = user_path(str(out)).absolute(), None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    with_process = (replace(f, memory={"process": process, **f.memory}) for f in forecasts)
    return Estimates(tuple(with_process), memory_limit_bytes(), free)


class Forecaster:
    """Forecasts the stages of one recipe.

    Args:
        keeps_float_model: whether it is in memory when the base is quantized.
    """

    def __init__(self, recipe: Recipe, keeps_float_model: bool = False):
        self.recipe, self._keeps_float_model = recipe, keeps_float_model
        self.models = TracedModels(recipe)
        location = fetch(recipe.model.source)
        self._is_gguf = location.gguf_file is not None
        self._files = [f.stat().st_size for f in location.files if f.suffix == ".safetensors"]

    def stage(self, stage: Stage) -> Forecast:
        """What `stage` will need, besides the memory of the process itself."""
        forecasts = {
            "evaluate": self._evaluate,
            "quantize": self._quantize,
            "train": self._train,
            "export": self._export,
            "verify": self._verify,
        }
        return forecasts.get(stage.verb, self._calibrate)(stage)  # calibrate, calibrate-base

    # Models

    @property
    def _float_bytes(self) -> float:
        return float(FLOAT * self.models.values)

    @property
    def _float_memory(self) -> dict[str, float]:
        parts = {"float model": self._float_bytes}
        if self._is_gguf:
            # Measured, and seen with two models from GGUF files: what loading and running them
            # leaves in the allocator. Not seen in stages that load them only to read weights.
            largest = max(p.numel() for p in self.models.model.parameters())
            parts["copies of the largest tensor"] = 2.0 * FLOAT * largest
        return parts | self._mapped_files

    @property
    def _mapped_files(self) -> dict[str, float]:
        """Files in half precision stay mapped while their float32 copies are made."""
        mapped = float(sum(self._files))
        return {"mapped files": mapped} if 0 < mapped < 0.9 * self._float_bytes else {}

    @property
    def _base_memory(self) -> dict[str, float]:
        rest = self.models.float_values
        # Floats are stored in 16 bits if that is exact, and stay mapped next to their copies.
        stored = 0 if self._is_gguf else 2 * rest
        return {"packed base": self.models.packed_bytes + FLOAT * rest + stored}

    @property
    def _shard(self) -> dict[str, float]:
        shard = min(float(SHARD_BYTES), sum(self._base_memory.values()))
        return {} if self._is_gguf else {"shard": shard}

    def _logits(self, tokens: int) -> float:
        return float(FLOAT * tokens * self.models.head_shape[0])

    def _adapter(self, stage: Stage) -> Adapter:
        """The stage's adapter, or the first one if the stage is of all."""
        adapters = self.recipe.adapters
        return next((a for a in adapters if a.name == stage.adapter), adapters[0])

    def _text(self, stage: Stage) -> Data:
        text = self.recipe.base_text() if stage.adapter is None else None
        return text or self.recipe.data_of(stage.adapter or self.recipe.adapters[0].name)

    def _operators(self, adapter: Adapter) -> int:
        """Of the captured graph; at any length, which its operators do not depend on."""
        tokens = self.recipe.data_of(adapter.name).sequence_tokens
        return self.models.forward("graph", tokens, adapter).operators

    def _simulation(self, adapter: Adapter, tokens: int) -> tuple[dict[str, float], float]:
        """Memory of a captured graph, and bytes of activations in a forward pass."""
        run = self.models.forward("graph", tokens, adapter)
        memory = {
            "captured graph": float(_NODE_BYTES * run.operators),
            # float copies of what the simulation quantizes besides the base: norms, the embedding
            "quantized copies": float(FLOAT * self.models.float_values),
        }
        return memory, run.peak + self._logits(tokens)

    # Stages

    def _evaluate(self, stage: Stage) -> Forecast:
        kind = stage.name.split("/")[1]
        tokens = self._text(stage).sequence_tokens
        has_float = has_float_model(self.recipe)
        compared = has_float and is_compared(kind, stage.name.partition("/on/")[2])
        memory = dict[str, float]()
        if kind in ("float", "imported") or compared:
            memory |= self._float_memory
            if kind == "float" and not compared:  # the checks before the job loaded it
                memory = {"float model": self._float_bytes, **self._mapped_files}
        peak: float = self.models.forward("float", tokens).peak
        if kind in ("base", "adapted", "simulated"):
            memory |= self._base_memory
        if kind in ("base", "adapted"):
            adapter = self._adapter(stage) if kind == "adapted" else None
            peak = self.models.forward(kind, tokens, adapter).peak
        elif kind == "simulated":
            graph, peak = self._simulation(self._adapter(stage), tokens)
            memory |= graph
        logits = self._logits(tokens)
        # Rows and log-softmax of a chunk, of both models and two differences if compared; logits
        # of the last sequence, and of the other model.
        arrays, whole = (6, 2 * logits) if compared else (2, logits)
        scored = whole + arrays * min(FLOAT * _SCORED_AT_ONCE, logits)
        memory["activations and logits"] = peak + scored
        return Forecast(stage.name, memory, settings=("data.sequence_tokens",))

    def _quantize(self, stage: Stage) -> Forecast:
        base, models = self.recipe.base, self.models
        tokens = self._text(stage).sequence_tokens
        moments = needs_moments(self.recipe)
        disk = sum(self._base_memory.values())
        solvers = {base.solver, *(rule.solver for rule in base.rules if rule.solver)} - {"keep"}
        if moments or any(SOLVERS[solver].needs_calibration for solver in solvers):
            memory = self._calibrated_solver(tokens, base.calibration_sequences, moments)
            if moments:  # triangles of symmetric matrices
                disk += FLOAT / 2 * sum(i * i + o * o for block in models.blocks for i, o in block)
            settings: tuple[str, ...] = ("base.solver: search with adapters[].init: zero",)
        else:
            # Layer by layer from the files, with candidates for the scales of each weight.
            widest = max(i * o for block in models.blocks for i, o in block)
            largest = FLOAT * max(math.prod(models.head_shape), 6 * widest)
            memory = {"largest layer": float(largest)} | self._shard
            settings = ("a model as safetensors, which is read layer by layer",)
        if self._is_gguf or self._keeps_float_model:
            memory |= self._float_memory
        if base.tuning.steps:
            step = models.training(self.recipe.adapters[0], tokens, 1)
            memory = {**self._float_memory, **self._base_memory}
            memory["activations of tuning"] = step.peak + 6 * self._logits(tokens)
            settings = ("base.tuning.steps: 0",)
        return Forecast(stage.name, memory, disk, settings)

    def _calibrated_solver(self, tokens: int, count: int, moments: bool) -> dict[str, float]:
        models = self.models
        # Of a block: its moments, and what the solver makes of the largest: the damped matrix,
        # its factors and products with the weight.
        squares = max(
            sum(i * i + (o * o if moments else 0) for i, o in block) for block in models.blocks
        )
        inner, out = max(shape for block in models.blocks for shape in block)
        # Inputs and outputs of a block's products, their gradients, and copies of both.
        copies = max(sum(2 * i + 4 * o for i, o in block) for block in models.blocks)
        values = {
            "hidden states of all calibration sequences": count * tokens * models.head_shape[1],
            "second moments of a block": squares,
            "solver of the largest layer": 4 * inner**2 + 6 * inner * out,
            "activations of a block": tokens * copies,
        }
        if not self._is_gguf:
            block = max(sum(i * o for i, o in block) for block in models.blocks)
            values["float blocks"] = models.values - models.packed_weights + 2 * block
        return {name: float(FLOAT * number) for name, number in values.items()} | self._shard

    def _train(self, stage: Stage) -> Forecast:
        adapter, models = self._adapter(stage), self.models
        tokens, rows = self._text(stage).sequence_tokens, adapter.batch_sequences
        trained = models.trained_values(adapter)
        during, starting = dict[str, float](), dict[str, float]()
        if adapter.steps:
            chunk = min(FLOAT * CHUNK_LOGITS, rows * self._logits(tokens))
            head = 2.0 * math.prod(models.head_shape) if adapter.compute == "bfloat16" else 0.0
            during = {
                # weights, gradients and two moments of AdamW
                "adapter and optimizer": 4.0 * FLOAT * trained,
                "activations": float(models.training(adapter, tokens, rows).peak),
                # logits of a chunk, their softmax and gradient; under autocast also the head
                "logits of a chunk": 3 * chunk + head,
            }
        if adapter.objective == "recovery":
            during |= self._float_memory
        if adapter.init != "zero":
            largest = max(max(shape) for block in models.blocks for shape in block)
            starting = {
                "float model": self._float_bytes,
                "factors of the largest layer": 8.0 * FLOAT * largest**2,
            }
        memory = self._base_memory | max(during, starting, key=lambda parts: sum(parts.values()))
        settings = ("gradient_checkpointing: true", "batch_sequences", "data.sequence_tokens")
        return Forecast(stage.name, memory, FLOAT * trained, settings)

    def _calibrate(self, stage: Stage) -> Forecast:
        adapter = self._adapter(stage)
        graph, peak = self._simulation(adapter, self._text(stage).sequence_tokens)
        memory = self._base_memory | graph | {"activations": peak}
        # About a quarter of a graph's operators have a quantizer.
        memory["samples of activations"] = FLOAT * VALUES * self._operators(adapter) / 4
        disk = 2 * FLOAT * self.models.trained_values(adapter)
        settings = ("simulation.calibration_tokens", "data.sequence_tokens")
        return Forecast(stage.name, memory, disk, settings)

    def _export(self, stage: Stage) -> Forecast:
        models, target = self.models, TARGETS[stage.name.split("/")[1]]
        stored = float(models.packed_bytes + FLOAT * models.float_values)
        if not target.is_simulated:
            return Forecast(stage.name, self._base_memory | {"files": stored}, stored)
        layers = models.packed_layers
        shapes = (layer.scheme.scale_shape(tuple(layer.tensor.shape)) for layer in layers)
        scales = sum(map(math.prod, shapes))
        adapter, settings = self._adapter(stage), ("base.weights.block_size",)
        graph, _ = self._simulation(adapter, self._text(stage).sequence_tokens)
        memory = self._base_memory | graph
        memory["encodings as text"] = float(_SCALE_BYTES * scales)
        if target.needs_zero_adapter and stage.adapter is not None:
            disk = 2 * FLOAT * models.trained_values(adapter) + 24 * scales
            return Forecast(stage.name, memory, disk, settings)
        memory["ONNX graph"] = float(_ONNX_NODE_BYTES * self._operators(adapter))
        memory["codes, one byte each"] = float(models.packed_weights)
        # as float32 tensors, in the ONNX model, and as bytes to write
        memory["copies of float values"] = 3.0 * FLOAT * models.float_values
        written = stored + 24 * scales
        if target.has_cases:  # weights in float, once for all graphs
            written += FLOAT * models.packed_weights
        return Forecast(stage.name, memory, written, settings)

    def _verify(self, stage: Stage) -> Forecast:
        models, target = self.models, TARGETS[stage.name.split("/")[1]]
        adapter, tokens = self._adapter(stage), self._text(stage).sequence_tokens
        memory = self._base_memory
        if not target.is_simulated:
            memory["exported model"] = sum(self._base_memory.values())
            memory["activations and logits"] = 3 * self._logits(tokens)
            return Forecast(stage.name, memory)
        graph, peak = self._simulation(adapter, tokens)
        run = models.forward("graph", tokens, adapter)
        activations = run.outputs - FLOAT * models.packed_weights  # without unpacked weights
        layer_bytes = activations * min(1.0, self.recipe.verify.layer_tokens / tokens)
        stored = models.packed_bytes + FLOAT * models.float_values + models.packed_weights
        memory |= graph
        by_layer = stored + 3 * layer_bytes  # simulated values, given and computed ones
        if target.needs_zero_adapter:
            by_layer += stored  # the session of all adapters stays
        # Three models' logits and their masked copies, two differences, and in float64 the
        # logits and log-softmax of one; ONNX Runtime packs the weight of the head once more.
        whole = stored + peak + 12 * self._logits(tokens) + FLOAT * models.float_values
        memory["model in ONNX Runtime"] = float(stored)
        part = "values of all layers" if by_layer > whole else "logits"
        memory[part] = max(by_layer, whole) - stored
        if target.needs_zero_adapter and stage.adapter is not None:
            memory["simulation of the base"] = sum((self._base_memory | graph).values())
        settings = ("verify.layer_tokens", "data.sequence_tokens")
        return Forecast(stage.name, memory, settings=settings)
