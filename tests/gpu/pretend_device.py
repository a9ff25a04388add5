"""A pretend accelerator for machines without one: a second device of torch, made of CPU tensors.

A tensor on it wraps a CPU tensor, and every operator runs on what is inside, in real numbers. Tensors
on two devices and CPU generators are refused, as by a GPU. Copies are counted, and synchronizations,
by which the host waits for the device (`item`, `nonzero`, a boolean index, `equal`, a blocking copy),
and memory. Kernels are the CPU's: they round as these do and know every dtype. Autocast casts nothing.

The device cannot be removed from a process, and autograd makes its threads at the first backward
pass, for the devices known then: it needs a process of its own (`test_pretend_device.py`).
"""

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

OWN_PROCESS = "QWLORA_PRETEND_DEVICE"  # set in the process that has the device
NAME, CPU = "pretend", torch.device("cpu")
CROSSES_DEVICES = {"aten::_to_copy", "aten::copy_"}
SYNCHRONIZES = {
    *("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount"),
}
INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
FACTORIES = ("empty", "empty_strided", "arange", "linspace", "eye", "randperm", "triu_indices")


COUNTS = SimpleNamespace(limit=None, allocated=0)  # limit and size in bytes


def reset_counts() -> None:
    COUNTS.to_device = COUNTS.to_host = COUNTS.synchronizations = 0
    COUNTS.peak = COUNTS.allocated


class _Allocation:
    """A storage on the device, while a tensor uses it."""

    def __init__(self, size: int):
        self.size = 0
        if COUNTS.limit is not None and COUNTS.allocated + size > COUNTS.limit:
            raise torch.OutOfMemoryError(f"{NAME} out of memory. Tried to allocate {size} bytes")
        self.size = size
        COUNTS.allocated += size
        COUNTS.peak = max(COUNTS.peak, COUNTS.allocated)

    def __del__(self) -> None:
        COUNTS.allocated -= self.size


_APPLY = torch.nn.Module._apply
_ALLOCATIONS = weakref.WeakValueDictionary[int, _Allocation]()


class PretendTensor(torch.Tensor):
    """A tensor on the device; `raw` is the CPU tensor with its values."""

    raw: torch.Tensor
    allocation: _Allocation
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(op, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        copied, is_parameter = self.detach().clone(), isinstance(self, torch.nn.Parameter)
        return torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.raw, self.allocation = new.raw, new.allocation  # type: ignore[attr-defined]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()  # its address tells shared tensors apart

    def data_ptr(self) -> int:
        return self.raw.data_ptr()


def _wrap(raw: torch.Tensor) -> PretendTensor:
    with torch.inference_mode(False):  # where wrappers cannot be indexed
        tensor: PretendTensor = torch.Tensor._make_wrapper_subclass(
            PretendTensor,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
    storage = raw.untyped_storage()
    if (allocation := _ALLOCATIONS.get(storage.data_ptr())) is None:
        _ALLOCATIONS[storage.data_ptr()] = allocation = _Allocation(storage.nbytes())
    tensor.raw, tensor.allocation = raw, allocation
    return tensor


def _run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operator on the tensors inside."""
    name = op._schema.name
    COUNTS.synchronizations += name in SYNCHRONIZES
    device = kwargs.get("device")
    here, others = dict[int, PretendTensor](), list[torch.Tensor]()
    inside = [_unwrapped(value, here, others) for value in args]
    options = {key: _unwrapped(value, here, others) for key, value in kwargs.items()}
    if name in CROSSES_DEVICES:
        _count_copy(name, args, kwargs)
    elif name in INDEXES:  # numbers may be on the CPU; booleans must be counted first
        COUNTS.to_device += len(others)
        indices = [index for index in inside[1] if index is not None]
        is_fill = name != "aten::index" and inside[2].numel() == 1  # a masked_fill
        is_counted = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        COUNTS.synchronizations += is_counted and not is_fill
    elif kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    elif any(tensor.ndim for tensor in others):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and {others[0].device}! ({name})"
        )
    result = op(*inside, **options)
    if torch.Tag.inplace_view in op.tags:  # another shape, for the wrapper as well
        with no_dispatch():
            torch._C._set_meta_in_tls_dispatch_include(True)
            op(*args, **kwargs)
            torch._C._set_meta_in_tls_dispatch_include(False)
    if op._schema.is_mutable:
        for tensor in here.values():
            if tensor.shape != tensor.raw.shape:
                raise NotImplementedError(f"{name} changes the shape of a tensor in place")
    if name == "aten::copy_" and type(args[0]) is not PretendTensor:
        return args[0]
    if device is not None and torch.device(device).type != NAME:
        return result
    return _wrapped(result, here)


def _unwrapped(value: Any, here: dict[int, PretendTensor], others: list[torch.Tensor]) -> Any:
    kind = type(value)
    if kind is PretendTensor:
        here[id(value.raw)] = value
        return value.raw
    if kind is list or kind is tuple:
        return kind(_unwrapped(item, here, others) for item in value)
    if isinstance(value, torch.Tensor):
        others.append(value)
    return CPU if kind is torch.device and value.type == NAME else value


def _wrapped(value: Any, here: dict[int, PretendTensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return here[id(value)] if id(value) in here else _wrap(value)
    is_several = type(value) in (list, tuple)
    return type(value)(_wrapped(item, here) for item in value) if is_several else value


def _count_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    *_, source = (type(tensor) is PretendTensor for tensor in args[: 1 + (name == "aten::copy_")])
    into = type(args[0]) is PretendTensor
    if kwargs.get("device") is not None:
        into = torch.device(kwargs["device"]).type == NAME
    COUNTS.to_device += into and not source
    COUNTS.to_host += source and not into
    COUNTS.synchronizations += source and not into and not kwargs.get("non_blocking")


MODULE = SimpleNamespace(  # what torch asks of the module of a device, `torch.pretend`
    is_available=lambda: True,
    is_initialized=lambda: True,
    device_count=lambda: 1,
    _is_in_bad_fork=lambda: False,
    current_device=lambda: 0,
    set_device=lambda device: None,
    synchronize=lambda device=None: None,
    empty_cache=lambda: None,
    manual_seed_all=lambda seed: None,
    get_rng_state=lambda device=None: torch.get_rng_state(),
    set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    max_memory_allocated=lambda device=None: COUNTS.peak,
    reset_peak_memory_stats=lambda device=None: reset_counts(),
)


@functools.cache
def _register() -> torch.library.Library:
    _setup_privateuseone_for_python_backend(NAME, MODULE)
    library = torch.library.Library("aten", "IMPL")

    def factory(op: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _wrap(op(*args, **{**kwargs, "device": "cpu", "pin_memory": False}))

    for name in FACTORIES:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if "device" in {a.name for a in op._schema.arguments}:
                library.impl(op, functools.partial(factory, op), "PrivateUse1")

    def copy_from(source: Any, into: Any, non_blocking: bool = False) -> torch.Tensor:
        return _run(torch.ops.aten.copy_.default, (into, source), {})

    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """The device, with `COUNTS` at zero."""
    _register()
    reset_counts()
    # torch looks for an allocator written in C++, which a device in Python does not have.
    cache = mock.patch.object(torch.accelerator, "empty_cache", MODULE.empty_cache)
    with mock.patch.object(torch.nn.Module, "_apply", _apply_and_keep_ties), cache:
        yield torch.device(NAME, 0)
    COUNTS.limit = None


def _apply_and_keep_ties(module: torch.nn.Module, *args: Any) -> torch.nn.Module:
    """`module.to`, which makes new parameters for this device, where those of a GPU stay the same."""
    places = dict[int, list[tuple[dict[str, Any], str]]]()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            places.setdefault(id(parameter), []).append((part._parameters, name))
    _APPLY(module, *args)
    for (first, name), *others in places.values():
        for parameters, other in others:
            parameters[other] = first[name]
    return module
