"""Imports between the files of the package: no circles, and always from a higher level to a lower.

Every import counts, also inside functions and under TYPE_CHECKING.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "qwlora"
# Folders and files directly below the package. A file imports from its own folder or lower levels.
LEVELS = (
    {"errors"},
    {"system"},
    {"grid"},
    {"nn"},
    {"graph"},
    {"formats"},
    {"data"},
    {"adapter", "quantize"},
    {"simulation"},
    {"analysis", "targets"},
    {"recipe"},
    {"report"},
    {"pipeline"},
    {"cli"},
    {"hf", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Folders and files of the pipeline, lowest first.
STEPS = (
    *("store", "sources", "stage", "stages", "plan", "job"),
    *("results", "preflight", "forecast", "run", "commands"),
)


def import_graph(package: Path) -> dict[str, set[str]]:
    """The modules of the package that each module imports, by name without `qwlora.`."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = path
    del modules["__init__"]  # loads public names on demand
    return {
        name: {target for target in imported(path, modules) if target != name}
        for name, path in modules.items()
    }


def imported(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            candidates = [[f"{node.module}.{alias.name}", node.module] for alias in node.names]
        elif isinstance(node, ast.Import):
            candidates = [[alias.name] for alias in node.names]
        else:
            continue
        for names in candidates:
            found = [name.removeprefix("qwlora.") for name in names if name.startswith("qwlora.")]
            yield from [name for name in found if name in modules][:1]


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Circles of imports; one edge of each is ignored afterwards, to find the next."""
    graph = {name: set(targets) for name, targets in graph.items()}
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]  # first and last are the same; each is imported by the next
            found.append(set(circle))
            graph[circle[1]].discard(circle[0])
        else:
            return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a module on the same level, in another folder, or a higher one."""
    rooms = {name: name.partition(".")[0] for name in graph}
    return [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in sorted(targets)
        if rooms[name] != rooms[target] and LEVEL[rooms[target]] >= LEVEL[rooms[name]]
    ]


def test_imports_point_down_and_in_no_circle() -> None:
    graph = import_graph(PACKAGE)
    assert circles(graph) == upward(graph) == []
    places = {n: STEPS.index(n.split(".")[1]) for n in graph if "pipeline." in n}
    assert not [(a, b) for a in places for b in graph[a] if places.get(b, 0) > places[a]]


def planted(folder: Path, files: dict[str, str]) -> dict[str, set[str]]:
    known = {"__init__.py": "", "grid/scheme.py": "", "nn/__init__.py": "", "adapter/train.py": ""}
    known |= {"targets/verify.py": "", "pipeline/__init__.py": "", "errors.py": ""}
    for name, text in {**known, **files}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return import_graph(folder)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("grid/bad.py", "from qwlora.nn import PackedLinear"),
        ("simulation/bad.py", "import qwlora.targets.verify"),
        ("targets/bad.py", "from qwlora import pipeline"),
        ("nn/bad.py", "def f():\n    import qwlora.adapter.train"),
        ("nn/bad.py", "if TYPE_CHECKING:\n    from qwlora.adapter.train import train"),
    ],
)
def test_a_planted_upward_import_is_found(tmp_path: Path, file: str, text: str) -> None:
    assert len(upward(planted(tmp_path, {file: text}))) == 1


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    files = {"nn/a.py": "def f():\n    from qwlora.nn import b", "nn/c.py": "import qwlora.nn.a"}
    graph = planted(tmp_path, {"nn/b.py": "from qwlora.nn import c", **files})
    assert circles(graph) == [{"nn.a", "nn.b", "nn.c"}]
    assert upward(graph) == []


def test_names_that_are_loaded_later_are_listed() -> None:
    import qwlora

    assert {*qwlora.__all__, "__version__"} <= set(dir(qwlora))
