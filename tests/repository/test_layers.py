"""Imports between the files of the package: no circles, and always from a higher level to a lower.
Every import counts, also inside functions and under TYPE_CHECKING. And no attribute of our own types
is looked up by name: `isinstance` on an imported type instead."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

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
    assert len(graph) > 150
    assert {"grid.scheme", "nn.packed_layer"} <= {n for targets in graph.values() for n in targets}
    TopologicalSorter(graph).prepare()  # raises CycleError
    assert upward(graph) == []
    places = {n: STEPS.index(n.split(".")[1]) for n in graph if "pipeline." in n}
    assert not [(a, b) for a in places for b in graph[a] if places.get(b, 0) > places[a]]


# Attributes of other libraries, which `getattr` and `hasattr` may name.
FOREIGN = """
    CSafeDumper __constants__ __func__ __name__ __notes__ _fields _hf_peft_config_loaded _name_or_path _schema activation_checkpointing
    active_adapters backend_tokenizer base_layer config config_class default_config_fields dim disable_adapters distributed_config eos_token_id errno
    final_logit_softcapping format_message generation_config get_base_model get_input_embeddings groups head_dim hf_device_map is_encoder_decoder
    is_transposed keys layer_types layers lm_head_multiplier logit_scale logits logits_scaling malloc_trim max_memory_allocated max_norm
    max_position_embeddings num_attention_heads num_embeddings num_hidden_layers num_key_value_heads offset output_router_logits pad_token_id
    peft_config quantization_config quantization_method register_quantization_config register_to_config rope_parameters sanitize save_config
    save_pretrained scaling sched_getaffinity setitimer sliding_window strerror to_dict values vocab_size
    """


def looked_up(code: str) -> Iterator[str]:
    """The constant names given to `getattr` and `hasattr`."""
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr")
            and isinstance(node.args[1], ast.Constant)
        ):
            yield node.args[1].value


def test_only_attributes_of_other_libraries_are_looked_up_by_name() -> None:
    found = {(p.name, name) for p in PACKAGE.rglob("*.py") for name in looked_up(p.read_text())}
    assert len(found) > 40
    assert [(file, name) for file, name in found if name not in FOREIGN.split()] == []
