"""Training over several processes with FSDP2, the packed base sharded.

`accelerate launch --use_fsdp --fsdp_version 2` makes the Trainer shard parameters, and only parameters: buffers are kept whole on every process. The codes,
scales and offsets of packed layers are buffers, so before sharding they become parameters that are not trained; FSDP2 gathers integers like anything else.

    bytes of the base on a process = float and packed parameters / processes + buffers that the model itself has (rotary tables and the like)

Mixed precision is autocast's alone: FSDP2's own policy would cast scales, which are the base. After training everything is gathered, so that the fingerprint
and the adapter can be read on any process.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from qwlora.errors import TrainingError
from qwlora.grid.scheme import Scheme


def is_sharded(trainer: Any) -> bool:
    """Whether the Trainer shards its model with FSDP."""
    return bool(trainer.is_fsdp_enabled)


def prepare_sharding_(trainer: Any) -> None:
    """Make the packed layers of the Trainer's model such that FSDP2 shards them; nothing is done where FSDP is off.

    Raises:
        TrainingError: it is FSDP of the first version, which flattens parameters of one type and cannot hold integers.
    """
    if not is_sharded(trainer):
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise TrainingError("the base is packed integers, which FSDP version 1 cannot shard: launch with --fsdp_version 2")
    plugin.cpu_ram_efficient_loading = False  # every process has loaded the base; it would be emptied and sent again
    plugin.mixed_precision_policy = None
    for layer in trainer.model.modules():
        if isinstance(getattr(layer, "scheme", None), Scheme):
            _make_parameters(layer)


def gather_(trainer: Any) -> None:
    """Give every process the whole model again; to be called by all of them."""
    if is_sharded(trainer):
        for module in trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()


def _make_parameters(layer: nn.Module) -> None:
    for name, tensor in list(layer._buffers.items()):
        if tensor is not None and tensor.ndim:
            del layer._buffers[name]
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
