"""What each stage of a job will need, before it runs: peak memory and disk; and what does not fit.
`qwlora plan` prints it, and `qwlora run` begins with it.

Counted from shapes: those of the model's configuration, and of the layers that the base packs. What
stages hold at the same time is written down here, next to the reason. Neither weights nor text are
read, and no model runs. Experts are counted in the weights, but not in the activations.

Memory counts what is alive at the peak of a stage, and the process itself with its libraries. The
allocator's unused pages are not counted. docs/log/plan.md compares it with measurements.
"""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from qwlora.adapter.attach import check_shape
from qwlora.adapter.chunked_loss import CHUNK_LOGITS
from qwlora.analysis.generate_text import SAMPLED_AT_ONCE
from qwlora.errors import size
from qwlora.formats.base_files import SHARD_BYTES
from qwlora.formats.model_source import fetch, user_path
from qwlora.grid.activation_ranges import HISTOGRAM_BYTES
from qwlora.grid.scheme import parse_scheme
from qwlora.nn import weight_out_in
from qwlora.nn.packed_layer import PackedLayer, place_empty_, tie_weights_
from qwlora.pipeline.asked import (
    REFERENCE,
    compared_with,
    has_float_model,
    is_calibrated,
    is_compared,
    needs_moments,
    reference_stage,
    resolve_compute,
    sampled_sequences,
)
from qwlora.pipeline.plan import make_plan
from qwlora.pipeline.sources import Sources
from qwlora.pipeline.stage import (
    SAMPLE,
    Stage,
)
from qwlora.pipeline.stages.job_context import skeleton
from qwlora.quantize.layer_rules import plan_layers
from qwlora.quantize.quantize_blocks import tensors_by_block
from qwlora.recipe import Adapter, Data, Recipe
from qwlora.system.machine import memory_limit_bytes, return_freed_memory, rss_bytes
from qwlora.system.parameter_names import FOLDER
from qwlora.system.progress import Track, untracked
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import Target

FLOAT = 4  # bytes
_SCORED_AT_ONCE = 2**22  # logits; analysis/token_scores.py
# Bytes of Python objects for each packed matrix product of a captured graph, with what is around
# it: 26 operators of 60,000, in torch's program and in the simulation's module; in ONNX as many.
_NODE_BYTES = 1_560_000
_QUANTIZERS = 6  # of activations, for each packed matrix product
# Counted on SmolLM2-135M and a Llama of a billion weights, see docs/log/plan.md: what autograd
# keeps, in inputs and outputs of the packed matrix products; and all results in a graph, in these
# and in attention scores.
_KEPT = {"float32": 1.1, "bfloat16": 0.8}
_RESULTS, _SCORES = 3.5, 4.0
# A scale in an encodings file: two Python numbers in lists, and 24 characters of text, twice. In
# files that list floats on their grids it is an object of JSON; measured.
_SCALE_BYTES, _SCALE_OBJECT_BYTES = 120, 700
_ON_FLOAT = ("float", "imported", REFERENCE)  # kinds of models that hold no integers
_KEPT_SCHEME = "w4-block32"  # of integers that the model's files hold, whose grid is in their data
# Keys of the recipe that make a stage need less memory.
_LESS = {
    SAMPLE: ("base.calibration: [job]",),
    "quantize": ("base.tuning.steps: 0", "base.solver: search with adapters[].init: zero"),
    "train": ("gradient_checkpointing: true", "batch_sequences", "data.sequence_tokens"),
    "calibrate": ("simulation.calibration_tokens", "data.sequence_tokens"),
    "export": ("base.weights.block_size",),
    "verify": ("verify.layer_tokens", "data.sequence_tokens"),
}
_Memory = dict[str, float]  # bytes, by what holds them


@dataclass(frozen=True)
class Forecast:
    """What a stage will need.

    Args:
        memory: bytes at the peak, by what holds them.
        disk: bytes that the stage writes and the job keeps.
        settings: keys of the recipe that make the stage need less memory.
    """

    stage: str
    memory: Mapping[str, float]
    disk: float
    settings: tuple[str, ...]

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
        peak, stage = size(self.largest.peak), self.largest.stage
        return f"estimate: peak memory {peak} in {stage}, disk {size(self.disk)}"

    @property
    def problems(self) -> list[str]:
        """What does not fit, and what would make it fit."""
        problems = []
        for stage in self.stages:
            if self.memory_limit is not None and stage.peak > self.memory_limit:
                most = max(stage.memory, key=lambda part: stage.memory[part])
                problems.append(
                    f"{stage.stage} needs {size(stage.peak)}, and this machine has "
                    f"{size(self.memory_limit)}. Most of it is {most} "
                    f"({size(stage.memory[most])}). Less memory: {' or '.join(stage.settings)}"
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
    """Estimate all stages of a recipe. Reads configurations and headers, no weights and no text."""
    return estimate(recipe, make_plan(recipe, Sources(recipe, reads=False)), out, track)


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
    recipe = resolve_compute(recipe)
    keeps = holds_float_model or any(stage.name == "evaluate/float" for stage in stages)
    forecaster = Forecaster(recipe, keeps)
    needed = [forecaster.needed(stage) for stage in track(stages, "estimating", len(stages))]
    for target in recipe.export.targets:
        TARGETS[target].missing()  # imports its packages
    gc.collect()
    return_freed_memory()
    process = float(rss_bytes()) - holds_float_model * FLOAT * forecaster.values
    folder, free = user_path(str(out)).absolute(), None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    forecasts = (
        Forecast(
            stage.name,
            {"process": process, **memory},
            disk,
            _LESS.get(stage.name) or _LESS.get(stage.verb, ("data.sequence_tokens",)),
        )
        for stage, (memory, disk) in zip(stages, needed, strict=True)
    )
    return Estimates(tuple(forecasts), memory_limit_bytes(), free)


class Forecaster:
    """Forecasts the stages of one recipe.

    Args:
        keeps_float_model: whether it is in memory when the base is quantized.

    Attributes:
        values: parameters of the float model; tied ones count once.
        trained: those of each adapter.
        packed_bytes, packed_weights, scales: of all packed layers; tied ones count once.
        float_values: values that stay float in the base.
        blocks: (in, out) of every packed matrix product, by block of the model.
        head_shape: entries of a row of logits, and the width of the hidden state that they are
            made of.
    """

    def __init__(self, recipe: Recipe, keeps_float_model: bool = False):
        self.recipe, self._keeps_float_model = recipe, keeps_float_model
        model: Any = skeleton(recipe.model)
        self._config: Any = model.config.get_text_config()
        self._heads = getattr(self._config, "num_attention_heads", 1)
        self.trained: dict[str, int] = {}
        for adapter in recipe.adapters:
            weights = check_shape(skeleton(recipe.model, model.config), adapter.lora_shape())
            self.trained[adapter.name] = sum(map(math.prod, weights.values()))
        base = recipe.base
        if base.solver == "keep":
            schemes = plan_layers(model, parse_scheme(_KEPT_SCHEME), "rtn")
        else:
            scheme, rules = base.weights.scheme(), base.layer_rules()
            schemes = plan_layers(model, scheme, base.solver, rules)
        self.values = sum(p.numel() for p in model.parameters())
        largest = max(p.numel() for p in model.parameters())
        self.blocks: list[list[tuple[int, int]]] = []
        for names in tensors_by_block(model, schemes).values():
            modules = [model.get_submodule(name.rpartition(".")[0]) for name in names]
            linear = [m for m in modules if isinstance(m, nn.Linear | Conv1D)]
            matrices = [weight_out_in(module).shape for module in linear]
            self.blocks.append([(inner, out) for out, inner in matrices])
        head = model.get_output_embeddings()
        shape = (model.get_input_embeddings() if head is None else head).weight.shape
        self.head_shape = int(shape[0]), int(shape[-1])
        for name, assignment in schemes.items():  # from here on, the model is the packed base
            path, _, key = name.rpartition(".")
            place = path if key == "weight" else f"{path}.{FOLDER}.{key}"
            place_empty_(model, place, assignment.scheme)
        tie_weights_(model)
        layers = [m for m in model.modules() if isinstance(m, PackedLayer) and not m.is_tied]
        shapes = [tuple(layer.tensor.shape) for layer in layers]
        self.packed_bytes = sum(layer.tensor.nbytes for layer in layers)
        self.packed_weights = sum(map(math.prod, shapes))
        of_scales = (m.scheme.scale_shape(shape) for m, shape in zip(layers, shapes, strict=True))
        self.scales = sum(map(math.prod, of_scales))
        self.float_values = sum(p.numel() for p in model.parameters())
        location = fetch(recipe.model.source)
        self._is_gguf = location.gguf_file is not None
        floats = float(FLOAT * self.values)
        self._float: _Memory = {"float model": floats}
        if self._is_gguf:
            # Measured, and seen with two models from GGUF files: what loading and running them
            # leaves in the allocator.
            self._float["copies of the largest tensor"] = 2.0 * FLOAT * largest
        files = [f.stat().st_size for f in location.files if f.suffix == ".safetensors"]
        if 0 < sum(files) < 0.9 * floats:
            # Files in half precision stay mapped while their float32 copies are made.
            self._float["mapped files"] = float(sum(files))
        # Floats are stored in 16 bits if that is exact, and stay mapped next to their copies.
        stored = FLOAT + (0 if self._is_gguf else 2)
        self._base_bytes = float(self.packed_bytes + stored * self.float_values)
        self._base: _Memory = {"packed base": self._base_bytes}
        shard = min(float(SHARD_BYTES), self._base_bytes)
        self._shard: _Memory = {} if self._is_gguf else {"shard": shard}

    def needed(self, stage: Stage) -> tuple[_Memory, float]:
        """Memory and disk that `stage` needs, besides the memory of the process itself."""
        rules = {
            "evaluate": self._evaluate,
            "quantize": self._sample if stage.name == SAMPLE else self._quantize,
            "train": self._train,
            "export": self._export,
            "verify": self._verify,
        }
        return rules.get(stage.verb, self._calibrate)(stage)  # calibrate, calibrate-base

    def _logits(self, tokens: int) -> float:
        return float(FLOAT * tokens * self.head_shape[0])

    def _adapter(self, stage: Stage) -> Adapter:
        """The stage's adapter, or the first one if the stage is of all."""
        adapters = self.recipe.adapters
        return next((a for a in adapters if a.name == stage.adapter), adapters[0])

    def _text(self, stage: Stage) -> Data:
        text = self.recipe.base_text() if stage.adapter is None else None
        return text or self.recipe.data_of(stage.adapter or self.recipe.adapters[0].name)

    def _products(self, tokens: int) -> list[float]:
        """Bytes of the inputs and outputs of each block's packed products."""
        return [float(FLOAT * tokens * sum(i + o for i, o in block)) for block in self.blocks]

    @property
    def _unpacked(self) -> float:
        """The largest layer's weight as float32, which exists while the layer computes."""
        return float(FLOAT * max(i * o for block in self.blocks for i, o in block))

    def _forward(self, tokens: int) -> float:
        """At the peak of a forward pass: what a block computes, or the logits."""
        return max(self._logits(tokens), self._unpacked + max(self._products(tokens)))

    def _backward(self, tokens: int, compute: str, recomputes: bool = False) -> float:
        """At the peak of a forward and backward pass: what autograd keeps, without the head."""
        kept = [_KEPT[compute] * product for product in self._products(tokens)]
        if recomputes:  # the inputs of all blocks, and one block
            hidden = FLOAT * tokens * self.head_shape[1] * len(kept)
            return self._unpacked + max(kept) + hidden
        return self._unpacked + sum(kept)

    def _simulation(self) -> _Memory:
        """The base, and the captured graph of it and an adapter."""
        return self._base | {
            "captured graph": float(_NODE_BYTES * sum(map(len, self.blocks))),
            # float copies of what the simulation quantizes besides the base: norms, the embedding
            "quantized copies": float(FLOAT * self.float_values),
        }

    def _evaluate(self, stage: Stage) -> tuple[_Memory, float]:
        kind, tokens = stage.kind.split("/")[1], self._text(stage).sequence_tokens
        logits, other = self._logits(tokens), stage.text or ""
        compared = has_float_model(self.recipe) and is_compared(kind, other)
        adapter = self._adapter(stage)
        memory = dict(self._float) if compared or kind in _ON_FLOAT else {}
        if compared_with(self.recipe, kind, adapter) and not other:
            memory["adapter of the float model"] = FLOAT * self.trained[adapter.name]
        if kind == "simulated":
            memory |= self._simulation()
        elif kind not in _ON_FLOAT:
            memory |= self._base
        # Rows and log-softmax of a chunk, of both models and two differences if compared; logits
        # of the last sequence, and of the other model.
        arrays, whole = (6, 2 * logits) if compared else (2, logits)
        scored = whole + arrays * min(FLOAT * _SCORED_AT_ONCE, logits)
        memory["activations and logits"] = self._forward(tokens) + scored
        return memory, 0.0

    def _sample(self, stage: Stage) -> tuple[_Memory, float]:
        tokens, config = self.recipe.data.sequence_tokens, self._config
        width = getattr(config, "head_dim", None) or self.head_shape[1] // self._heads
        heads = getattr(config, "num_key_value_heads", None) or self._heads
        cached = 2 * len(self.blocks) * heads * width * SAMPLED_AT_ONCE * tokens
        return self._float | {
            "key-value cache": 2.0 * FLOAT * cached,  # and while it grows its copy
            "logits of new tokens": 3 * self._logits(SAMPLED_AT_ONCE),
        }, 8.0 * sum(sampled_sequences(self.recipe).values()) * tokens

    def _quantize(self, stage: Stage) -> tuple[_Memory, float]:
        base = self.recipe.base
        tokens, disk = self._text(stage).sequence_tokens, self._base_bytes
        if is_calibrated(self.recipe):
            memory = self._calibrated_solver(tokens, base.calibration_sequences)
            if needs_moments(self.recipe):  # triangles of symmetric matrices
                disk += FLOAT / 2 * sum(i * i + o * o for block in self.blocks for i, o in block)
        else:
            # Layer by layer from the files, with candidates for the scales of each weight.
            largest = max(float(FLOAT * math.prod(self.head_shape)), 6 * self._unpacked)
            memory = {"largest layer": largest} | self._shard
        if self._is_gguf or self._keeps_float_model:
            memory |= self._float
        if base.tuning.steps:
            memory = self._float | self._base
            step = self._backward(tokens, base.tuning.compute)
            memory["activations of tuning"] = step + 6 * self._logits(tokens)
        return memory, disk

    def _calibrated_solver(self, tokens: int, count: int) -> _Memory:
        base = self.recipe.base
        outputs = needs_moments(self.recipe) or base.has_budget
        # Of a block: its moments, and what the solver makes of the largest: the damped matrix,
        # its factors and products with the weight.
        squares = max(
            sum(i * i + (o * o if outputs else 0) for i, o in block) for block in self.blocks
        )
        inner, out = max(shape for block in self.blocks for shape in block)
        # Inputs and outputs of a block's products, their gradients, and copies of both.
        copies = max(sum(2 * i + 4 * o for i, o in block) for block in self.blocks)
        values = {
            "hidden states of all calibration sequences": count * tokens * self.head_shape[1],
            "second moments of a block": squares,
            "solver of the largest layer": 4 * inner**2 + 6 * inner * out,
            "activations of a block": tokens * copies,
        }
        if not self._is_gguf:
            block = max(sum(i * o for i, o in block) for block in self.blocks)
            values["float blocks"] = self.values - self.packed_weights + 2 * block
        return {name: float(FLOAT * number) for name, number in values.items()} | self._shard

    def _train(self, stage: Stage) -> tuple[_Memory, float]:
        adapter, memory = self._adapter(stage), self._base
        tokens = adapter.batch_sequences * self._text(stage).sequence_tokens
        trained, has_init = self.trained[adapter.name], adapter.init != "zero"
        if stage.name == reference_stage(self.recipe, adapter):
            memory, has_init = self._float, False
        during, starting = _Memory(), _Memory()
        if adapter.steps:
            chunk = min(FLOAT * CHUNK_LOGITS, self._logits(tokens))
            head = 2.0 * math.prod(self.head_shape) if adapter.compute == "bfloat16" else 0.0
            during = {
                # weights, gradients and two moments of AdamW
                "adapter and optimizer": 4.0 * FLOAT * trained,
                "activations": self._backward(
                    tokens, adapter.compute, adapter.gradient_checkpointing
                ),
                # logits of a chunk, their softmax and gradient; under autocast also the head
                "logits of a chunk": 3 * chunk + head,
            }
        if adapter.objective == "recovery":
            during |= self._float
        if has_init:
            largest = max(max(shape) for block in self.blocks for shape in block)
            factors = 8.0 * FLOAT * largest**2
            starting = {**self._float, "factors of the largest layer": factors}
        return memory | max(during, starting, key=lambda m: sum(m.values())), FLOAT * trained

    def _calibrate(self, stage: Stage) -> tuple[_Memory, float]:
        memory, tokens = self._simulation(), self._text(stage).sequence_tokens
        memory["activations"] = self._forward(tokens) + self._logits(tokens)
        histograms = HISTOGRAM_BYTES * _QUANTIZERS * sum(map(len, self.blocks))
        memory["histograms of activations"] = float(histograms)
        return memory, 2 * FLOAT * self.trained[self._adapter(stage).name]

    def _export(self, stage: Stage) -> tuple[_Memory, float]:
        name = stage.name.split("/")[1]
        target, sizes = TARGETS[name], self.recipe.export.graphs_of(name)
        stored = float(self.packed_bytes + FLOAT * self.float_values)
        if target.writes_floats:
            stored = float(FLOAT * (self.packed_weights + self.float_values))
            text = float(_SCALE_OBJECT_BYTES * self.scales)
            parts = {"files": stored, "encodings as text": text}
            return self._base | parts, stored + 190 * self.scales
        if not target.is_simulated:
            return self._base | {"files": stored}, stored
        memory = self._simulation()
        memory["encodings as text"] = float(_SCALE_BYTES * self.scales)
        if target.has_golden and self.recipe.export.proof != "held_out":
            memory |= self._float  # generates the golden inputs
        disk = 24 * self.scales
        if target.needs_zero_adapter and stage.adapter is not None:
            return memory, disk + 2 * FLOAT * self.trained[self._adapter(stage).name]
        memory["ONNX graph"] = memory["captured graph"]
        memory["codes, one byte each"] = float(self.packed_weights)
        # as float32 tensors, in the ONNX model, and as bytes to write
        memory["copies of float values"] = 3.0 * FLOAT * self.float_values
        if sizes is None:
            return memory, disk + stored
        graphs = len(sizes.tokens) * len(sizes.context)
        # as floats, which aimet repeats in the folder of each graph
        copies = 1 if target.has_cases else graphs
        return memory, disk * graphs + copies * (stored + FLOAT * self.packed_weights)

    def _verify(self, stage: Stage) -> tuple[_Memory, float]:
        target = TARGETS[stage.name.split("/")[1]]
        running = self._run_files(stage, target)
        if not target.has_proof or self.recipe.export.proof != "generated":
            return running, 0.0
        writing = self._simulation() | self._float if target.is_simulated else self._float
        return max(running, writing, key=lambda memory: sum(memory.values())), 0.0

    def _run_files(self, stage: Stage, target: Target) -> _Memory:
        tokens = self._text(stage).sequence_tokens
        logits = self._logits(tokens)
        if not target.is_simulated:
            exported = self._base_bytes
            if target.writes_floats:
                exported = float(FLOAT * (self.packed_weights + self.float_values))
            parts = {"exported model": exported, "activations and logits": 3 * logits}
            return self._base | parts
        memory = self._simulation()
        simulation, by_layer_tokens = sum(memory.values()), self.recipe.verify.layer_tokens
        compared = min(tokens, by_layer_tokens)
        scores = float(FLOAT * len(self.blocks) * self._heads * compared**2)
        layer_bytes = _RESULTS * sum(self._products(compared)) + _SCORES * scores
        stored = self.packed_bytes + FLOAT * self.float_values + self.packed_weights
        by_layer = stored + 3 * layer_bytes  # simulated values, given and computed ones
        if target.needs_zero_adapter:
            by_layer += stored  # the session of all adapters stays
        # Logits of a forward pass. Three models' logits and their masked copies, two differences,
        # and in float64 the logits and log-softmax of one. ONNX Runtime packs the weight of the
        # head once more.
        whole = stored + self._forward(tokens) + 13 * logits + FLOAT * self.float_values
        memory["model in ONNX Runtime"] = float(stored)
        part = "values of all layers" if by_layer > whole else "logits"
        memory[part] = max(by_layer, whole) - stored
        if target.needs_zero_adapter and stage.adapter is not None:
            memory["simulation of the base"] = simulation
        return memory
