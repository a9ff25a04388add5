"""The base as ONNX with a cache and switchable adapters, in ONNX Runtime and onnxruntime-genai."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qwlora.errors import ExportError
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme, SignedBlock
from qwlora.nn.packed_layer import packed_weights
from qwlora.targets.canonical_adapter import CanonicalAdapter
from qwlora.targets.onnx.genai import container_bits, operands
from qwlora.targets.proof.readme import usage
from qwlora.targets.refusals import Subject, Weight, refusals
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase
from targets.weights.bundles import write_adapter, write_base
from targets.weights.test_weights_targets import adapters, base, target

IDS = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(5))
SCHEMES = [
    *(
        Scheme(bits, symmetric, granularity)
        for bits in (2, 3, 4, 5, 8)
        for symmetric in (True, False)
        for granularity in (PerTensor(), PerChannel(), PerBlock(16), PerBlock(32), PerBlock(64))
    ),
    *(Scheme(bits, False, PerBlock(32), float_offset=True) for bits in (2, 4)),
    *(Scheme(bits, granularity=SignedBlock(32)) for bits in (2, 3, 4, 8)),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_matmul_nbits_multiplies_with_the_base_s_weights(scheme: Scheme) -> None:
    """ONNX Runtime's operator on the identity gives the weight."""
    assert not refusals(TARGETS["genai"], Subject(weights={"all": Weight(scheme)}))
    for name, layer in list(packed_weights(base(scheme)).items())[-3:]:
        arrays, block = operands(layer)
        rows, columns = layer.tensor.shape
        settings: dict[str, Any] = {"domain": "com.microsoft", "accuracy_level": 1}
        settings |= {"bits": container_bits(scheme.bitwidth), "block_size": block}
        settings |= {"K": columns, "N": rows}
        node = helper.make_node("MatMulNBits", ["x", *arrays], ["y"], **settings)
        kinds = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w])
            for n, w in (("x", columns), ("y", rows))
        ]
        held = [numpy_helper.from_array(array, part) for part, array in arrays.items()]
        graph = helper.make_graph([node], "g", kinds[:1], kinds[1:], held)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        (found,) = session.run(None, {"x": np.eye(columns, dtype=np.float32)})
        expected = layer.tensor.dequantize().numpy().T
        if scheme.float_offset:
            assert np.abs(found - expected).max() <= 3e-7 * np.abs(expected).max(), name
        else:
            assert np.array_equal(found, expected), name


def test_a_scheme_that_matmul_nbits_has_not_is_refused(tmp_path: Path) -> None:
    scheme, small = Scheme(8, False, PerBlock(32), float_offset=True), Scheme(4, True, PerBlock(8))
    for lacking in (scheme, small):
        assert refusals(TARGETS["genai"], Subject(weights={"all": Weight(lacking)}))
    with pytest.raises(ExportError, match=r"q_proj, .* and 4 more: .*MatMulNBits"):
        target("genai").write_base(ExportedBase(base(scheme), None), tmp_path)


def written(folder: Path, architecture: str = "llama") -> Any:
    """A base with two adapters, written; returns the model with both."""
    model = base(Scheme(4, False, PerBlock(32)), architecture)
    write_base(target("genai"), model, folder)
    adapted = adapters(model, folder / "trained")
    for name in ("first", "second"):
        write_adapter(target("genai"), folder, name)
    return adapted


def expected_logits(adapted: Any, name: str | None, ids: torch.Tensor) -> NDArray[np.float32]:
    with torch.no_grad():
        if name is None:
            with adapted.disable_adapter():
                return adapted(input_ids=ids).logits.numpy()
        adapted.set_adapter(name)
        return adapted(input_ids=ids).logits.numpy()


def test_one_session_of_onnx_runtime_has_all_adapters_and_none(tmp_path: Path) -> None:
    adapted = written(tmp_path)
    path = str(tmp_path / "base" / "model.onnx")
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count("MatMulNBits") == 7
    session = onnxruntime.InferenceSession(path)
    loaded = {}
    for name in ("first", "second"):
        loaded[name] = onnxruntime.LoraAdapter()
        loaded[name].Load(str(tmp_path / name / "adapter.onnx_adapter"))

    def run(name: str | None, with_: Any = session) -> NDArray[np.float32]:
        options = onnxruntime.RunOptions()
        if name is not None:
            options.add_active_adapter(loaded[name])
        ones, places = np.ones((1, 20), np.int64), np.arange(20)[None]
        feeds = {"input_ids": IDS.numpy(), "attention_mask": ones, "position_ids": places}
        for part in ("key", "value"):
            feeds[f"past_key_values.0.{part}"] = np.zeros((1, 2, 0, 16), np.float32)
        return with_.run(["logits"], feeds, options)[0]

    found = {}
    for name in ("first", None, "second", None, "first"):
        expected = expected_logits(adapted, name, IDS)
        logits = run(name)
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
        assert np.array_equal(found.setdefault(name, logits), logits)
        assert np.array_equal(run(name, onnxruntime.InferenceSession(path)), logits)
    assert not np.array_equal(found["first"], found["second"])
    unknown = CanonicalAdapter({"model.layers.9.mlp.up_proj": (torch.ones(2, 64),) * 2}, None)
    with pytest.raises(ExportError, match=r"no place .*model\.layers\.9\.mlp\.up_proj"):
        target("genai").write_adapter(unknown, tmp_path / "base", tmp_path / "first")


@pytest.mark.client
def test_the_readme_s_lines_run(tmp_path: Path) -> None:
    import contextlib

    written(tmp_path)
    lines = usage("genai", "base", "first")
    code = lines.partition("```python\n")[2].partition("```")[0]
    with contextlib.chdir(tmp_path):
        exec(code, {})
