"""What each stage of a job will need, before it runs: peak memory and disk; and what does not fit.
`qwlora plan` prints it. `qwlora run` begins with what needs no run of the model: all of it without
activations, a lower bound.

Shapes come from the model's configuration, activations from running the model's own code on tensors
that have shapes but no data (`TracedModels`), whatever the architecture. What stages hold at the
same time is written down here, next to the reason. Weights are never read.

Memory counts what is alive at the peak of a stage, and the process itself with its libraries. The
allocator's unused pages are not counted.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import logging
import math
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.adapter.attach import attach
from qwlora.adapter.chunked_loss import CHUNK_LOGITS
from qwlora.adapter.training_step import lean_steps
from qwlora.analysis.generate_text import SAMPLED_AT_ONCE
from qwlora.errors import CaptureError, QwloraError, size
from qwlora.formats.base_files import SHARD_BYTES
from qwlora.formats.meta_model import build_model
from qwlora.formats.model_source import fetch, load_config, user_path
from qwlora.grid.activation_ranges import VALUES
from qwlora.grid.scheme import Scheme, parse_scheme
from qwlora.nn import weight_out_in
from qwlora.nn.packed_layer import PackedLayer, place_empty_, tie_weights_
from qwlora.pipeline.job.stage_records import Stage
from qwlora.pipeline.plan.plan import (
    REFERENCE,
    SAMPLE,
    JobTexts,
    compared_with,
    has_float_model,
    is_calibrated,
    is_compared,
    make_plan,
    needs_moments,
    reference_stage,
    resolve_compute,
    sampled_sequences,
)
from qwlora.quantize.layer_rules import plan_layers
from qwlora.quantize.quantize_blocks import tensors_by_block
from qwlora.recipe import Adapter, Data, Recipe
from qwlora.system.machine import memory_limit_bytes, return_freed_memory, rss_bytes
from qwlora.system.parameter_names import FOLDER
from qwlora.system.progress import Track, untracked
from qwlora.targets.registry import TARGETS

FLOAT = 4  # bytes
_SCORED_AT_ONCE = 2**22  # logits; analysis/token_scores.py
# Bytes of Python objects for each operator of a captured graph: its node with metadata and stack
# trace in torch's program, the same in the simulation's module; in ONNX, nodes and values.
_NODE_BYTES, _ONNX_NODE_BYTES = 60_000, 60_000
# A scale in an encodings file: two Python numbers in lists, and 24 characters of text, twice.
_SCALE_BYTES = 120
_ON_FLOAT = ("float", "imported", REFERENCE)  # kinds of models that hold no integers
_KEPT_SCHEME = "w4-block32"  # of integers that the model's files hold, whose grid is in their data


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
        counts_activations: False if `memory` is a lower bound, without them.
    """

    stages: tuple[Forecast, ...]
    memory_limit: int | None
    disk_free: int | None
    counts_activations: bool = True

    @property
    def disk(self) -> float:
        """Of all stages."""
        return sum(stage.disk for stage in self.stages)

    @property
    def largest(self) -> Forecast:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def summary(self) -> str:
        peak, stage = size(self.largest.peak), self.largest.stage
        bound = f"at least {peak} in {stage}, and activations (`qwlora plan` counts them)"
        memory = f"peak memory {peak} in {stage}" if self.counts_activations else bound
        return f"estimate: {memory}, disk {size(self.disk)}"

    @property
    def problems(self) -> list[str]:
        """What does not fit, and what would make it fit."""
        problems = []
        for stage in self.stages:
            if self.memory_limit is not None and stage.peak > self.memory_limit:
                most = max(stage.memory, key=lambda part: stage.memory[part])
                remedy = " or ".join(stage.settings) or "a smaller model"
                problems.append(
                    f"{stage.stage} needs {size(stage.peak)}, and this machine has "
                    f"{size(self.memory_limit)}. Most of it is {most} "
                    f"({size(stage.memory[most])}). Less memory: {remedy}"
                )
        if self.disk_free is not None and self.disk > self.disk_free:
            problems.append(
                f"the job needs {size(self.disk)} of disk, and {size(self.disk_free)} are "
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
    return estimate(recipe, make_plan(recipe, JobTexts(recipe, reads=False)), out, track)


def estimate(
    recipe: Recipe,
    stages: Sequence[Stage],
    out: Path,
    track: Track = untracked,
    holds_float_model: bool = False,
    counts_activations: bool = True,
) -> Estimates:
    """Estimate `stages` of a recipe; see `plan_job`.

    Args:
        holds_float_model: whether this process has loaded the float model already.
        counts_activations: False leaves them out, which is quick: the model's code does not run.
    """
    keeps = holds_float_model or any(stage.name == "evaluate/float" for stage in stages)
    forecaster = Forecaster(recipe, keeps, counts_activations)
    forecasts = [
        forecaster.stage(stage) for stage in track(list(stages), "estimating", len(stages))
    ]
    # Resident memory of this process with what its stages import, after the runs without data.
    importlib.import_module("qwlora.pipeline.running.preflight")  # the Trainer and everything below
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
    return Estimates(tuple(with_process), memory_limit_bytes(), free, counts_activations)


class Forecaster:
    """Forecasts the stages of one recipe.

    Args:
        keeps_float_model: whether it is in memory when the base is quantized.
        counts_activations: see `estimate`.
    """

    def __init__(
        self, recipe: Recipe, keeps_float_model: bool = False, counts_activations: bool = True
    ):
        self.recipe, self._keeps_float_model = recipe, keeps_float_model
        self.models = TracedModels(recipe, counts_activations)
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

    def _simulation(self, stage: Stage) -> tuple[dict[str, float], TracedRun]:
        """Memory of the stage's captured graph and base, and a forward pass."""
        tokens = self._text(stage).sequence_tokens
        run = self.models.forward("graph", tokens, self._adapter(stage))
        return self._base_memory | {
            "captured graph": float(_NODE_BYTES * run.operators),
            # float copies of what the simulation quantizes besides the base: norms, the embedding
            "quantized copies": float(FLOAT * self.models.float_values),
        }, run

    # Stages

    def _evaluate(self, stage: Stage) -> Forecast:
        kind, tokens = stage.name.split("/")[1], self._text(stage).sequence_tokens
        logits = peak = self._logits(tokens)
        other = stage.name.partition("/on/")[2]
        compared = has_float_model(self.recipe) and is_compared(kind, other)
        adapter = self._adapter(stage)
        memory = self._float_memory if compared or kind in ("imported", REFERENCE) else {}
        if compared_with(self.recipe, kind, adapter) and not other:
            memory["adapter of the float model"] = FLOAT * self.models.trained_values(adapter)
        if kind == "float":  # the checks before the job loaded it
            memory = {"float model": self._float_bytes, **self._mapped_files}
        if kind == "simulated":
            graph, run = self._simulation(stage)
            memory, peak = memory | graph, peak + run.peak
        else:
            memory |= {} if kind in _ON_FLOAT else self._base_memory
            peak = self.models.forward(kind, tokens, adapter if kind == "adapted" else None).peak
        # Rows and log-softmax of a chunk, of both models and two differences if compared; logits
        # of the last sequence, and of the other model.
        arrays, whole = (6, 2 * logits) if compared else (2, logits)
        scored = whole + arrays * min(FLOAT * _SCORED_AT_ONCE, logits)
        memory["activations and logits"] = peak + scored
        return Forecast(stage.name, memory, settings=("data.sequence_tokens",))

    def _sample(self, stage: Stage) -> Forecast:
        models, tokens = self.models, self.recipe.data.sequence_tokens
        config: Any = models.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        width = getattr(config, "head_dim", None) or models.head_shape[1] // heads
        heads = getattr(config, "num_key_value_heads", None) or heads
        cached = 2 * len(models.blocks) * heads * width * SAMPLED_AT_ONCE * tokens
        memory = self._float_memory | {
            "key-value cache": 2.0 * FLOAT * cached,  # and while it grows its copy
            "logits of new tokens": 3 * self._logits(SAMPLED_AT_ONCE),
        }
        count = sum(sampled_sequences(self.recipe).values())
        return Forecast(stage.name, memory, 8.0 * count * tokens, ("base.calibration: [job]",))

    def _quantize(self, stage: Stage) -> Forecast:
        if stage.name == SAMPLE:
            return self._sample(stage)
        base, models = self.recipe.base, self.models
        tokens = self._text(stage).sequence_tokens
        moments = needs_moments(self.recipe)
        disk = sum(self._base_memory.values())
        solvers = {base.solver, *(rule.solver for rule in base.rules)}
        if is_calibrated(self.recipe):
            outputs = moments or base.has_budget
            memory = self._calibrated_solver(tokens, base.calibration_sequences, outputs)
            if "gptq" in solvers and base.gptq.rounding_steps:
                memory |= self._learned_rounding(tokens, base.calibration_sequences)
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

    def _learned_rounding(self, tokens: int, count: int) -> dict[str, float]:
        # The weights, their gradients, u and its start, and what a step makes of the largest layer.
        # The moments are still there.
        weights = [[i * o for i, o in block] for block in self.models.blocks]
        numbers = max(4 * sum(block) + 4 * max(block) for block in weights)
        outputs = count * tokens * self.models.head_shape[1]
        return {
            "learned rounding of a block": float(FLOAT * numbers),
            "float outputs of all calibration sequences": float(FLOAT * outputs),
        }

    def _train(self, stage: Stage) -> Forecast:
        adapter, models = self._adapter(stage), self.models
        tokens, rows = self._text(stage).sequence_tokens, adapter.batch_sequences
        trained, on_float = models.trained_values(adapter), False
        if stage.name == reference_stage(self.recipe, adapter):
            on_float, adapter = True, adapter.model_copy(update={"init": "zero"})
        during, starting = dict[str, float](), dict[str, float]()
        if adapter.steps:
            chunk = min(FLOAT * CHUNK_LOGITS, rows * self._logits(tokens))
            head = 2.0 * math.prod(models.head_shape) if adapter.compute == "bfloat16" else 0.0
            during = {
                # weights, gradients and two moments of AdamW
                "adapter and optimizer": 4.0 * FLOAT * trained,
                "activations": float(models.training(adapter, tokens, rows, on_float).peak),
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
        memory = self._float_memory if on_float else self._base_memory
        memory |= during if sum(during.values()) >= sum(starting.values()) else starting
        settings = ("gradient_checkpointing: true", "batch_sequences", "data.sequence_tokens")
        return Forecast(stage.name, memory, FLOAT * trained, settings)

    def _calibrate(self, stage: Stage) -> Forecast:
        memory, run = self._simulation(stage)
        memory["activations"] = run.peak + self._logits(self._text(stage).sequence_tokens)
        # About a quarter of a graph's operators have a quantizer.
        memory["samples of activations"] = FLOAT * VALUES * run.operators / 4
        disk = 2 * FLOAT * self.models.trained_values(self._adapter(stage))
        settings = ("simulation.calibration_tokens", "data.sequence_tokens")
        return Forecast(stage.name, memory, disk, settings)

    def _export(self, stage: Stage) -> Forecast:
        models, name = self.models, stage.name.split("/")[1]
        target, sizes = TARGETS[name], self.recipe.export.graphs_of(name)
        stored = float(models.packed_bytes + FLOAT * models.float_values)
        layers = models.packed_layers
        shapes = (layer.scheme.scale_shape(tuple(layer.tensor.shape)) for layer in layers)
        scales = sum(map(math.prod, shapes))
        if target.writes_floats:  # and every scale as an object of JSON; measured
            stored = float(FLOAT * (models.packed_weights + models.float_values))
            parts = {"files": stored, "encodings as text": 700.0 * scales}
            return Forecast(stage.name, self._base_memory | parts, stored + 190 * scales)
        if not target.is_simulated:
            return Forecast(stage.name, self._base_memory | {"files": stored}, stored)
        settings = ("base.weights.block_size",)
        memory, run = self._simulation(stage)
        memory["encodings as text"] = float(_SCALE_BYTES * scales)
        if target.needs_zero_adapter and stage.adapter is not None:
            disk = 2 * FLOAT * models.trained_values(self._adapter(stage)) + 24 * scales
            return Forecast(stage.name, memory, disk, settings)
        memory["ONNX graph"] = float(_ONNX_NODE_BYTES * run.operators)
        memory["codes, one byte each"] = float(models.packed_weights)
        # as float32 tensors, in the ONNX model, and as bytes to write
        memory["copies of float values"] = 3.0 * FLOAT * models.float_values
        if sizes is None:
            return Forecast(stage.name, memory, stored + 24 * scales, settings)
        graphs = len(sizes.tokens) * len(sizes.context)
        # as floats, which aimet repeats in the folder of each graph
        weights = (1 if target.has_cases else graphs) * (stored + FLOAT * models.packed_weights)
        return Forecast(stage.name, memory, weights + 24 * scales * graphs, settings)

    def _verify(self, stage: Stage) -> Forecast:
        models, target = self.models, TARGETS[stage.name.split("/")[1]]
        tokens = self._text(stage).sequence_tokens
        logits = self._logits(tokens)
        if not target.is_simulated:
            exported = sum(self._base_memory.values())
            if target.writes_floats:
                exported = FLOAT * (models.packed_weights + models.float_values)
            parts = {"exported model": exported, "activations and logits": 3 * logits}
            return Forecast(stage.name, self._base_memory | parts)
        memory, run = self._simulation(stage)
        simulation = sum(memory.values())
        activations = run.outputs - FLOAT * models.packed_weights  # without unpacked weights
        layer_bytes = activations * min(1.0, self.recipe.verify.layer_tokens / tokens)
        stored = models.packed_bytes + FLOAT * models.float_values + models.packed_weights
        by_layer = stored + 3 * layer_bytes  # simulated values, given and computed ones
        if target.needs_zero_adapter:
            by_layer += stored  # the session of all adapters stays
        # Logits of a forward pass. Three models' logits and their masked copies, two differences,
        # and in float64 the logits and log-softmax of one. ONNX Runtime packs the weight of the
        # head once more.
        whole = stored + run.peak + 13 * logits + FLOAT * models.float_values
        memory["model in ONNX Runtime"] = float(stored)
        part = "values of all layers" if by_layer > whole else "logits"
        memory[part] = max(by_layer, whole) - stored
        if target.needs_zero_adapter and stage.adapter is not None:
            memory["simulation of the base"] = simulation
        settings = ("verify.layer_tokens", "data.sequence_tokens")
        return Forecast(stage.name, memory, settings=settings)


class TracedRun(TorchDispatchMode):
    """What a computation allocates. It runs in this mode and in a `FakeTensorMode`, and must not
    read the value of any tensor.

    Attributes:
        peak: most bytes alive at one time, of tensors that the computation itself makes.
        operators: how many operators run.
        outputs: bytes of all their results together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.operators = self.outputs = 0
        self._alive: dict[int, int] = {}  # bytes of storages that exist

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return result
        known = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        results = _tensors(result)
        new = [t for t in results if id(t.untyped_storage()) not in known]
        self.operators += 1
        if new or func._schema.is_mutable:  # else a view, perhaps of a weight
            self.outputs += sum(t.nbytes for t in results)
        for storage in (tensor.untyped_storage() for tensor in new):
            if id(storage) not in self._alive:
                self._alive[id(storage)] = storage.nbytes()
                self.peak = max(self.peak, sum(self._alive.values()))
                weakref.finalize(storage, self._alive.pop, id(storage), None)
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class TracedModels:
    """Traces the models of a recipe; each run once.

    Args:
        runs_models: False runs nothing, so every run allocates nothing.
    """

    def __init__(self, recipe: Recipe, runs_models: bool = True):
        self.recipe, self._runs_models = recipe, runs_models
        self._runs: dict[Any, TracedRun] = {}
        self._trained: dict[str, int] = {}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The float model on the meta device."""
        section = self.recipe.model
        with init_empty_weights():
            model = build_model(
                load_config(section.source, section.trust_remote_code), section.trust_remote_code
            )
        model.tie_weights()
        return model.requires_grad_(False).eval()

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each tensor that the base packs, by its name in the model."""
        base = self.recipe.base
        if base.solver == "keep":
            planned = plan_layers(self.model, parse_scheme(_KEPT_SCHEME), "rtn")
        else:
            scheme, rules = base.weights.scheme(), base.layer_rules()
            planned = plan_layers(self.model, scheme, base.solver, rules)
        return {name: assignment.scheme for name, assignment in planned.items()}

    @cached_property
    def base(self) -> PreTrainedModel:
        """The packed base on the meta device."""
        model: PreTrainedModel = copy.deepcopy(self.model)
        nn.Module.to(model, "meta")
        for name, scheme in self.schemes.items():
            path, _, key = name.rpartition(".")
            place_empty_(model, path if key == "weight" else f"{path}.{FOLDER}.{key}", scheme)
        tie_weights_(model)
        return model.requires_grad_(False).eval()

    @cached_property
    def values(self) -> int:
        """Parameters of the float model; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def packed_layers(self) -> list[PackedLayer]:
        """All packed layers; tied ones once."""
        layers = [module for module in self.base.modules() if isinstance(module, PackedLayer)]
        return [layer for layer in layers if not layer.is_tied]

    @cached_property
    def packed_bytes(self) -> int:
        return sum(layer.tensor.nbytes for layer in self.packed_layers)

    @cached_property
    def packed_weights(self) -> int:
        return sum(math.prod(layer.tensor.shape) for layer in self.packed_layers)

    @property
    def float_values(self) -> int:
        """Values that stay float in the base."""
        return sum(p.numel() for p in self.base.parameters())

    @cached_property
    def blocks(self) -> list[list[tuple[int, int]]]:
        """(in, out) of every packed matrix product, by block of the model."""
        blocks = []
        for names in tensors_by_block(self.model, self.schemes).values():
            modules = [self.model.get_submodule(name.rpartition(".")[0]) for name in names]
            linear = [m for m in modules if isinstance(m, nn.Linear | Conv1D)]
            shapes = [weight_out_in(module).shape for module in linear]
            blocks.append([(inner, out) for out, inner in shapes])
        return blocks

    @property
    def head_shape(self) -> tuple[int, int]:
        """Entries of a row of logits, and the width of the hidden state that they are made of."""
        head: Any = self.model.get_output_embeddings()
        embedding: Any = self.model.get_input_embeddings()
        shape = (embedding if head is None else head).weight.shape
        return int(shape[0]), int(shape[-1])

    def trained_values(self, adapter: Adapter) -> int:
        if adapter.name not in self._trained:
            parameters = self._attached(adapter).parameters()
            self._trained[adapter.name] = sum(p.numel() for p in parameters if p.requires_grad)
        return self._trained[adapter.name]

    def forward(self, kind: str, tokens: int, adapter: Adapter | None = None) -> TracedRun:
        """An evaluation of one sequence.

        Args:
            kind: `float`, `imported` or `reference`, `base`, `adapted`, or `graph`, as a graph is
                captured: with attention as single operators.
        """
        key = (kind, tokens, adapter and adapter.name)
        if not self._runs_models:
            return TracedRun()
        if key not in self._runs:
            if kind in _ON_FLOAT:
                model: nn.Module = copy.deepcopy(self.model)
            else:
                model = self._attached(adapter) if adapter else copy.deepcopy(self.base)
            if kind == "graph":
                body: Any = model.get_base_model() if isinstance(model, PeftModel) else model
                body.set_attn_implementation("eager")
            self._runs[key] = _traced(model, tokens)
        return self._runs[key]

    def training(
        self, adapter: Adapter, tokens: int, rows: int, on_float: bool = False
    ) -> TracedRun:
        """One forward and backward pass, without the output head, of the base or of the float
        model."""
        key = ("training", adapter.name, tokens, rows, on_float)
        if not self._runs_models:
            return TracedRun()
        if key not in self._runs:
            model = self._attached(adapter, on_float)
            model.train()
            if adapter.gradient_checkpointing:
                model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
            half = adapter.compute == "bfloat16"
            with lean_steps(model, half):
                self._runs[key] = _traced(model, tokens, rows, trains=True, half=half)
        return self._runs[key]

    def _attached(self, adapter: Adapter, on_float: bool = False) -> Any:
        model = copy.deepcopy(self.model if on_float else self.base)
        return attach(model, adapter.lora_shape(), self.recipe.seed)


def _traced(
    model: nn.Module, tokens: int, rows: int = 1, trains: bool = False, half: bool = False
) -> TracedRun:
    with FakeTensorMode():
        _without_data_(model)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        arguments |= {"use_cache": False, **({"logits_to_keep": 1} if trains else {})}
        # torch also logs, with a traceback, what it raises on tensors without data
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        was_disabled, logger.disabled = logger.disabled, True
        try:
            with (run := TracedRun()):
                autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
                with torch.set_grad_enabled(trains), autocast:
                    result: Tensor = model(**arguments).logits
                    if trains:
                        result = result[:, -1].float().sum()
                if trains:
                    result.backward()
            return run
        except QwloraError:
            raise
        except Exception as error:  # models raise anything
            why = str(error).rstrip(".")
            raise CaptureError(
                f"{type(model).__name__} cannot run on tensors without data, so there is no "
                f"estimate of its memory: {why}. `qwlora run` works without one"
            ) from error
        finally:
            logger.disabled = was_disabled


def _without_data_(model: nn.Module) -> None:
    """Replace all tensors of a model by ones without data, on the CPU as far as torch knows."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    tensors[key] = fake(tensor)  # type: ignore[assignment]
