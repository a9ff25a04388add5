"""A target in one file: the metadata of a simulation as text. Its runtime refuses every file."""

from pathlib import Path

from qwlora.errors import ExportError
from qwlora.targets.target import Backend, ExportedGraph, Layout, Runtime, Target

TARGET = Target(  # the line of the registry
    backend_class="targets.toy_target:Text",
    extra="all",
    packages=("json",),
    layout=Layout.EACH,
    is_simulated=True,
    activation_bitwidths=(8,),
    has_proof=False,
    model_files="*.txt",
)


class Text(Backend):
    """Text."""

    def write_adapter(self, exported: ExportedGraph, base: Path, folder: Path) -> None:
        graph, adapter = exported.simulation.graph(), exported.metadata["qwlora.adapter"]
        (folder / "model.txt").write_text(f"{graph} {adapter} {exported.sample}")
        (folder / "notes.md").write_text("not part of the model")

    def open(self, folder: Path, case: str) -> Runtime:
        raise ExportError(f"opened {folder}")
