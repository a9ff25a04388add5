"""The training step: everything QWLoRA replaces in transformers, PEFT and torch, in one order.

Applied from top to bottom, removed from bottom to top. `memory_saving`, for a training loop of the
user's own, is rows 1 and 3 to 5.

    | # | what is replaced                     | by                          | why
    |---|--------------------------------------|-----------------------------|---------------------
    | 1 | `forward` of the causal model and,   | `ChunkedLoss`               | the logits of a whole
    |   | while it runs, its `_loss_function`  | chunked_loss.py             | batch never exist
    |   | and the `forward` of its head        |                             |
    |   | or: `forward` of the causal model    | `replaced_forward` below    | train on quantized
    |   |                                      |                             | activations
    | 2 | nothing: pre-hooks on the model and  | `RecoveryLoss`              | distance to the
    |   | on both output heads                 | below                       | float model
    | 3 | under autocast: PEFT's cast of layer | `peft.helpers.disable_`     | autocast casts them
    |   | inputs to the weight's dtype         | `input_dtype_casting`       | anyway
    | 4 | `forward` of plain LoRA layers       | `fused_lora`                | one output array
    |   |                                      | below                       | instead of four
    |   | and of mergeable ones                | `merged_forward`            | the base's product is
    |   |                                      | mergeable.py                | not used
    | 5 | torch's float32 matmul precision     | `onednn_float32_matmul`     | faster on CPUs that
    |   |                                      | device.py                   | are not Intel's

What each row relies on beyond the documented interfaces of torch 2.13, transformers 5.24 and peft
0.21.2 (pyproject.toml has the ranges):

    1  transformers: `loss_function` reads the instance attribute `_loss_function`; a causal model's
       forward calls its head once and passes labels, logits and `num_items_in_batch` to the loss
    4  peft: the attributes of `peft.tuners.lora.Linear`; its forward is B(A(dropout(x))) * scaling
    5  torch: precision "medium" selects oneDNN on CPUs

`trainer.AdapterTrainer` relies on transformers' Trainer: `_loss_shifts_labels`, `_save`,
`model_accepts_loss_kwargs`, `current_gradient_accumulation_steps`, `autocast_smart_context_manager`
and `create_accelerator_and_postprocess`. `train.py` sets `TrainingArguments._n_gpu`.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from qwlora.adapter.adapter_files import check_settings
from qwlora.adapter.chunked_loss import ChunkedLoss, causal_model
from qwlora.adapter.mergeable import MergedIntegers, merged_forward
from qwlora.data.sequences import IGNORED
from qwlora.errors import QwloraWarning, TrainingError
from qwlora.nn import PackedLinear
from qwlora.nn.packed_layer import unwrapped
from qwlora.nn.packed_tensor import compute_dtype
from qwlora.nn.temporary import replaced
from qwlora.system.device import device_of, onednn_float32_matmul

_NOT_INPUTS = (
    *("labels", "num_items_in_batch", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states"),
)


@contextlib.contextmanager
def replaced_forward(
    model: nn.Module, graph: nn.Module | None, processes: int = 1
) -> Iterator[None]:
    """Row 1, until the context ends: the chunked loss, or a graph of what the model computes once
    it is quantized (`simulation/training_graph.py`).

        loss = L(graph(inputs), labels),    L the model's own loss function

    What a graph does not support is refused here or in the recipe (`Adapter.without_graph`).
    """
    if graph is None:
        loss: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        try:
            loss = ChunkedLoss(model)
        except TrainingError as error:
            warnings.warn(f"{error}. Training uses that loss", QwloraWarning, stacklevel=3)
        with loss:
            yield
        return
    if processes > 1:
        raise TrainingError(
            "training on quantized activations (a captured graph) does not support "
            f"{processes} processes. Start one"
        )
    inner = causal_model(model)
    if getattr(inner.config, "output_router_logits", False):
        raise TrainingError(
            "the model adds a router balance term to its loss (output_router_logits), which a "
            "captured graph does not contain. Set output_router_logits to false"
        )

    # The adapter weights in the graph are the model's own parameters, so the optimizer, checkpoints
    # and files are the same as for other training. The output head is inside the graph, so the
    # logits of a whole batch exist.
    @functools.wraps(inner.forward)
    def forward(**kwargs: Any) -> CausalLMOutput:
        logits = graph(**{k: value for k, value in kwargs.items() if k not in _NOT_INPUTS})
        if kwargs.get("labels") is None:
            return CausalLMOutput(logits=logits)
        items = {k: kwargs[k] for k in ("num_items_in_batch",) if kwargs.get(k) is not None}
        vocabulary = inner.config.get_text_config().vocab_size
        loss = inner.loss_function(
            logits=logits, labels=kwargs["labels"], vocab_size=vocabulary, **items
        )
        return CausalLMOutput(loss=loss, logits=logits)

    with replaced(inner, forward):
        yield


class _HeadReachedError(Exception):
    """Ends the teacher's forward at its head: its logits are not needed."""


class RecoveryLoss(contextlib.ExitStack):
    """Recovery: train an adapter that brings the quantized base back to the float model.

        loss = language loss + sum_t |h_t - g_t|^2 / sum_t |g_t|^2,    t over all tokens but padding

    h and g [tokens, hidden] are the inputs of the output heads of base-with-adapter and of the
    float model (the teacher), captured until the context ends. Both must be on one device. A
    recovered adapter is a starting point for adapters of any task.

    Source: the model-level loss of RILQ (Lee et al. 2024, https://arxiv.org/abs/2412.01129).
    """

    def __init__(self, model: nn.Module, teacher: nn.Module):
        super().__init__()
        self._teacher = teacher.eval().requires_grad_(False)
        self._student_state: Tensor | None = None
        self._teacher_state: Tensor | None = None
        heads = [causal_model(m).get_output_embeddings() for m in (model, teacher)]
        if any(head is None for head in heads):
            raise TrainingError(
                "recovery compares the inputs of output heads, but the model has no output head"
            )
        for hook in (
            model.register_forward_pre_hook(lambda *_: setattr(self, "_student_state", None)),
            heads[0].register_forward_pre_hook(self._capture),
            heads[1].register_forward_pre_hook(self._capture_teacher),
        ):
            self.callback(hook.remove)

    def distance(self, inputs: Mapping[str, Any]) -> Tensor:
        """The second term of the loss, a scalar, for the inputs of the model's last forward."""
        forward_inputs = {k: value for k, value in inputs.items() if k not in _NOT_INPUTS}
        with torch.no_grad(), contextlib.suppress(_HeadReachedError):
            self._teacher(**forward_inputs, use_cache=False)
        h, g = self._student_state, self._teacher_state
        assert h is not None
        assert g is not None
        self._student_state = self._teacher_state = None
        if h.shape != g.shape:
            raise TrainingError(
                f"the last hidden state has shape {list(g.shape)} in the float model and "
                f"{list(h.shape)} in the base. Recover with the float model that the base was "
                "quantized from"
            )
        # Padding is what the attention mask excludes; without a mask, what follows the last loss
        # token of a sequence.
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            is_token = mask.to(h.device) > 0
        elif labels is not None:
            is_token = (labels.to(h.device) != IGNORED).flip(-1).cumsum(-1).flip(-1) > 0
        else:
            is_token = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device)
        off, size = (
            (x.square() * is_token[..., None]).sum() for x in (h.float() - g.float(), g.float())
        )
        return off / size.clamp_min(torch.finfo(size.dtype).tiny)

    def _capture(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Only the first call of a forward: the chunked loss calls the head again, on parts.
        if self._student_state is None:
            self._student_state = args[0]

    def _capture_teacher(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._teacher_state = args[0]
        raise _HeadReachedError


@contextlib.contextmanager
def memory_saving(
    model: nn.Module, autocast: bool = False, chunked_loss: bool = True
) -> Iterator[None]:
    """Train with less memory and time until the context ends. See rows 1 and 3 to 5 of the module.

        with memory_saving(model):
            for batch in batches:
                model(**batch).loss.backward()

    Losses and gradients are the same up to the order of rounding.

    Args:
        model: the model, on the device where it is trained.
        autocast: whether the forward runs under autocast.
        chunked_loss: compute `model(ids, labels=ids).loss` without the logits of the whole batch,
            see `ChunkedLoss`. False for a loss of your own, which needs the logits, or for a model
            that `ChunkedLoss` refuses.

    Raises:
        SourceError: an adapter is not LoRA, or has a setting that `save_adapter` does not support.
        TrainingError: see `ChunkedLoss`.
    """
    check_settings(getattr(unwrapped(model), "peft_config", None) or {})
    # The chunked loss keeps the head's `forward` that it finds, which must outlive `fused_lora`.
    loss = ChunkedLoss(model) if chunked_loss else contextlib.nullcontext()
    with loss, lean_steps(model, autocast):
        yield


@contextlib.contextmanager
def lean_steps(model: nn.Module, autocast: bool) -> Iterator[None]:
    """Rows 3 to 5, until the context ends."""
    with (
        # Under autocast, PEFT would cast the inputs of products to float32 first.
        disable_input_dtype_casting(model, autocast),
        fused_lora(model),
        onednn_float32_matmul(device_of(model)),
    ):
        yield


@contextlib.contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """Row 4: plain LoRA layers on packed codes sum in one output array, until the context ends.

        u = scaling * lora_A(dropout(x)),    y = lora_B(u),    y += x W_hat^T + b

    PEFT makes four arrays of the output's size, and one more for the gradient of the scaling. Here
    there is one. Results equal PEFT's up to rounding order. PEFT's forward remains for DoRA and
    other variants, several active adapters, merged or disabled adapters, layers with hooks or with
    a forward set on the instance, and traced graphs.
    """
    with contextlib.ExitStack() as stack:
        layers = [m for m in model.modules() if type(m) is LoraLinear and "forward" not in vars(m)]
        for layer in [m for m in layers if isinstance(m.base_layer, PackedLinear)]:
            stack.enter_context(replaced(layer, functools.partial(_fused_forward, layer)))
        yield


def _only_adapter(layer: Any) -> str | None:
    """The one active adapter of `layer`; None for several, and for merged or disabled ones."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return None if len(active) != 1 or layer.disable_adapters or layer.merged else active[0]


def _fused_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapter, dtype = _only_adapter(layer), compute_dtype(x)
    if adapter is None or args or kwargs:
        return LoraLinear.forward(layer, x, *args, **kwargs)
    # PEFT would compute the base's product too before it calls the variant.
    if isinstance(layer.lora_variant.get(adapter), MergedIntegers):
        return merged_forward(layer, adapter, x)
    is_cast = dtype != x.dtype or dtype == layer.lora_A[adapter].weight.dtype
    has_more = adapter in layer.lora_variant or layer.lora_B[adapter].bias is not None
    is_plain = layer.base_layer.is_plain and not has_more
    if not (is_plain and is_cast and x.ndim >= 2) or torch.compiler.is_compiling():
        return LoraLinear.forward(layer, x)
    # Under autocast, x is rounded once instead of once per product.
    x, lora_a, lora_b = x.to(dtype), layer.lora_A[adapter], layer.lora_B[adapter]
    # Scaling u [tokens, rank] instead of y [tokens, out] costs next to nothing.
    u = lora_a(layer.lora_dropout[adapter](x)) * layer.scaling[adapter]
    # The base's product comes last and saves nothing for backward. Recomputation of a checkpointed
    # layer ends when all saved tensors exist, so it skips this product in the layer's last linear
    # (down_proj, a quarter of a Llama layer's products).
    return layer.base_layer.add_to(lora_b(u), x)
