"""Training on several processes with FSDP2, the packed base sharded.

`accelerate launch --use_fsdp --fsdp_version 2` makes the Trainer shard parameters, but not buffers:
those stay complete on every process. Codes, scales and offsets of packed layers are buffers, so
they become frozen parameters before sharding; FSDP2 gathers integers like any other dtype.

    base bytes per process = parameters of the base / processes + the model's own buffers

The model's own buffers are rotary tables and the like. After training everything is gathered, so
that the fingerprint and the adapter can be read on any process.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qwlora.adapter.mergeable import is_mergeable
from qwlora.errors import TrainingError
from qwlora.nn import PackedLayer
from qwlora.system.parameter_names import is_adapter_name


def enable_fsdp_(accelerator: Any) -> bool:
    """Whether the launcher asked for FSDP; on CPUs, switch it on."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    # accelerate supports FSDP on accelerators only. On CPUs it silently runs DDP, which copies the
    # model to every process (docs/log/training.md).
    if accelerator.state.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
    if accelerator.state.distributed_type != DistributedType.FSDP:
        raise TrainingError(
            "the launcher asks for FSDP, but accelerate does not shard processes of type "
            f"{accelerator.state.distributed_type.value}. Launch without FSDP"
        )
    return True


def prepare_sharding_(trainer: Any) -> None:
    """Turn buffers of packed layers into parameters, which FSDP2 shards; a no-op without FSDP."""
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    # Version 1 flattens parameters and cannot hold integers.
    if plugin.fsdp_version != 2:
        raise TrainingError("FSDP 1 cannot shard packed integers. Launch with --fsdp_version 2")
    if is_mergeable(trainer.model):
        raise TrainingError(
            "a mergeable adapter reads whole layers of the base, which FSDP shards. Launch without "
            "FSDP"
        )
    # Every process has loaded the base already; this would discard and send it again.
    plugin.cpu_ram_efficient_loading = False
    # FSDP2's policy would cast the scales, which are part of the base. Autocast does not.
    plugin.mixed_precision_policy = None
    for layer in trainer.model.modules():
        if isinstance(layer, PackedLayer):
            for name, tensor in list(layer._buffers.items()):
                # FSDP2 shards along the first axis, which the scale of a per-tensor grid lacks.
                if tensor is not None and tensor.ndim:
                    del layer._buffers[name]
                    layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def base_bytes(model: nn.Module) -> int:
    """Bytes of the base in this process: its shards, and whatever is not sharded."""
    tensors = [
        t
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if not is_adapter_name(name)
    ]
    return sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors)


def whole_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded adapter weights, on every process. All processes must call it."""
    adapter = {name: p.detach() for name, p in model.named_parameters() if is_adapter_name(name)}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in adapter.items()}


def gather_(trainer: Any) -> None:
    """Replace shards by complete plain tensors. All processes must call it, after training."""
    if not trainer.is_fsdp_enabled:
        return
    # FSDP2 leaves its root module unsharded after a forward.
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    gathered: dict[int, nn.Parameter] = {}  # by shard, so that tied parameters stay tied
    for module in trainer.model.modules():
        for name, shard in list(module._parameters.items()):
            if isinstance(shard, DTensor):
                if id(shard) not in gathered:
                    gathered[id(shard)] = nn.Parameter(
                        shard.full_tensor().detach(), requires_grad=shard.requires_grad
                    )
                module._parameters[name] = gathered[id(shard)]
        if isinstance(module, PackedLayer):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and name != "bias":
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach())
