"""Cross-entropy of a causal language model without the logits of a whole batch.

    loss = 1/N sum_t -log softmax(P(head(h_t)))[y_t]

    h [tokens, hidden]   inputs of the output head
    y [tokens]           targets, -100 outside the loss
    N                    number of targets, or the Trainer's count over accumulated batches
    P                    what the model does to logits between head and loss (scale, soft cap)

At 2,048 tokens and a vocabulary of 49,152, logits take 400 MB, and their softmax and gradient as
much again: the peak of a training step. Here only a chunk or slice of the logits exists at a time:

    chunked_cross_entropy    any head; some tokens, the whole vocabulary
    sliced_cross_entropy     a frozen linear head, z_t = W h_t + b; all tokens, some rows of W

Both compute loss and gradient together in the forward pass, so nothing is recomputed; backward only
scales the gradient. Trainable parameters of the head (its weight, or an adapter on it) get their
gradients in the same pass.

This works for any causal model of transformers: the model's own forward runs with two replacements.
The output head only captures its input, and the loss function computes the loss from that input.

Given up: the logits of a forward with labels (`output.logits` is None), and second derivatives.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from qwlora.data.sequences import IGNORED
from qwlora.errors import TrainingError
from qwlora.graph.call_arguments import vocabulary_size
from qwlora.nn import PackedLinear
from qwlora.nn.packed_tensor import compute_dtype
from qwlora.nn.temporary import evaluation_mode, replaced
from qwlora.system.device import device_of
from qwlora.system.machine import return_freed_memory

# A chunk is a little over 32 MiB in float32: glibc's malloc returns larger blocks to the system.
CHUNK_LOGITS = 2**23
SLICE_LOGITS = 2**20  # logits in a slice of the vocabulary; 4 MiB in float32
_PROBE_TOKENS = 8
# Below this, returning malloc's free pages takes more time than it is worth.
_MIN_TRIM_TOKENS = 1024
HeadPath = Callable[[Tensor], Tensor]
WeightRows = Callable[[slice | Tensor], Tensor]


class ChunkedLoss(contextlib.ExitStack):
    """The chunked loss of `model`, a causal language model of transformers or a PEFT model around
    one. It is attached in place, until the context ends. A model without an output head, or with
    another loss, is refused."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._model = causal_model(model)
        head = self._model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise self._refusal("it has no output head (get_output_embeddings() is None)")
        self._head = head
        self._vocabulary = vocabulary_size(self._model)
        self._chunk_tokens = CHUNK_LOGITS // self._vocabulary + 1
        self._own_forward, self._own_head = self._model.forward, head.forward
        self._captured: list[Tensor] = []
        self._logit_changes = _logit_changes(self._model)
        self._check()

        @functools.wraps(self._own_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            has_labels = kwargs.get("labels") is not None
            return (self._forward if has_labels else self._own_forward)(*args, **kwargs)

        self.enter_context(replaced(self._model, forward))

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self._return_memory(kwargs["labels"].numel())
        with (
            replaced(self._head, self._capture),
            replaced(self._model, self._loss, "_loss_function"),
        ):
            self._captured.clear()
            output = self._own_forward(*args, **kwargs)
        self._captured.clear()
        if isinstance(output, ModelOutput):
            output["logits"] = None
        return output

    def _capture(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self._captured.append(hidden)
        # Without columns, scales and soft caps that the forward applies cost nothing.
        return hidden[..., :0]

    def _loss(self, logits: Any = None, labels: Any = None, *_: Any, **kwargs: Any) -> Tensor:
        """Replaces `ForCausalLMLoss` of transformers, with its arguments; `logits` is empty."""
        if len(self._captured) != 1 or self._captured[0].ndim != 3:
            raise self._refusal(
                f"its forward calls the output head {len(self._captured)} times, not once"
            )
        targets = kwargs.get("shift_labels")
        if targets is None:
            targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        hidden = self._captured[0].flatten(0, -2)
        # The loss's only wait for a GPU: the CPU then knows all counts and ranges of the targets.
        targets = targets.flatten().cpu()
        kept = (targets != kwargs.get("ignore_index", IGNORED)).nonzero()[:, 0]
        count, items = len(kept), kwargs.get("num_items_in_batch")
        if not count and items is None:
            raise TrainingError(
                "a batch has no loss token: all labels are -100. Remove it from the training data"
            )
        if count < len(targets):
            hidden = hidden[kept.to(hidden.device, non_blocking=True)]
            targets = targets[kept]
        self._return_memory(len(targets))  # after the forward pass
        if count:
            lowest, highest = (int(end) for end in targets.aminmax())
            if lowest < 0 or highest >= self._vocabulary:
                raise TrainingError(
                    f"labels range from {lowest} to {highest}, but the vocabulary has "
                    f"{self._vocabulary} entries. Use -100 for tokens outside the loss"
                )
        total = self._sum(hidden, targets.to(hidden.device, non_blocking=True))
        self._return_memory(len(targets))
        if items is None:
            return total / count
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)

    def _return_memory(self, tokens: int) -> None:
        # Of a peak of 1,330 to 1,660 MB, 400 to 700 MB were freed blocks that glibc 2.36 does not
        # reuse (docs/log/training.md). A step with checkpointing trades time for memory anyway.
        model = self._model
        if tokens >= _MIN_TRIM_TOKENS and model.training and model.is_gradient_checkpointing:
            return_freed_memory()

    def _sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        head: Any = self._head
        trained = [p for p in head.parameters() if p.requires_grad]
        has_own_forward = getattr(self._own_head, "__func__", None) is not type(head).forward
        # A weight that is unpacked or rounded for each product (57 MB for 49,152 x 576 in bfloat16)
        # is computed once, in slices that serve all tokens. Slices know neither P nor an adapter.
        if not (self._logit_changes or trained or has_own_forward):
            rows = _computed_rows(head, compute_dtype(hidden))
            if rows is not None:
                return sliced_cross_entropy(hidden, targets, rows, head.out_features, head.bias)
        return chunked_cross_entropy(
            hidden, targets, lambda h: self._p(self._own_head(h)), trained, self._chunk_tokens
        )

    def _p(self, logits: Tensor) -> Tensor:
        return functools.reduce(lambda z, change: change(z), self._logit_changes, logits)

    def _check(self) -> None:
        """Refuse a model that changes logits in a way that its configuration does not say, or whose
        own loss or gradient differs from the chunked one on a small batch."""
        device = device_of(self._head)
        with (
            evaluation_mode(self._model),
            torch.random.fork_rng(devices=[]),
            torch.autocast(device.type, enabled=False),
        ):
            torch.manual_seed(0)
            ids = torch.randint(0, self._vocabulary, (2, _PROBE_TOKENS)).to(device)
            batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            batch |= {"use_cache": False, "return_dict": True}
            self._compare_logits(batch)
            self._compare_losses(batch)

    def _compare_logits(self, batch: dict[str, Any]) -> None:
        sent: list[Tensor] = []

        def random_logits(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            # A soft cap (30 in Gemma 2) leaves the small logits of an untrained model as they are.
            sent.append(100 * torch.randn_like(self._own_head(hidden)))
            return sent[0]

        try:
            with torch.no_grad(), replaced(self._head, random_logits):
                received = self._own_forward(**batch).logits
        except (RuntimeError, ValueError, TypeError) as error:
            raise self._refusal(f"it does not run on token ids alone ({error})") from error
        if not sent or not torch.equal(received.float(), self._p(sent[0]).float()):
            raise self._refusal(
                "it changes logits after its head, and its configuration does not say how"
            )

    def _compare_losses(self, batch: dict[str, Any]) -> None:
        labels = batch["input_ids"].clone()
        labels[:, 2] = IGNORED  # shows whether the model's own loss skips it
        hidden: list[Tensor] = []

        def measured(head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            def head_from_leaf(h: Tensor, *_: Any, **__: Any) -> Tensor:
                hidden.append(h.detach().requires_grad_())
                return head(hidden[-1])

            self._captured.clear()
            with torch.enable_grad(), replaced(self._head, head_from_leaf):
                loss = self._own_forward(**batch, labels=labels).loss
                return loss.detach().float(), torch.autograd.grad(loss, hidden[-1])[0].float()

        own_loss, own_gradient = measured(self._own_head)
        try:
            with replaced(self._model, self._loss, "_loss_function"):
                loss, gradient = measured(self._capture)
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._refusal(f"its forward needs the logits ({error})") from error
        self._captured.clear()
        tolerance = 1e-4 if hidden[-1].dtype == torch.float32 else 3e-2
        if (
            not torch.allclose(loss, own_loss, rtol=tolerance)
            or (gradient - own_gradient).norm() > 10 * tolerance * own_gradient.norm()
        ):
            raise self._refusal(
                f"on a small batch its own loss is {own_loss:.6f}, the chunked loss {loss:.6f}"
            )

    def _refusal(self, why: str) -> TrainingError:
        return TrainingError(
            f"{type(self._model).__name__} cannot be trained with the chunked loss: {why}. "
            "The model's own loss (memory_saving: chunked_loss=False) makes the logits of whole "
            "batches, which take more memory"
        )


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`, which may be wrapped by PEFT."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TrainingError(
            f"{type(inner).__name__} is not a model of transformers, so its output head is "
            "unknown. Compute the loss yourself: memory_saving(model, chunked_loss=False)"
        )
    return inner


def _logit_changes(model: PreTrainedModel) -> list[Callable[[Tensor], Tensor]]:
    """P, as functions of logits in order: what the configuration asks for after the head."""
    config: Any = model.config.get_text_config()
    factor: Any = getattr(config, "logit_scale", None)
    factor = factor or getattr(config, "lm_head_multiplier", None)
    divisor: Any = getattr(config, "logits_scaling", None)
    cap: Any = getattr(config, "final_logit_softcapping", None)
    changes: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
        (factor, lambda z: z * factor),
        (divisor, lambda z: z / divisor),
        (cap, lambda z: torch.tanh(z / cap) * cap),
    ]
    return [change for value, change in changes if value]


def _computed_rows(head: nn.Module, dtype: torch.dtype) -> WeightRows | None:
    """Rows of the head's weight in `dtype`, if packed, or float32 under autocast; else None."""
    if isinstance(head, PackedLinear):
        return functools.partial(head.tensor.dequantize, dtype)
    if type(head) is nn.Linear and head.weight.dtype == torch.float32 != dtype:
        return lambda rows: head.weight[rows].to(dtype)
    return None


class _WithGradients(torch.autograd.Function):
    """A sum whose gradients by its inputs are known."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(g * scale.to(g.dtype) for g in ctx.saved_tensors))


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, head: HeadPath, trained: list[nn.Parameter], chunk_tokens: int
) -> Tensor:
    """Sum of the cross-entropies of `head(hidden)`, `chunk_tokens` at a time: float32, in nats.

        L = sum_t lse_t - z_t[y_t],    z = head(h),    lse_t = log sum_v exp z_t[v]
        dL/dz_t = softmax(z_t) - onehot(y_t)

    Args:
        hidden, targets: [tokens, hidden] and int64 [tokens].
        trained: trainable parameters used by `head`.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    gradients = [torch.empty_like(hidden)] if wants_gradient else []
    gradients += [torch.zeros_like(p) for p in trained if wants_gradient]
    buffer: Tensor | None = None
    for start in range(0, len(hidden), chunk_tokens):
        chunk_rows = slice(start, start + chunk_tokens)
        rows = targets[chunk_rows, None]
        chunk = hidden[chunk_rows].detach().requires_grad_(wants_gradient)
        with torch.set_grad_enabled(wants_gradient):
            logits = head(chunk)
        # One buffer for all chunks: a new one of this size would come from the system each time.
        if buffer is None:
            buffer = torch.empty_like(logits, dtype=torch.float32)
        scores = torch.log_softmax(logits.detach().float(), dim=-1, out=buffer[: len(logits)])
        total -= scores.gather(1, rows).sum()
        if wants_gradient:
            scores = scores.exp_()
            scores.scatter_add_(1, rows, torch.full_like(rows, -1, dtype=scores.dtype))
            gradients[0][chunk_rows], *more = torch.autograd.grad(
                logits, (chunk, *trained), scores.to(logits.dtype), allow_unused=True
            )
            for total_gradient, gradient in zip(gradients[1:], more, strict=True):
                if gradient is not None:
                    total_gradient += gradient
    if not wants_gradient:
        return total
    result: Tensor = _WithGradients.apply(total, gradients, hidden, *trained)
    return result


def sliced_cross_entropy(
    hidden: Tensor, targets: Tensor, weight_rows: WeightRows, vocabulary: int, bias: Tensor | None
) -> Tensor:
    """Sum of the cross-entropies of `F.linear(hidden, weight, bias)`, in the dtype of the weight:
    float32, in nats.

        dL/dh_t = sum_(v != y_t) p_t[v] (W_v - W_y_t)

    Running sums as in online softmax (Milakov and Gimelshein 2018,
    https://arxiv.org/abs/1805.02867).

    Args:
        hidden, targets: [tokens, hidden] and int64 [tokens].
        weight_rows: rows of the frozen weight by a slice or their numbers, [rows, hidden].
        bias: [vocabulary], frozen.
    """
    size = SLICE_LOGITS // max(1, len(hidden)) + 1
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    x = hidden.detach()
    picked = x.new_zeros(len(x), dtype=torch.float32)  # the target's logit
    others = torch.zeros_like(picked)  # sum of exp of all other logits
    highest = torch.full_like(picked, -torch.inf)
    # Sum over all others of exp times their row of W.
    gradient = torch.zeros_like(x if wants_gradient else x[:0], dtype=torch.float32)
    for start in range(0, vocabulary, size):
        stop = min(start + size, vocabulary)
        rows = weight_rows(slice(start, stop))
        x = x.to(rows.dtype)  # copies in the first slice only
        z = F.linear(x, rows, None if bias is None else bias[start:stop].to(x.dtype)).float()
        column = targets - start
        in_slice = (column >= 0) & (column < z.shape[1])  # tokens with their target in this slice
        index = column.clamp(0, z.shape[1] - 1).unsqueeze(1)  # any column, for other tokens
        picked += z.gather(1, index).squeeze(1) * in_slice
        # Both sums are relative to the largest logit so far, so that no exp overflows, and are
        # rescaled when a larger one comes.
        raised = torch.maximum(highest, z.amax(1))
        shrunk = (highest - raised).exp()
        e = z.sub_(raised.unsqueeze(1)).exp_()
        e.scatter_(1, index, e.gather(1, index).masked_fill_(in_slice.unsqueeze(1), 0))
        others = others * shrunk + e.sum(1)
        if wants_gradient:
            gradient.mul_(shrunk.unsqueeze(1)).add_(e.to(rows.dtype) @ rows)
        highest = raised
    whole = others + (picked - highest).exp()
    total = (highest + whole.log() - picked).sum()
    if not wants_gradient:
        return total
    # p_t[y_t] - 1 is not computed: in bfloat16 the difference has no digits left for a token that
    # is nearly certain. The sum over all other tokens is as exact for any token.
    own_row = weight_rows(targets).float()
    gradient.sub_(own_row.mul_(others.unsqueeze(1))).div_(whole.unsqueeze(1))
    result: Tensor = _WithGradients.apply(total, [gradient.to(hidden.dtype)], hidden)
    return result
