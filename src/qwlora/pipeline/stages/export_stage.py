"""Stages `export/TARGET/NAME`, step 4: write the files for a runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from qwlora.export.onnx_bundle import export_onnx

    name = str(stage.adapter)
    metadata = {"qwlora.base_fingerprint": context.base_fingerprint, "qwlora.adapter": name}
    export_onnx(context.simulation(name).graph(), scratch, metadata)
    shutil.copytree(context.path / "simulation" / name / ADAPTER, scratch / ADAPTER)
    return {
        "export": {
            "onnx": {name: {"bytes": sum(p.stat().st_size for p in scratch.glob("model.onnx*"))}}
        }
    }
