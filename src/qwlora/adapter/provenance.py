"""An adapter on disk: a plain PEFT directory, plus `qwlora.json` that says which base it was trained on.

PEFT alone loads it (`PeftModel.from_pretrained`) and ignores the extra file; `load_adapter` reads it first and refuses another base.
"""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from qwlora.errors import FingerprintError, SourceError
from qwlora.grid.fingerprint import fingerprint

FORMAT = 1
FILE = "qwlora.json"


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapters of `model` into `folder`, as PEFT does, with the fingerprint of the base under them."""
    folder = Path(folder)
    for old in folder.rglob(FILE):
        old.unlink()  # never an old statement beside new weights
    model.save_pretrained(str(folder))
    record = {"format": FORMAT, "base_fingerprint": fingerprint(model)}
    for config in folder.rglob("adapter_config.json"):  # PEFT gives each named adapter a folder of its own
        (config.parent / FILE).write_text(json.dumps(record, indent=1) + "\n")


def load_adapter(model: PreTrainedModel, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Attach the adapter in `folder` to the base `model`.

    Raises:
        SourceError: the folder holds no adapter, or none that says which base it belongs to.
        FingerprintError: it was trained on another base.
    """
    folder = Path(folder)
    check_adapter(folder, fingerprint(model))
    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)


def check_adapter(folder: Path, base_fingerprint: str) -> None:
    """Refuse the adapter in `folder` unless it belongs to the base with this fingerprint."""
    try:
        record = json.loads((folder / FILE).read_text())
        found = record["base_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"adapter {str(folder)!r} does not say which base it belongs to: {FILE} cannot be read ({error}). Save it with qwlora.save_adapter"
        ) from error
    if found != base_fingerprint:
        raise FingerprintError(
            f"adapter {str(folder)!r} was trained on the base with fingerprint {found}, but this base has {base_fingerprint}. "
            "Load it onto its own base, or train it again on this one"
        )
