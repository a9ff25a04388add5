"""The runs of a job's models that memory follows from: of the float model, the base, base and
adapter, a training step, and the graph of a simulation. Reads no weights.

torch runs the operators on tensors that have shapes but no data. So the figures follow from the
code of the model and of transformers, whatever the architecture.
"""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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
from qwlora.adapter.training_step import lean_steps
from qwlora.errors import CaptureError, QwloraError
from qwlora.formats.meta_model import build_model
from qwlora.formats.model_source import load_config
from qwlora.grid.scheme import Scheme, parse_scheme
from qwlora.nn import weight_out_in
from qwlora.nn.packed_layer import PackedLayer
from qwlora.nn.replace import place_empty_, tie_weights_
from qwlora.quantize.layer_rules import plan_layers
from qwlora.quantize.quantize_blocks import tensors_by_block
from qwlora.recipe import Adapter, Recipe
from qwlora.system.parameter_names import FOLDER

_KEPT_SCHEME = "w4-block32"  # of integers that the model's files hold, whose grid is in their data


@dataclass
class TracedRun:
    """What a computation allocates.

    Args:
        peak: most bytes alive at one time, of tensors that the computation itself makes.
        operators: how many operators run.
        outputs: bytes of all their results together.
    """

    peak: int = 0
    operators: int = 0
    outputs: int = 0


def traced_run(call: Callable[[], Any]) -> TracedRun:
    """Run `call` in a `FakeTensorMode` of the caller; it must not read the value of any tensor."""
    with (mode := _Counting()):
        call()
    return mode.run


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.run = TracedRun()
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
        self.run.operators += 1
        if new or func._schema.is_mutable:  # else a view, perhaps of a weight
            self.run.outputs += sum(t.nbytes for t in results)
        for storage in (tensor.untyped_storage() for tensor in new):
            if id(storage) not in self._alive:
                self._alive[id(storage)] = storage.nbytes()
                self.run.peak = max(self.run.peak, sum(self._alive.values()))
                weakref.finalize(storage, self._alive.pop, id(storage), None)
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class TracedModels:
    """Traces the models of a recipe; each run once."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._runs: dict[Any, TracedRun] = {}

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
        return sum(p.numel() for p in self._attached(adapter).parameters() if p.requires_grad)

    def forward(self, kind: str, tokens: int, adapter: Adapter | None = None) -> TracedRun:
        """An evaluation of one sequence.

        Args:
            kind: `float`, `base`, `adapted`, or `graph`, as a graph is captured: with attention
                as single operators.
        """
        key = (kind, tokens, adapter and adapter.name)
        if key not in self._runs:
            if kind == "float":
                model: nn.Module = copy.deepcopy(self.model)
            else:
                model = self._attached(adapter) if adapter else copy.deepcopy(self.base)
            if kind == "graph":
                body: Any = model.get_base_model() if isinstance(model, PeftModel) else model
                body.set_attn_implementation("eager")
            self._runs[key] = _traced(model, tokens)
        return self._runs[key]

    def training(self, adapter: Adapter, tokens: int, rows: int) -> TracedRun:
        """One forward and backward pass, without the output head."""
        key = ("training", adapter.name, tokens, rows)
        if key not in self._runs:
            model = self._attached(adapter)
            model.train()
            if adapter.gradient_checkpointing:
                model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
            half = adapter.compute == "bfloat16"
            with lean_steps(model, half):
                self._runs[key] = _traced(model, tokens, rows, trains=True, half=half)
        return self._runs[key]

    def _attached(self, adapter: Adapter) -> Any:
        return attach(copy.deepcopy(self.base), adapter.lora_shape(), self.recipe.seed)


def _traced(
    model: nn.Module, tokens: int, rows: int = 1, trains: bool = False, half: bool = False
) -> TracedRun:
    with FakeTensorMode():
        _without_data_(model)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        arguments |= {"use_cache": False, **({"logits_to_keep": 1} if trains else {})}

        def run() -> None:
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
            with torch.set_grad_enabled(trains), autocast:
                result: Tensor = model(**arguments).logits
                if trains:
                    result = result[:, -1].float().sum()
            if trains:
                result.backward()

        # torch also logs, with a traceback, what it raises on tensors without data
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        was_disabled, logger.disabled = logger.disabled, True
        try:
            return traced_run(run)
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
