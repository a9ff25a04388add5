"""The sections of the report, in their order. A section costs one module here and one template."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from qwlora.report.report_section import ReportSection


def sections() -> list[ReportSection]:
    """The `view` of every module in this folder, by position."""
    modules = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
    return sorted((module.view for module in modules), key=lambda view: view.position)
