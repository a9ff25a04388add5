"""Registers quantization method `qwlora` with transformers, without importing it.

transformers keeps quantization methods in a table of its module `quantizers.auto`, and has no entry
point for other packages. If that module is already imported, the method is registered at once.
Otherwise an import hook registers it as soon as the module is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register now if transformers' table is there, or else as soon as it is."""
    if TABLE in sys.modules:
        _register(sys.modules[TABLE])
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def _register(table: ModuleType) -> None:
    if not hasattr(table, "register_quantization_config"):
        return  # before transformers 4.50, below our range; importing it must still work
    importlib.import_module("qwlora.formats.hf_quantizer").register_in(table)


class _Hook(MetaPathFinder):
    """Finds only the module of the table, once, and registers after it was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
