"""Forwards that were set on a module instead of on its class.

Such a forward (accelerate's `dispatch_model` and `device_map`, `module.compile()`, any patch) is
usually bound to the module that it was set on. A packed layer is a new module, so a copy of that
forward would keep computing the old module's float weights.

accelerate's hooks are set again on the new module. Anything else is refused: whether it reads the
new module's weight cannot be known.
"""

from __future__ import annotations

import types
from typing import Any

from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from torch import nn

_HOOK, _HOOKED_FORWARD = "_hf_hook", "_old_forward"
_CALLS = ("forward", "_call_impl", "_slow_forward", "_compiled_call_impl")


def instance_forward_problem(module: nn.Module) -> str | None:
    """Why a new module cannot replace `module`: it has a forward of its own. None if it can."""
    own = instance_calls(module)
    if not own:
        hook = accelerate_hook(module)
        return None if hook is None else _offload_problem(hook)
    if "_compiled_call_impl" in own:
        return "was compiled by module.compile(); quantize first, then compile"
    return (
        f"has a {own[0]!r} that was set on the instance and would keep computing the float weight. "
        f"Delete it (`del layer.{own[0]}`) before quantizing, and set it again on the packed layer"
    )


def instance_calls(module: nn.Module) -> list[str]:
    """Attributes of the instance that change what a call of `module` computes; accelerate's hook
    around the class's own forward is none."""
    hooked = ("forward",) if accelerate_hook(module) is not None else ()
    return [n for n in _CALLS if n not in hooked and module.__dict__.get(n) is not None]


def accelerate_hook(module: nn.Module) -> ModelHook | None:
    """The accelerate hook around the class's own forward of `module`; None without one, or if the
    hook surrounds another forward."""
    hook, inner = (module.__dict__.get(key) for key in (_HOOK, _HOOKED_FORWARD))
    if not isinstance(hook, ModelHook) or not isinstance(inner, types.MethodType):
        return None
    is_own = inner.__self__ is module and inner.__func__ is type(module).forward
    return hook if is_own else None


def state_without_hook(module: nn.Module) -> dict[str, Any]:
    """A copy of the attributes of `module` for a new module, without accelerate's forward."""
    hooked = (_HOOK, _HOOKED_FORWARD, "forward") if accelerate_hook(module) is not None else ()
    return {
        key: value.copy() if isinstance(value, dict) else value
        for key, value in module.__dict__.items()
        if key not in hooked
    }


def move_hook_(source: nn.Module, target: nn.Module) -> None:
    """Set the accelerate hook of `source`, if it has one, on `target`."""
    hook = accelerate_hook(source)
    if hook is not None:
        add_hook_to_module(target, hook)


def _offload_problem(hook: ModelHook) -> str | None:
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    if any(isinstance(each, AlignDevicesHook) and each.offload for each in hooks):
        return (
            "is offloaded by accelerate, so its weight is not in memory. Load the model without "
            "offloading, or quantize it from its folder (`qwlora run`, `open_checkpoint`)"
        )
    return None
