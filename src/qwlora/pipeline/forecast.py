"""What each stage of a job will need, before it runs: peak memory, disk and time.

Shapes come from the model's configuration, activations and operators from running the model's own
code without data (`traced_models.py`), seconds from measurements of this machine
(`machine_speed.py`). What stages hold at the same time is written down here, next to the reason.
Weights are never read.

Memory counts what is alive at the peak of a stage, and the process itself with its libraries. The
allocator's unused pages are not counted. Times are of a machine that does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwlora.adapter.chunked_loss import CHUNK_LOGITS
from qwlora.export.proof import DECODED, SEQUENCES
from qwlora.export.registry import TARGETS
from qwlora.export.target import SwitchableTarget, UseCasesTarget, WeightsTarget
from qwlora.formats.model_source import fetch
from qwlora.formats.shard_writer import SHARD_BYTES
from qwlora.grid.activation_observer import VALUES
from qwlora.pipeline.machine_speed import (
    BFLOAT16,
    CAPTURE,
    EXACT,
    TRAINING,
    TRANSLATE,
    MachineSpeed,
)
from qwlora.pipeline.plan import has_float_model
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.stages.calibrate_stage import ZERO
from qwlora.pipeline.stages.evaluate_stage import is_compared
from qwlora.pipeline.stages.quantize_stage import needs_moments
from qwlora.pipeline.traced_models import TracedModels
from qwlora.pipeline.traced_run import TracedRun
from qwlora.quantize.solvers import SOLVERS
from qwlora.recipe import Adapter, Data, Recipe

FLOAT = 4  # bytes
_SCORED_AT_ONCE = 2**22  # logits; analysis/token_scores.py
# Bytes of Python objects for each operator of a captured graph: its node with metadata and stack
# trace in torch's program, the same in the simulation's module; in ONNX, nodes and values.
_NODE_BYTES, _ONNX_NODE_BYTES = 60_000, 60_000
# A scale in an encodings file: two Python numbers in lists, and 24 characters of text, twice.
_SCALE_BYTES = 120
# Times that solvers without data read or write each weight.
_PASSES, _PASSES_OF_SEARCH = {"rtn": 12, "keep": 4}, 600
# Operators traced without data take as long as reading one tensor, or one entry of the vocabulary,
# of a GGUF file: it is Python that reads them.
_GGUF_TENSOR, _GGUF_TOKEN = 250, 0.75
_SCALE_SECONDS = 4e-6  # to write a scale as text
_ACTIVATION_SECONDS = 4e-3  # to choose the grid of an activation from its sample


@dataclass(frozen=True)
class Forecast:
    """What a stage will need.

    Args:
        memory: bytes at the peak, by what holds them.
        disk: bytes that the stage writes and the job keeps.
        settings: keys of the recipe that make the stage need less memory, with what they do.
    """

    stage: str
    seconds: float
    memory: Mapping[str, float]
    disk: float
    settings: tuple[str, ...] = ()

    @property
    def peak(self) -> float:
        """Bytes at the peak."""
        return sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        """For `qwlora plan --json`."""
        return {**asdict(self), "memory": dict(self.memory), "peak": self.peak}


class Forecaster:
    """Forecasts the stages of one recipe.

    Args:
        speed: of this machine.
        keeps_float_model: whether it is in memory when the base is quantized.
    """

    def __init__(self, recipe: Recipe, speed: MachineSpeed, keeps_float_model: bool = False):
        self.recipe, self.speed, self._keeps_float_model = recipe, speed, keeps_float_model
        self.models = TracedModels(recipe)
        self._by_verb: dict[str, Callable[[Stage], Forecast]] = {
            "evaluate": self._evaluate,
            "quantize": self._quantize,
            "calibrate-base": self._calibrate,
            "train": self._train,
            "calibrate": self._calibrate,
            "export": self._export,
            "verify": self._verify,
        }

    def stage(self, stage: Stage) -> Forecast:
        """What `stage` will need, besides the memory of the process itself."""
        return self._by_verb[stage.verb](stage)

    # models

    @property
    def _float_bytes(self) -> float:
        return FLOAT * self.models.values

    @property
    def _float_memory(self) -> dict[str, float]:
        parts = {"float model": float(self._float_bytes)}
        if self.models.is_gguf:
            # Measured, and seen with two models from GGUF files: what loading and running them
            # leaves in the allocator. Not seen in stages that load them only to read weights.
            largest = max(p.numel() for p in self.models.model.parameters())
            parts["copies of the largest tensor"] = 2.0 * FLOAT * largest
        return parts | self._mapped_files

    @property
    def _mapped_files(self) -> dict[str, float]:
        """Files in half precision stay mapped while their float32 copies are made."""
        files = fetch(self.recipe.model.source).files
        size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
        return {"mapped files": float(size)} if 0 < size < 0.9 * self._float_bytes else {}

    @property
    def _base_memory(self) -> dict[str, float]:
        rest = self.models.float_values
        # Floats are stored in 16 bits if that is exact, and stay mapped next to their copies.
        stored = 0 if self.models.is_gguf else 2 * rest
        return {"packed base": self.models.packed_bytes + FLOAT * rest + stored}

    def _load_float(self) -> float:
        if not self.models.is_gguf:
            return self.speed.moving(3 * self._float_bytes)  # read and cast
        tensors = len(list(self.models.model.parameters()))
        return self.speed.tracing(_GGUF_TENSOR * tensors + _GGUF_TOKEN * self.models.vocabulary)

    def _load_base(self) -> float:
        # Read, digested twice (tensors, fingerprint), and checked.
        return self.speed.moving(8 * sum(self._base_memory.values()))

    def _run_seconds(self, run: TracedRun, precision: str = EXACT) -> float:
        products = sum(
            count * self.speed.product(*shape, precision) for shape, count in run.products.items()
        )
        return products + self.speed.moving(run.moved)

    def _forward(self, kind: str, tokens: int, adapter: Adapter | None = None) -> float:
        run = self.models.forward(kind, tokens, adapter)
        unpacked = 0 if kind == "float" else self.models.packed_weights
        return self._run_seconds(run) + self.speed.unpacking(unpacked)

    def _logits(self, tokens: int) -> float:
        return float(FLOAT * tokens * self.models.vocabulary)

    def _scoring(self, tokens: int, compared: bool) -> tuple[float, float]:
        """(bytes, seconds) of scoring the logits of a sequence, the logits excluded."""
        logits = self._logits(tokens)
        chunk = min(FLOAT * _SCORED_AT_ONCE, logits)
        arrays = 6 if compared else 2  # rows and log-softmax, of both models; two differences
        extra = 2 * logits if compared else logits  # of the other model and the last sequence
        return extra + arrays * chunk, self.speed.moving((16 if compared else 5) * logits)

    def _adapter(self, stage: Stage) -> Adapter:
        """The stage's adapter, or the first one if the stage is of all."""
        adapters = self.recipe.adapters
        return next((a for a in adapters if a.name == stage.adapter), adapters[0])

    def _text(self, stage: Stage) -> Data:
        text = self.recipe.base_text() if stage.adapter is None else None
        if stage.adapter is not None:
            text = self.recipe.data_of(stage.adapter)
        return text or self.recipe.data_of(self.recipe.adapters[0].name)

    # stages

    def _evaluate(self, stage: Stage) -> Forecast:
        kind = stage.name.split("/")[1]
        text = self._text(stage)
        tokens, count = text.sequence_tokens, text.evaluation_sequences
        compared = self._has_float and is_compared(kind, stage.name.partition("/on/")[2])
        memory, seconds = dict[str, float](), 0.0
        if kind in ("float", "imported") or compared:
            memory |= self._float_memory
            if kind == "float" and not compared:  # the checks before the job loaded it
                memory = {"float model": float(self._float_bytes), **self._mapped_files}
            seconds += self._load_float() + count * self._forward("float", tokens)
        peak: float = self.models.forward("float", tokens).peak
        if kind in ("base", "adapted", "simulated"):
            memory |= self._base_memory
            seconds += self._load_base()
        if kind in ("base", "adapted"):
            adapter = self._adapter(stage) if kind == "adapted" else None
            peak = self.models.forward(kind, tokens, adapter).peak
            seconds += count * self._forward(kind, tokens, adapter)
        elif kind == "simulated":
            graph_memory, peak, each = self._simulation(self._adapter(stage), tokens)
            memory |= graph_memory
            seconds += count * each
        scored_bytes, scored_seconds = self._scoring(tokens, compared)
        memory["activations and logits"] = peak + scored_bytes
        seconds += count * scored_seconds
        return Forecast(stage.name, seconds, memory, 0, ("data.sequence_tokens",))

    @property
    def _has_float(self) -> bool:
        return has_float_model(self.recipe)

    def _quantize(self, stage: Stage) -> Forecast:
        base, models = self.recipe.base, self.models
        tokens = self._text(stage).sequence_tokens
        moments = needs_moments(self.recipe)
        disk = sum(self._base_memory.values())
        seconds = self._load_float() + self._load_base()
        solvers = {base.solver, *(rule.solver for rule in base.rules if rule.solver)} - {"keep"}
        if moments or any(SOLVERS[solver].needs_calibration for solver in solvers):
            memory = self._calibrated_solver(tokens, base.calibration_sequences, moments)
            seconds += self._observing(tokens, base.calibration_sequences, moments)
            seconds += self._solving(base.gptq.sweeps)
            if moments:  # triangles of symmetric matrices
                disk += FLOAT / 2 * sum(i * i + o * o for i, o in models.products)
                seconds += self.speed.moving(8 * disk)
            settings: tuple[str, ...] = ("base.solver: search with adapters[].init: zero",)
        else:
            memory = self._solver_without_data()
            passes = _PASSES.get(base.solver, _PASSES_OF_SEARCH)
            seconds += self.speed.moving(FLOAT * passes * models.packed_weights)
            settings = ("a model as safetensors, which is read layer by layer",)
        if models.is_gguf or self._keeps_float_model:
            memory |= self._float_memory
        if base.tuning.steps:
            step = self.models.training(self.recipe.adapters[0], tokens, 1)
            memory = {**self._float_memory, **self._base_memory}
            memory["activations of tuning"] = step.peak + 6 * self._logits(tokens)
            forward = 3 * self._forward("base", tokens) + self._forward("float", tokens)
            seconds += base.tuning.steps * forward
            settings = ("base.tuning.steps: 0",)
        return Forecast(stage.name, seconds, memory, disk, settings)

    def _calibrated_solver(self, tokens: int, count: int, moments: bool) -> dict[str, float]:
        models = self.models
        # Of a block: its moments, and what the solver makes of the largest: the damped matrix,
        # its factors and products with the weight.
        squares = max(
            sum(i * i + (o * o if moments else 0) for i, o in block) for block in models.blocks
        )
        widest = max(models.products, key=lambda shape: shape[0])
        memory = {
            "hidden states of all calibration sequences": float(
                FLOAT * count * tokens * models.width
            ),
            "second moments of a block": float(FLOAT * squares),
            "solver of the largest layer": float(
                FLOAT * (4 * widest[0] ** 2 + 6 * widest[0] * widest[1])
            ),
            "activations of a block": self._block_activations(tokens),
        }
        if not models.is_gguf:
            block = max(sum(i * o for i, o in block) for block in models.blocks)
            outside = models.values - models.packed_weights
            memory["float blocks"] = float(FLOAT * (outside + 2 * block))
            memory["shard"] = min(SHARD_BYTES, sum(self._base_memory.values()))
        return memory

    def _solver_without_data(self) -> dict[str, float]:
        """Layer by layer from the files, with candidates for the scales of each weight."""
        models = self.models
        widest = max(i * o for i, o in models.products)
        memory = {"largest layer": float(FLOAT * max(models.vocabulary * models.width, 6 * widest))}
        if not models.is_gguf:
            memory["shard"] = min(SHARD_BYTES, sum(self._base_memory.values()))
        return memory

    def _block_activations(self, tokens: int) -> float:
        """Inputs and outputs of a block's products, their gradients, and copies of both."""
        copies = max(sum(2 * i + 4 * o for i, o in block) for block in self.models.blocks)
        return float(FLOAT * tokens * copies)

    def _observing(self, tokens: int, count: int, moments: bool) -> float:
        speed, products = self.speed, self.models.products
        gradients = sum(
            speed.product(tokens, o, i) + speed.product(tokens, i, o) for i, o in products
        )
        squares = sum(
            speed.product(i, tokens, i) + (speed.product(o, tokens, o) if moments else 0.0)
            for i, o in products
        )
        return count * (2 * self._forward("float", tokens) + gradients + squares)

    def _solving(self, sweeps: int) -> float:
        speed = self.speed
        seconds = 0.0
        for inner, out in self.models.products:
            seconds += 3 * speed.product(inner, inner, inner)  # Cholesky, inverse, Cholesky
            seconds += (2 + 2 * sweeps) * speed.product(out, inner, inner)
            # A column: about 40 operators on it and on the columns of its block.
            seconds += (1 + sweeps) * inner * (speed.moving(FLOAT * 60 * out) + 60e-6)
        return seconds

    def _train(self, stage: Stage) -> Forecast:
        adapter, models, speed = self._adapter(stage), self.models, self.speed
        tokens = self._text(stage).sequence_tokens
        rows = adapter.batch_sequences
        memory = self._base_memory
        trained = models.trained_values(adapter)
        seconds = 2 * self._load_base()
        disk = FLOAT * trained
        settings = ("gradient_checkpointing: true", "batch_sequences", "data.sequence_tokens")
        during = {}
        if adapter.steps:
            run = models.training(adapter, tokens, rows)
            half = adapter.compute == "bfloat16"
            precision = BFLOAT16 if half else TRAINING
            passes = 3 if adapter.gradient_checkpointing else 2
            step = self._run_seconds(run, precision) + passes * speed.unpacking(
                models.packed_weights
            )
            head = rows * tokens, models.width, models.vocabulary
            step += 2 * speed.product(*head, precision)
            step += speed.moving(10 * rows * self._logits(tokens))
            seconds += adapter.steps * (
                adapter.accumulation_steps * step + speed.moving(16 * FLOAT * trained)
            )
            chunk = min(FLOAT * CHUNK_LOGITS, rows * self._logits(tokens))
            during = {
                # weights, gradients and two moments of AdamW
                "adapter and optimizer": 4 * FLOAT * trained,
                "activations": float(run.peak),
                # logits of a chunk, their softmax and gradient; under autocast also the head
                "logits of a chunk": 3 * chunk
                + (2.0 * models.vocabulary * models.width if half else 0.0),
            }
        if adapter.objective == "recovery":
            during |= self._float_memory
        starting = {}
        if adapter.init != "zero":
            largest = max(max(shape) for shape in models.products)
            starting = {
                "float model": float(self._float_bytes),
                "factors of the largest layer": 8.0 * FLOAT * largest**2,
            }
            seconds += self._load_float()
            for inner, out in models.products:  # eigenvectors of two moments and a decomposition
                small, large = sorted((inner, out))
                seconds += 10 * (
                    speed.product(inner, inner, inner) + speed.product(out, out, out)
                ) + 20 * speed.product(small, small, large)
        larger = max(during, starting, key=lambda parts: sum(parts.values()))
        return Forecast(stage.name, seconds, memory | larger, disk, settings)

    def _simulation(self, adapter: Adapter, tokens: int) -> tuple[dict[str, float], float, float]:
        """Memory of a captured graph, bytes of activations, and seconds of a forward."""
        run = self.models.forward("graph", tokens, adapter)
        memory = {
            "captured graph": float(_NODE_BYTES * run.operators),
            # float copies of what the simulation quantizes besides the base: norms, the embedding
            "quantized copies": FLOAT * self.models.float_values,
        }
        # A quantizer reads and writes its value about eight times.
        seconds = self._forward("graph", tokens, adapter) + self.speed.moving(
            8 * self._activations(run)
        )
        return memory, run.peak + self._logits(tokens), seconds

    def _activations(self, run: TracedRun) -> float:
        """Bytes of all results in a graph, without the unpacked weights."""
        return run.outputs - FLOAT * self.models.packed_weights

    def _graph_run(self, adapter: Adapter) -> TracedRun:
        """The graph at any length, which its operators do not depend on."""
        tokens = self.recipe.data_of(adapter.name).sequence_tokens
        return self.models.forward("graph", tokens, adapter)

    def _capture_seconds(self, adapter: Adapter) -> float:
        run = self._graph_run(adapter)
        return self.speed.tracing(CAPTURE * run.operators)

    def _calibrate(self, stage: Stage) -> Forecast:
        adapter = self._adapter(stage)
        text = self._text(stage)
        tokens, count = text.sequence_tokens, text.calibration_sequences
        if (most := self.recipe.simulation.calibration_tokens) is not None:
            count = min(count, -(-most // tokens))
        graph, peak, each = self._simulation(adapter, tokens)
        values = self._quantized_values(adapter)
        memory = self._base_memory | graph
        memory["activations"] = peak
        memory["samples of activations"] = FLOAT * VALUES * values
        seconds = self._load_base() + self._capture_seconds(adapter) + count * each
        seconds += _ACTIVATION_SECONDS * values
        if stage.adapter is None and stage.name != ZERO:
            seconds *= len(self.recipe.adapters)
        disk = 2 * FLOAT * self.models.trained_values(adapter)
        return Forecast(
            stage.name,
            seconds,
            memory,
            disk,
            ("simulation.calibration_tokens", "data.sequence_tokens"),
        )

    def _quantized_values(self, adapter: Adapter) -> float:
        """About how many activations of a graph have a quantizer: a quarter of its operators."""
        return self._graph_run(adapter).operators / 4

    def _export(self, stage: Stage) -> Forecast:
        models, speed = self.models, self.speed
        _, name, *_ = stage.name.split("/")
        if isinstance(TARGETS[name], WeightsTarget):
            size = models.packed_bytes + FLOAT * models.float_values
            memory = self._base_memory | {"files": float(size)}
            return Forecast(
                stage.name, self._load_base() + speed.moving(10 * size), memory, float(size)
            )
        adapter = self._adapter(stage)
        run = self._graph_run(adapter)
        graph, _, _ = self._simulation(adapter, self._text(stage).sequence_tokens)
        memory = self._base_memory | graph
        memory["encodings as text"] = float(_SCALE_BYTES * models.scales)
        seconds = _SCALE_SECONDS * models.scales
        if isinstance(TARGETS[name], SwitchableTarget) and stage.adapter is not None:
            disk = 2 * FLOAT * models.trained_values(adapter) + 24 * models.scales
            return Forecast(stage.name, seconds, memory, disk, ("base.weights.block_size",))
        memory["ONNX graph"] = float(_ONNX_NODE_BYTES * run.operators)
        memory["codes, one byte each"] = float(models.packed_weights)
        # as float32 tensors, in the ONNX model, and as bytes to write
        memory["copies of float values"] = 3.0 * FLOAT * models.float_values
        seconds += speed.tracing(TRANSLATE * run.operators)
        seconds += speed.moving(20 * models.packed_weights)
        if isinstance(TARGETS[name], SwitchableTarget):
            seconds += self._capture_seconds(adapter)  # with a cache
        disk = models.packed_bytes + FLOAT * models.float_values + 24 * models.scales
        if isinstance(TARGETS[name], UseCasesTarget):  # weights in float, once for all graphs
            seconds *= len(self.recipe.use_cases())
            disk += FLOAT * models.packed_weights
        return Forecast(stage.name, seconds, memory, disk, ("base.weights.block_size",))

    def _verify(self, stage: Stage) -> Forecast:
        models, speed = self.models, self.speed
        _, name, *_ = stage.name.split("/")
        text, section = self._text(stage), self.recipe.verify
        adapter, tokens = self._adapter(stage), text.sequence_tokens
        count = min(section.sequences, text.evaluation_sequences)
        memory = self._base_memory
        if isinstance(TARGETS[name], WeightsTarget):
            seconds = self._load_base() + 2 * count * self._forward("adapted", tokens, adapter)
            memory["exported model"] = sum(self._base_memory.values())
            memory["activations and logits"] = 3 * self._logits(tokens)
            return Forecast(stage.name, seconds, memory, 0)
        graph, peak, each = self._simulation(adapter, tokens)
        run = models.forward("graph", tokens, adapter)
        layer_bytes = self._activations(run) * min(1.0, section.layer_tokens / tokens)
        size = models.packed_bytes + FLOAT * models.float_values + models.packed_weights
        memory |= graph
        by_layer = size + 3 * layer_bytes  # simulated values, given and computed ones
        # Three models' logits and their masked copies, two differences, and in float64 the
        # logits and log-softmax of one; ONNX Runtime packs the weight of the head once more.
        if isinstance(TARGETS[name], SwitchableTarget):
            by_layer += size  # the session of all adapters stays
        whole = size + peak + 12 * self._logits(tokens) + FLOAT * models.float_values
        memory["model in ONNX Runtime"] = float(size)
        memory["values of all layers" if by_layer > whole else "logits"] = (
            max(by_layer, whole) - size
        )
        seconds = 2 * speed.moving(30 * size) + speed.tracing(10 * run.operators)
        seconds += 3 * count * each
        if isinstance(TARGETS[name], SwitchableTarget) and stage.adapter is not None:
            memory["simulation of the base"] = sum((self._base_memory | graph).values())
            seconds += self._load_base() + self._capture_seconds(adapter)
            seconds += (4 * SEQUENCES + DECODED) * each
        return Forecast(
            stage.name, seconds, memory, 0, ("verify.layer_tokens", "data.sequence_tokens")
        )
