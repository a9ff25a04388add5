"""A simulation with the interface of its transformers model, for evaluation harnesses.

    model = simulation.model()
    model(input_ids=ids, attention_mask=mask, labels=labels)    # simulated logits, and their loss
    model.generate(ids, max_new_tokens=20)    # without a cache: each step runs the whole sequence
    model.to("cuda")                          # moves the simulation, not the captured model

It is an instance of a subclass of the model's class, with its config but without layers: `forward`
runs the graph. It accepts the arguments of the model's forward and refuses those that the graph
does not support. There are no gradients, hidden states, attentions or caches, and no loss for
models that add other terms to it (router balance). Batches padded on the left need `position_ids`
among the example inputs of `simulate`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NoReturn, Self, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwlora.errors import CaptureError
from qwlora.simulation.model_inputs import complete_arguments

_REFUSED = {
    "output_hidden_states": "hidden states",
    "output_attentions": "attentions",
    "use_cache": "a cache",
}
_LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "shift_labels"})


class SimulatedModel:
    """Methods that replace those of a transformers model; `as_model` makes the subclass."""

    simulation: nn.Module
    inputs: tuple[str, ...]
    own_arguments: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Simulated logits in the model's output class.

        Raises:
            CaptureError: an argument is missing or not supported by the graph, or the loss of
                `labels` needs more than logits.
        """
        duplicates = kwargs.keys() & set(self.own_arguments[: len(args)])
        if duplicates:
            raise CaptureError(
                f"{', '.join(sorted(duplicates))}: given both by position and by name"
            )
        given = dict(zip(self.own_arguments, args, strict=False)) | kwargs
        for name, what in _REFUSED.items():
            if given.pop(name, None):
                raise CaptureError(
                    f"{name}: the simulated graph returns logits, not {what}; omit this argument"
                )
        labels, keep = given.pop("labels", None), given.pop("logits_to_keep", None)
        in_class = given.pop("return_dict", None)
        for_loss = {name: given.pop(name) for name in _LOSS_ARGUMENTS & given.keys()}
        with torch.no_grad():
            output = self.simulation(**complete_arguments(self.inputs, given))
            if keep is not None and not (isinstance(keep, int) and keep == 0):
                output["logits"] = output["logits"][
                    :, slice(-keep, None) if isinstance(keep, int) else keep
                ]
            if labels is not None:
                output = type(output)(
                    loss=loss_of(
                        cast(PreTrainedModel, self), output.get("logits"), labels, for_loss
                    ),
                    **output,
                )
        return output.to_tuple() if in_class is False else output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate` without a cache.

        Raises:
            CaptureError: the model is an encoder-decoder.
        """
        model = cast(PreTrainedModel, self)
        if model.config.is_encoder_decoder:
            raise CaptureError(
                f"generate runs encoder and decoder of {type(model).__name__} separately, and the "
                "simulated graph has both. Call the model with decoder_input_ids, and append the "
                "token that the last logits choose"
            )
        return super().generate(*args, **{**kwargs, "use_cache": False})  # type: ignore[misc]

    def train(self, mode: bool = True) -> Self:
        """Refuse training: the graph computes evaluation."""
        if mode:
            raise CaptureError(
                "a simulated model is for evaluation; train the adapter before simulating it, or "
                "with workflow: qwa-lora"
            )
        return self

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Does nothing: tied weights are one in the graph. Evaluation harnesses call it."""

    def get_input_embeddings(self) -> NoReturn:
        """Refuse: a simulated model has no layers."""
        raise CaptureError(
            "a simulated model is one graph and has no embedding layers. Change those of "
            "simulation.origin.model, and simulate it again"
        )

    get_output_embeddings = get_input_embeddings

    def set_input_embeddings(self, _: Any) -> NoReturn:
        """Refuse: a simulated model has no layers."""
        self.get_input_embeddings()

    set_output_embeddings = set_input_embeddings

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: save the base, the adapter and the simulation instead."""
        raise CaptureError(
            "a simulated model is not a checkpoint; save the base, the adapter and the simulation "
            "(simulation.save(folder))"
        )


def as_model(model: nn.Module, simulation: nn.Module, inputs: tuple[str, ...]) -> PreTrainedModel:
    """The simulation as a model of its transformers class; see the module's docstring.

    Args:
        model: that was captured.
        inputs: names of the simulation's arguments.

    Raises:
        CaptureError: the captured model is not from transformers.
    """
    inner = inner_model(model)
    own = type(inner)
    kind: Any = type(
        f"Simulated{own.__name__}",
        (SimulatedModel, own),
        {"__module__": own.__module__, "forward": _signed(inner, inputs)},
    )
    made = kind.__new__(kind)
    patched = ("forward", "save_pretrained")  # of this model alone; the class has its own
    made.__dict__.update({k: value for k, value in inner.__dict__.items() if k not in patched})
    for table in ("_parameters", "_buffers", "_modules"):
        made.__dict__[table] = {}
    for table in [
        key
        for key in made.__dict__
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_buffers_set"))
    ]:
        made.__dict__[table] = type(made.__dict__[table])()
    made.__dict__["training"] = False
    made.config = copy.deepcopy(inner.config)
    made.config.use_cache = False
    if getattr(inner, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(inner.generation_config)
        made.generation_config.use_cache = False
    made.own_arguments = tuple(_own_parameters(inner))
    made.simulation, made.inputs = simulation, inputs
    return cast(PreTrainedModel, made)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model in `model`, which may be a PEFT model.

    Raises:
        CaptureError: there is none.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise CaptureError(
            f"{type(inner).__name__} is not a transformers model; call the simulation with tensors "
            "instead"
        )
    return inner


def loss_of(
    model: PreTrainedModel, logits: Tensor | None, labels: Tensor, given: Mapping[str, Any]
) -> Tensor:
    """`model.loss_function` of these logits.

    Args:
        given: further arguments of the loss function.

    Raises:
        CaptureError: the loss needs more than logits and labels, or the model's forward adds terms.
    """
    config = model.config
    if logits is None:
        raise CaptureError(
            f"{type(model).__name__} returns no logits, so labels have no loss; omit them"
        )
    if config.is_encoder_decoder or getattr(config, "output_router_logits", False):
        why = "shifts labels" if config.is_encoder_decoder else "adds the router loss"
        raise CaptureError(
            f"{type(model).__name__} {why} in its forward, which the graph does not have; compute "
            "the loss from the logits"
        )
    text = config.get_text_config()
    known = {
        "logits": logits,
        "pooled_logits": logits,
        "labels": labels,
        "config": config,
        "vocab_size": getattr(text, "vocab_size", None),
        **given,
    }
    function = model.loss_function
    parameters = inspect.signature(function).parameters
    missing = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and n not in known
    ]
    if missing:
        raise CaptureError(
            f"the loss of {type(model).__name__} also needs {', '.join(missing)}; compute it from "
            "the logits"
        )
    loss: Tensor = function(**{n: v for n, v in known.items() if n in parameters or n in given})
    return loss


def _signed(inner: PreTrainedModel, inputs: tuple[str, ...]) -> Any:
    """`SimulatedModel.forward` with a signature that tells `generate` what to pass."""
    own = _own_parameters(inner)
    names = [
        n
        for n in own
        if n
        in {
            *inputs,
            "attention_mask",
            "position_ids",
            "labels",
            "use_cache",
            "return_dict",
            "logits_to_keep",
        }
    ]
    names += [n for n in (*inputs, "labels", "use_cache", "return_dict") if n not in names]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return SimulatedModel.forward(self, *args, **kwargs)

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in names
    ]
    forward.__signature__ = inspect.Signature([itself, *parameters])  # type: ignore[attr-defined]
    forward.__doc__ = SimulatedModel.forward.__doc__
    return forward


def _own_parameters(inner: PreTrainedModel) -> list[str]:
    parameters = list(inspect.signature(type(inner).forward).parameters.values())[1:]
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
