"""Stages `export/TARGET/NAME`, step 4: write the files for a runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.export.target import TARGETS
from qwlora.pipeline.artifacts import ADAPTER
from qwlora.pipeline.stage import PlanBuilder, Stage

if TYPE_CHECKING:
    from qwlora.pipeline.context import JobContext


NAME = "export"


def add(plan: PlanBuilder, target: str, name: str) -> None:
    """Add the stage of one target and adapter."""
    stage = f"{NAME}/{target}/{name}"
    plan.add(stage, [], (f"calibrate/{name}",), name, stage)


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Write the files, and next to them the adapter as it was calibrated."""
    _, name, *_ = stage.name.split("/")
    target, adapter = TARGETS[name], str(stage.adapter)
    metadata = {"qwlora.base_fingerprint": context.base_fingerprint, "qwlora.adapter": adapter}
    target.write(context.simulation(adapter).graph(), scratch, metadata)
    size = sum(path.stat().st_size for path in scratch.glob(target.model_files))
    shutil.copytree(context.path / "simulation" / adapter / ADAPTER, scratch / ADAPTER)
    return {"export": {name: {adapter: {"bytes": size}}}}
