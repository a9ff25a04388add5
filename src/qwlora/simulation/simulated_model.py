"""The simulation in the shape of the transformers model that it was made from, so that whatever evaluates that model evaluates the simulation.

    model = simulation.model()
    model(input_ids=ids, attention_mask=mask, labels=labels)     # the model's own output class: simulated logits, and its own loss on them
    model.generate(ids, max_new_tokens=20)                       # the same tokens as ever, without a cache: each step runs the whole sequence
    model.to("cuda")                                             # moves the simulation; the user's model stays where it is

A batch that is padded on the left needs a graph that takes positions: put `position_ids` among the example inputs of `simulate`.

It is an instance of the model's own class with its configuration and nothing below it: `forward` runs the graph. Arguments are those of the model's forward; an
argument that the graph knows nothing of is refused, never ignored. It computes what was captured: evaluation, no gradients, no hidden states, no attentions, no
cache. A term that the model's forward adds to its loss (a router's balance) is not in the graph, so a model that has one switched on gets no loss.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwlora.errors import CaptureError
from qwlora.simulation.model_inputs import complete
from qwlora.simulation.simulation import Simulation

_REFUSED = {
    "output_hidden_states": "hidden states",
    "output_attentions": "attentions",
    "use_cache": "a cache",
}
_LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "shift_labels"})


class SimulatedModel:
    """What a class of transformers gets in front of its own methods; `as_model` makes the class."""

    simulation: Simulation
    own_arguments: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Simulated logits, in the model's own output class.

        Raises:
            CaptureError: an argument that the graph has no input for, or one that is missing; or labels with a loss that needs more than the logits.
        """
        if twice := kwargs.keys() & set(self.own_arguments[: len(args)]):
            raise CaptureError(f"{', '.join(sorted(twice))}: given twice, by place and by name")
        given = dict(zip(self.own_arguments, args, strict=False)) | kwargs
        for name, what in _REFUSED.items():
            if given.pop(name, None):
                raise CaptureError(
                    f"{name}: the simulated graph gives logits, and not {what}; leave it out"
                )
        labels, keep = given.pop("labels", None), given.pop("logits_to_keep", None)
        in_class = given.pop("return_dict", None)
        for_loss = {name: given.pop(name) for name in _LOSS_ARGUMENTS & given.keys()}
        with torch.no_grad():
            output = self.simulation(**complete(self.simulation.inputs, given))
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
        """The model's own `generate`, told that there is no cache, which changes the time and not the tokens.

        Raises:
            CaptureError: it is an encoder with a decoder, whose halves `generate` runs apart.
        """
        model = cast(PreTrainedModel, self)
        if model.config.is_encoder_decoder:
            raise CaptureError(
                f"generate runs the encoder of {type(model).__name__} apart from its decoder, and the simulated graph is of both together; "
                "call the model with the decoder's ids so far (decoder_input_ids), and append the token that the last logits choose"
            )
        return super().generate(*args, **{**kwargs, "use_cache": False})  # type: ignore[misc]

    def train(self, mode: bool = True) -> Self:
        """Refuses training: the graph is of evaluation."""
        if mode:
            raise CaptureError(
                "a simulated model is for evaluation; train the adapter before it is simulated (or through the graph, see `training`)"
            )
        return self

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Nothing to do: a weight that the model ties is one in the graph. Evaluation harnesses call this."""

    def get_input_embeddings(self) -> NoReturn:
        """Refuses: there are no layers to hand out or to change."""
        raise CaptureError(
            "a simulated model is one graph and has no embedding layers; those that it was captured from are simulation.origin.model's, "
            "and after a change of them simulate it again"
        )

    get_output_embeddings = get_input_embeddings

    def set_input_embeddings(self, _: Any) -> NoReturn:
        """Refuses likewise."""
        self.get_input_embeddings()

    set_output_embeddings = set_input_embeddings

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses: this is no checkpoint."""
        raise CaptureError(
            "a simulated model is no checkpoint; save base, adapter and simulation (`simulation.save(folder)`)"
        )


def as_model(simulation: Simulation) -> PreTrainedModel:
    """See the module's text.

    Raises:
        CaptureError: the simulation was not made from a model of transformers.
    """
    inner = inner_model(simulation.origin.model)
    if simulation.captured.interface.cached:
        raise CaptureError(
            "the graph takes keys and values of earlier tokens; for the model's call, capture without past_key_values"
        )
    own = type(inner)
    kind: Any = type(
        f"Simulated{own.__name__}",
        (SimulatedModel, own),
        {"__module__": own.__module__, "forward": _signed(inner, simulation.inputs)},
    )
    model = kind.__new__(kind)
    model.__dict__.update({key: value for key, value in inner.__dict__.items() if key != "forward"})
    for table in ("_parameters", "_buffers", "_modules"):
        model.__dict__[table] = {}
    for table in [
        key
        for key in model.__dict__
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_buffers_set"))
    ]:
        model.__dict__[table] = type(model.__dict__[table])()
    model.__dict__["training"] = False
    model.config = copy.deepcopy(inner.config)
    model.config.use_cache = False
    if getattr(inner, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(inner.generation_config)
        model.generation_config.use_cache = False
    model.own_arguments = tuple(_own_parameters(inner))
    model.simulation = simulation
    return cast(PreTrainedModel, model)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`, which may be wrapped by PEFT.

    Raises:
        CaptureError: there is none.
    """
    get = getattr(model, "get_base_model", None)
    inner = get() if callable(get) else model
    if not isinstance(inner, PreTrainedModel):
        raise CaptureError(
            f"{type(inner).__name__} is not a model of transformers, whose call could be kept; call the simulation itself, with tensors"
        )
    return inner


def loss_of(
    model: PreTrainedModel, logits: Tensor | None, labels: Tensor, given: Mapping[str, Any]
) -> Tensor:
    """The loss function of `model` (`model.loss_function`) on these logits.

    Raises:
        CaptureError: the loss needs more than logits and labels, or the model's forward adds to it.
    """
    config = model.config
    if logits is None:
        raise CaptureError(
            f"{type(model).__name__} returns no logits, so there is no loss of labels"
        )
    if config.is_encoder_decoder or getattr(config, "output_router_logits", False):
        why = (
            "moves the labels itself"
            if config.is_encoder_decoder
            else "adds the routers' balance to its loss"
        )
        raise CaptureError(
            f"{type(model).__name__} {why}, which is not in the graph; compute the loss from the logits"
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
    if missing := [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and n not in known
    ]:
        raise CaptureError(
            f"the loss of {type(model).__name__} needs {', '.join(missing)} besides logits and labels; compute it from the logits"
        )
    loss: Tensor = function(**{n: v for n, v in known.items() if n in parameters or n in given})
    return loss


def _signed(inner: PreTrainedModel, inputs: tuple[str, ...]) -> Any:
    """`SimulatedModel.forward` with a signature of its own: `generate` reads from it which inputs to make."""
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
