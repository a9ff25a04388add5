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
    """Import `module`, or raise MissingExtraError, which names the extra that contains it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is needed {purpose} and is not installed: pip install 'qwlora[{extra}]'"
        ) from error


def node_package(package: str) -> tuple[Path, str]:
    """The folder and the version of an npm package, NAME@RANGE, where node is installed, too."""
    name = package.rpartition("@")[0]
    # Not in the current folder, which may be a downloaded one, whose code must not run.
    roots = (*os.environ.get("NODE_PATH", "").split(os.pathsep), *_global_packages())
    for folder in (Path(root, name) for root in roots if root):
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
    # npm reads the .npmrc of its current folder, which must not be a stranger's.
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=os.sep, check=False)
    return tuple(process.stdout.split("\n")[:1])
