"""Damage to the files in an exported folder, for tests that it is noticed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return edit


def swap(first: str, second: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / first).rename(folder / "kept")
        (folder / second).rename(folder / first)
        (folder / "kept").rename(folder / second)

    return edit
