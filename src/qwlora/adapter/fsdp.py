"""Training over several processes with FSDP2, the packed base sharded.

`accelerate launch --use_fsdp --fsdp_version 2` makes the Trainer shard parameters, and only parameters: buffers are kept whole on every process. The codes,
scales and offsets of packed layers are buffers, so before sharding they become parameters that are not trained; FSDP2 gathers integers like anything else.

    bytes of the base on a process = float and packed parameters / processes + buffers that the model itself has (rotary tables and the like)

Mixed precision is autocast's alone: FSDP2's own policy would cast scales, which are the base. After training everything is gathered, so that the fingerprint
and the adapter can be read on any process.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qwlora.errors import TrainingError
from qwlora.nn import PackedLayer
from qwlora.parameter_names import is_adapter_name


def switch_on_(accelerator: Any) -> bool:
    """Whether the launcher asked for FSDP. Accelerate has it for accelerators only, and without one says nothing and copies the model: switch it on there."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if accelerator.state.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
    if accelerator.state.distributed_type != DistributedType.FSDP:
        raise TrainingError(
            f"the launcher asks for FSDP, but the processes are {accelerator.state.distributed_type.value}, which accelerate does not shard"
        )
    return True


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
        raise TrainingError(
            "the base is packed integers, which FSDP version 1 cannot shard: launch with --fsdp_version 2"
        )
    plugin.cpu_ram_efficient_loading = (
        False  # every process has loaded the base; it would be emptied and sent again
    )
    plugin.mixed_precision_policy = None
    for layer in trainer.model.modules():
        if isinstance(layer, PackedLayer):
            _make_parameters(layer)


def base_bytes(model: nn.Module) -> int:
    """Bytes of the base that this process holds: its shards, and what is whole."""
    tensors = [
        t
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if not is_adapter_name(name)
    ]
    return sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors)


def whole_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights, whole, on every process; to be called by all of them."""
    adapter = {name: p.detach() for name, p in model.named_parameters() if is_adapter_name(name)}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in adapter.items()}


def gather_(trainer: Any) -> None:
    """Give every process the whole model again, as plain tensors; to be called by all of them. It cannot be trained on after that."""
    if not is_sharded(trainer):
        return
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    whole: dict[int, nn.Parameter] = {}  # a tied parameter stays tied
    for module in trainer.model.modules():
        for name, shard in list(module._parameters.items()):
            if isinstance(shard, DTensor):
                if id(shard) not in whole:
                    whole[id(shard)] = nn.Parameter(
                        shard.full_tensor().detach(), requires_grad=shard.requires_grad
                    )
                module._parameters[name] = whole[id(shard)]
        if isinstance(module, PackedLayer):
            _make_buffers(module)


def _make_parameters(layer: nn.Module) -> None:
    for name, tensor in list(layer._buffers.items()):
        if tensor is not None and tensor.ndim:  # FSDP2 shards along the first axis
            del layer._buffers[name]
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _make_buffers(layer: nn.Module) -> None:
    for name, parameter in list(layer._parameters.items()):
        if parameter is not None and name != "bias":
            del layer._parameters[name]
            layer.register_buffer(name, parameter.detach())
