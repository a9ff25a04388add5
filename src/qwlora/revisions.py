"""Revisions of algorithms. A module whose results are stored states its own, next to its code:

    REVISION = 2  # 2: what changed

and raises it when the same inputs give other results. Stage keys contain the revisions of the
modules that a stage runs, so results of an older revision are computed again.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files


@cache
def revision(module: str) -> int:
    """`REVISION` of a module of this package, such as "quantize.gptq".

    Read from the module's source: stage keys are made before torch is imported.

    Raises:
        LookupError: the module states none.
    """
    source = files("qwlora").joinpath(*module.split(".")[:-1], f"{module.split('.')[-1]}.py")
    found = re.search(r"^REVISION = (\d+)\b", source.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise LookupError(f"qwlora.{module} states no REVISION")
    return int(found[1])


def later_revisions(modules: tuple[str, ...]) -> list[tuple[str, int]]:
    """Name and revision of the modules beyond revision 1. The first revision is not part of any
    key, so results stored before a module had one stay valid."""
    return [(module, n) for module in modules if (n := revision(module)) > 1]
