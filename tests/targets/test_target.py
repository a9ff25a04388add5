"""The registry of export targets, and the stages and checks that use it.

`toy_target.py` is all that a new target costs, if it has no proof and no lines for READMEs.
"""

import ast
import contextlib
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwlora.data.sequences import as_sequences
from qwlora.errors import ExportError, MissingExtraError
from qwlora.formats import manifest
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.stages import file_stages
from qwlora.pipeline.store import NAME
from qwlora.recipe.whole_recipe import Export, Verify
from qwlora.targets.proof.prove import Expected
from qwlora.targets.proof.readme import usage
from qwlora.targets.proof.reference import make_reference
from qwlora.targets.registry import TARGETS
from targets.toy_target import TARGET


@pytest.fixture
def text_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "text", TARGET)


@pytest.fixture
def context(tmp_path: Path) -> Any:
    (tmp_path / "simulation" / "first" / "adapter").mkdir(parents=True)
    ids = SimpleNamespace(shape=(1, 4))
    held_out = SimpleNamespace(first=lambda count: [], input_ids=ids)
    text = SimpleNamespace(data=SimpleNamespace(held_out=held_out))
    program = SimpleNamespace(graph=SimpleNamespace(nodes=[]))
    recipe = SimpleNamespace(
        verify=Verify(sequences=1),
        export=Export(proof="held_out"),
        simulation=SimpleNamespace(base_activations="all"),
        adapters=[],
    )

    def simulation(name: str) -> Any:
        return SimpleNamespace(graph=lambda: f"graph of {name}", program=program, marks=[])

    return SimpleNamespace(
        path=tmp_path,
        base_fingerprint="f",
        simulation=simulation,
        step=lambda words: contextlib.nullcontext(),
        sample=lambda name: f"sample of {name}",
        tokenizer=SimpleNamespace(save_pretrained=lambda folder: None),
        text=lambda name: text,
        recipe=recipe,
        track=None,
    )


@pytest.mark.usefixtures("text_target")
def test_the_export_stage_writes_through_its_target(context: Any, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    stage = Stage("export/text/first", "export/text/adapter", {}, adapter="first")
    results = file_stages.export(context, stage, scratch, tmp_path)
    written = (scratch / "model.txt").read_text()
    assert written == "graph of first first sample of first"
    assert results == {"export": {"text": {NAME: {"bytes": len(written)}}}}
    assert (scratch / "adapter").is_dir()
    assert not manifest.changed_files(scratch, "qwlora.json")
    (scratch / "notes.md").unlink()
    assert manifest.changed_files(scratch, "qwlora.json") == ["notes.md (missing)"]


@pytest.mark.filterwarnings("ignore:.*is unverified")
@pytest.mark.usefixtures("text_target")
def test_the_file_stages_opens_the_files_with_the_target_in_its_name(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = as_sequences(torch.ones(1, 2, dtype=torch.int64))
    made = None, Expected([make_reference({"adapter": lambda ids: torch.zeros(1, 2, 4)}, text)])
    monkeypatch.setattr(file_stages, "_expected", lambda *arguments: made)
    monkeypatch.setattr(file_stages, "_held_out", lambda *arguments: text)
    with pytest.raises(ExportError, match=r"opened .*export.text.first"):
        file_stages.verify(
            context,
            Stage("verify/text/first", "verify/text/adapter", {}, adapter="first"),
            tmp_path,
            tmp_path,
        )


def test_a_recipe_takes_every_registered_target_and_no_other() -> None:
    assert Export(targets=list(TARGETS)).targets == list(TARGETS)
    with pytest.raises(ValueError, match=r"(?s)targets.*onnx"):
        Export(targets=["gguf2"])


def test_a_missing_package_names_the_extra_of_the_target(tmp_path: Path) -> None:
    missing = replace(TARGET, packages=("json", "not_there"))
    for act in (missing.require_packages, partial(missing.open, tmp_path, "first")):
        with pytest.raises(MissingExtraError, match=r"not_there.*qwlora\[all\]"):
            act()
    with pytest.raises(MissingExtraError, match="not_there"):
        replace(TARGET, writers=("not_there",)).require_packages(to_write=True)
    TARGET.require_packages(to_write=True)  # nothing is needed to write


def test_where_the_files_of_each_layout_are(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "first"
    assert TARGETS["hf"].parts(tmp_path, "first") == {"base": base, "adapter": adapter}
    assert TARGETS["hf"].parts(tmp_path, "base") == {"base": base}
    assert TARGETS["onnx_each"].parts(tmp_path, "first") == {"files": adapter}
    assert TARGETS["qnn"].parts(tmp_path, "first") == {"files": tmp_path}


def test_the_onnx_target_opens_its_files_in_onnx_runtime(tmp_path: Path) -> None:
    onnx = TARGETS["onnx"]
    with pytest.raises(ExportError, match=re.escape(str(tmp_path / "base" / "model.onnx"))):
        onnx.open(tmp_path)


def test_registry_recipe_and_usage_load_neither_torch_nor_onnx() -> None:
    """So that a run in which nothing changed, which writes the cards, ends at once."""
    program = (
        "import sys, qwlora.recipe, qwlora.targets.registry, qwlora.targets.proof.readme as u;"
        "assert all(u.usage(name, 'b', 'a') for name in qwlora.targets.registry.TARGETS);"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers', 'mlx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"[]\n"


def test_nothing_asks_which_class_a_target_or_its_backend_is() -> None:
    """Targets answer by data, so that a new one changes no other file."""
    asked = []
    for path in (Path(__file__).parents[2] / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                kinds = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                if kinds & {*CLASSES, "Target", "Backend", "Runtime"}:
                    asked.append(f"{path.name}:{node.lineno}")
    assert asked == []


CLASSES = {known.backend_class.partition(":")[2] for known in TARGETS.values()}


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("Qwen2VLForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
        ("GPT2LMHeadModel", "GPT2LMHeadModel"),
        ("OPTForCausalLM", "AutoModelForCausalLM"),
        ("", "AutoModelForCausalLM"),
        ("os; import x", "AutoModelForCausalLM"),
    ],
)
def test_transformers_opens_a_base_with_its_class(kind: str, shown: str) -> None:
    lines = usage("hf", "the/base", None, kind=kind)
    assert f"from transformers import {shown}, AutoTokenizer" in lines
    assert f'{shown}.from_pretrained("the/base", dtype="float32")' in lines


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_says_how_its_files_are_loaded(target: str) -> None:
    known = TARGETS[target]
    with_adapter = usage(target, "the/base", "the/adapter")
    alone = usage(target, "the/base", None)
    if not known.has_cases:  # where everything is in one folder
        assert "the/adapter" in with_adapter
    assert with_adapter.count("```") % 2 == alone.count("```") % 2 == 0
    if known.has_base or known.has_cases:
        assert "the/base" in with_adapter
        assert "the/base" in alone
    assert "the/adapter" not in alone
