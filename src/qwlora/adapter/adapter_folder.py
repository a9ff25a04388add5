"""An adapter on disk: a PEFT directory, plus `qwlora.json`: the fingerprint of its base, whether it
is mergeable (`mergeable.py`), and digests of its files (`manifest.py`).

PEFT alone can load it, and ignores the extra file. `load_adapter` refuses another base, and an
adapter without that file unless the caller accepts an unknown base.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwlora.adapter.adapter_files import (
    CONFIG,
    FILE,
    WEIGHTS,
    check_adapter,
    check_settings,
    mergeable_record,
    read_config,
    weights_of,
)
from qwlora.adapter.mergeable import is_mergeable, mergeable_, remainders_digest
from qwlora.errors import FingerprintError, SourceError, foreign_as, listed
from qwlora.formats import manifest
from qwlora.nn.fingerprint import changed_since, fingerprint_of, remember_base_, tensor_digests
from qwlora.nn.frozen import assert_frozen
from qwlora.nn.packed_layer import packed_layers, packed_weights, unwrapped
from qwlora.nn.temporary import structure
from qwlora.system.atomic import replacing_files

FORMAT = 1


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base_fingerprint: str | None = None,
    adapter: str | None = None,
) -> None:
    """Write the adapters of `model` into `folder`, as PEFT does, with the fingerprint of its base.

    Args:
        model: a `PeftModel`, or a model after `peft.inject_adapter_in_model`.
        base_fingerprint: fingerprint of the base, if known. Default: computed.
        adapter: the adapter to write, directly into `folder`. Default: all; as in PEFT, each
            adapter except `default` gets a subfolder.

    Raises:
        SourceError: the model has no such adapter, or it has a setting that is not supported.
        GridError: a packed layer does not compute its codes, see `assert_frozen`.
        FingerprintError: a float tensor or a setting of the base changed since it was quantized or
            loaded, so the adapter would fit no saved base.
    """
    folder = Path(folder)
    model = unwrapped(model)
    configs: dict[str, Any] | None = getattr(model, "peft_config", None)
    if not configs:
        raise SourceError(
            f"{type(model).__name__} has no adapter to save; attach one with peft.get_peft_model"
        )
    if adapter is not None and adapter not in configs:
        raise SourceError(
            f"{type(model).__name__} has no adapter {adapter!r}; it has {', '.join(configs)}"
        )
    check_settings(configs if adapter is None else {adapter: configs[adapter]})
    if packed_layers(model):  # a LoRA on floats is saved too, for comparisons
        assert_frozen(model)
    if base_fingerprint is None:
        digests = tensor_digests(model)
        if moved := changed_since(model, digests):
            raise FingerprintError(
                f"{len(moved)} float tensors or settings of the base changed since it was "
                f"quantized or loaded: {listed(moved)}. An adapter fits only the base that it was "
                "trained on. If the optimizer changed them, pass it only parameters with "
                "requires_grad and train again on a fresh base. If the change is intended, save "
                "this base first (qwlora.save_base)"
            )
        base_fingerprint = fingerprint_of(digests, model)
    record = {"format": FORMAT, "base_fingerprint": base_fingerprint}
    with replacing_files(folder, last=FILE) as scratch:
        for name, written in write_adapter(model, scratch, adapter=adapter).items():
            digest = {"remainders": remainders_digest(model, name)}
            stated = {"mergeable": digest} if is_mergeable(model, [name]) else {}
            manifest.write(written, FILE, record | stated, (CONFIG, WEIGHTS))


def write_adapter(
    model: nn.Module, folder: Path, state: dict[str, Any] | None = None, adapter: str | None = None
) -> dict[str, Path]:
    """Write the files of PEFT's `save_pretrained`, without a README, also for a model that adapters
    were injected into; returns the folder of each adapter. A single `adapter` is written into
    `folder` itself. `state`: the model's weights (default: read from the model)."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    configs: dict[str, Any] = cast(Any, model).peft_config
    folders = {
        name: folder if adapter or name == "default" else folder / name
        for name in (configs if adapter is None else [adapter])
    }
    for name, target in folders.items():
        target.mkdir(parents=True, exist_ok=True)
        # Embeddings below an adapter are frozen and belong to the base. PEFT's default ("auto")
        # saves them with it, and asks the hub for the configuration of the base.
        weights = get_peft_model_state_dict(
            model, state, adapter_name=name, save_embedding_layers=False
        )
        prefix = "base_model.model." if base is model else ""
        tensors = {f"{prefix}{k}": t.clone().contiguous() for k, t in weights.items()}
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        config = copy.copy(configs[name])
        config.inference_mode = True
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
        # PEFT writes sets (target_modules) in arbitrary order; equal adapters are equal bytes.
        for key, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, key, sorted(value))
        auto = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        config.save_pretrained(str(target), auto_mapping_dict=None if config.task_type else auto)
    return folders


def load_adapter(
    model: PreTrainedModel | PeftModel,
    folder: str | Path,
    is_trainable: bool = False,
    unknown_base: str = "refuse",
    adapter_name: str = "default",
    weight: Callable[[str], Tensor] | None = None,
) -> PeftModel:
    """Attach the adapter in `folder` to the base `model`, or to a model with other adapters. On an
    error, `model` is unchanged.

    Args:
        model: the base, with or without adapters.
        is_trainable: whether the adapter's parameters require gradients.
        unknown_base: whether to `refuse` or `accept` an adapter that does not record its base, such
            as one that PEFT saved. `other`: also accept an adapter trained on another base.
        adapter_name: name of the adapter in the model. It becomes active if it is the only one.
        weight: float weights, for a mergeable adapter that was trained with them; see `mergeable_`.

    Returns:
        The PEFT model.

    Raises:
        SourceError: the folder has no adapter. Or the adapter does not record its base, is damaged,
            has an unsupported setting, or does not fit the model. Or its name is taken.
        FingerprintError: it was trained on another base, or a file changed after it was saved.

    Warns:
        UnverifiedWarning: its files have no digests: PEFT saved it.
    """
    if adapter_name in (getattr(model, "peft_config", None) or ()):
        raise SourceError(
            f"{type(model).__name__} already has an adapter called {adapter_name!r}. Pass another "
            "adapter_name, or call model.delete_adapter first"
        )
    folder, restore = Path(folder), structure(model)
    try:
        digests = tensor_digests(model)
        check_adapter(folder, fingerprint_of(digests, model), unknown_base)
        # `save_adapter` compares the base with what it is now.
        remember_base_(model, digests)
        return _attached(model, folder, is_trainable, adapter_name, weight)
    except BaseException:
        restore()
        raise


def check_loadable(
    model: PreTrainedModel, folders: Iterable[Path], unknown_base: str = "refuse"
) -> str:
    """Raise what `load_adapter` would raise for any of these adapters on the base `model`, which
    stays unchanged. Returns its fingerprint."""
    digests = tensor_digests(model)
    identity, restore = fingerprint_of(digests, model), structure(model)
    for folder in folders:
        check_adapter(folder, identity, unknown_base)
        try:
            _attached(model, folder, False, "default", None)
        finally:
            restore()
    return identity


def _attached(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    is_trainable: bool,
    adapter_name: str,
    weight: Callable[[str], Tensor] | None,
) -> PeftModel:
    packed = [name.removesuffix(".weight") for name in packed_weights(model)]
    refuse_saved(folder, packed, f"adapter {str(folder)!r}")
    options: dict[str, Any] = {"adapter_name": adapter_name, "is_trainable": is_trainable}
    # Otherwise PEFT 0.21.2 reads to the first GPU (`infer_device`), wherever the model is.
    options["torch_device"] = "cpu"
    with reading(folder, model):
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), **options)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, str(folder), **options)
    check_fit(folder, adapted, adapter_name)
    if (record := mergeable_record(folder)) is not None:
        expected = record["remainders"]
        mergeable_(adapted, adapter_name, weight if expected else None)
        if remainders_digest(adapted, adapter_name) != expected:
            problem = "differ from these" if weight else "are needed"
            raise FingerprintError(
                f"adapter {str(folder)!r} is mergeable, and the original float weights of its base "
                f"{problem}. Pass them as weight=, or set mergeable: true in the recipe"
            )
    return adapted


def shapes_of(model: PeftModel, adapter_name: str = "default") -> dict[str, tuple[int, ...]]:
    """The shape of each weight of an adapter, by its name in a PEFT file."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_fit(folder: Path, adapted: PeftModel, adapter_name: str = "default") -> None:
    """Compare the names and shapes in the file with those of the adapter in the model."""
    # PEFT drops tensors that fit nowhere, and leaves factors without a tensor at their initial
    # values: the adapter would load in silence and compute something else.
    wanted = shapes_of(adapted, adapter_name)
    shapes = {name: tuple(shape) for name, shape, _ in weights_of(folder, read=False)}
    if wrong := [n for n in sorted({*wanted, *shapes}) if wanted.get(n) != shapes.get(n)]:
        needed, stored = (list(s[wrong[0]]) if wrong[0] in s else "none" for s in (wanted, shapes))
        model = type(adapted.get_base_model()).__name__
        raise SourceError(
            f"adapter {str(folder)!r} does not fit {model}: {len(wrong)} weights differ, for "
            f"example {wrong[0]}: the model needs {needed}, the file has {stored}. It was trained "
            "on other layers, or its target_modules changed. Train it again, or use its own base"
        )


def refuse_saved(folder: Path, packed: Iterable[str], label: str) -> None:
    """Refuse an adapter (`label`) that saves one of the layers at the paths `packed` as floats."""
    # PEFT's modules_to_save are ends of module paths, and include everything inside the module.
    names = read_config(folder).get("modules_to_save") or ()
    saved = [
        path
        for path in packed
        if any(part.endswith(tuple(names)) for part in accumulate(path.split("."), "{}.{}".format))
    ]
    if saved:
        rules = ", ".join(f"{{match: {path}, keep: float}}" for path in saved[:3])
        raise SourceError(
            f"{label} does not fit: its modules_to_save hold {listed(saved, 3)} as floats, but the "
            "base has integers there. Keep them float by base.rules, before the other rules: "
            f"{rules}; or use an adapter without modules_to_save"
        )


@contextmanager
def reading(folder: Path, model: nn.Module) -> Iterator[None]:
    """Turn any error of PEFT and safetensors while reading the adapter into a SourceError."""
    label = f"adapter {str(folder)!r}"
    # A wrong value in the configuration can fail anywhere in PEFT, with any class of error.
    with (
        foreign_as(SourceError, f"{label} does not fit {type(model).__name__}", "use its own base"),
        without_pattern_warnings(),
    ):
        yield


@contextmanager
def without_pattern_warnings() -> Iterator[None]:
    """Silence PEFT's warning about rank and alpha patterns without a match."""
    # PEFT 0.21.2 looks for matches among modules only, but applies patterns to target_parameters.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following .*_pattern keys did not match")
        yield
