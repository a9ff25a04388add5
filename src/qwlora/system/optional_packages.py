"""Optional packages, imported when needed; a missing one is named with its extra."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

from qwlora.errors import MissingExtraError


def require(module: str, extra: str, purpose: str = "here") -> ModuleType:
    """Import `module`, which is needed for `purpose`.

    Raises:
        MissingExtraError: it is not installed; the message names the extra that contains it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is needed {purpose} and is not installed: pip install 'qwlora[{extra}]'"
        ) from error


def node_package(package: str) -> tuple[Path, str]:
    """The folder and the version of an npm package, NAME@RANGE, where node is installed, too.

    Looked for in folders of NODE_PATH and where `npm install --global` installs: not in the current
    folder, which may be a downloaded one, whose code must not run.

    Raises:
        MissingExtraError: there is none, or no node.
    """
    name = package.rpartition("@")[0]
    known = (*os.environ.get("NODE_PATH", "").split(os.pathsep), *_global_packages())
    for folder in (Path(place, name) for place in known if place):
        if shutil.which("node") and (folder / "package.json").is_file():
            return folder, str(json.loads((folder / "package.json").read_text())["version"])
    raise MissingExtraError(
        f"{package} is needed to run the files and is not installed: install Node.js 20 or newer "
        f"and `npm install --global {package}`"
    )


@cache
def _global_packages() -> tuple[str, ...]:
    if (npm := shutil.which("npm")) is None:
        return ()
    command = [npm, "root", "--global"]
    # npm reads settings in its current folder, which must not be ours
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=os.sep, check=False)
    return tuple(found.stdout.split("\n")[:1])
