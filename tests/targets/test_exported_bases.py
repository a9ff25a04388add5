"""Every tensor of every exported base is the base's: codes and floats, also those that changed after
loading, as tuning changes them. A new target needs a row in `READERS`. Float embeddings and heads
are stored in 16 bits where that is exact: the files compute the same bits as with float32."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import Qwen2Config, Qwen2ForCausalLM

from conftest import byte_tokenizer, tiny_model
from qwlora import LayerRule, Scheme, Schemes, export, quantize_, simulate_adapters
from qwlora.errors import RecipeError
from qwlora.nn import packed_weights
from qwlora.recipe import load_recipe
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase
from qwlora.targets.weights.weights_folder import float_tensors
from simulation.tiny_architectures import DECODER, with_large_weights
from targets.client_programs import with_clients
from targets.npu.test_npu_graph import SCHEMES as HTP
from targets.onnx.test_runtime_operators import in_onnx_runtime
from targets.weights.bundles import read_base

Values = list[np.ndarray]
IDS = torch.randint(3, 250, (1, 16), generator=torch.Generator().manual_seed(2))


def checkpoint(folder: Path) -> Values:
    """Of a file or folder that this package reads."""
    return expected(read_base(folder))


def graphs(folder: Path) -> Values:
    """Constants of all ONNX models, and what integers in them stand for."""
    found: Values = []
    for path in sorted(folder.rglob("*.onnx")):
        graph = onnx.load(str(path)).graph
        known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        known |= {
            node.output[0]: numpy_helper.to_array(node.attribute[0].t)
            for node in graph.node
            if node.op_type == "Constant" and node.attribute[0].name == "value"
        }
        found += [v.astype(np.float32) for v in known.values() if v.dtype.kind not in "iub"]
        found += integers(graph, known)
    embeddings = [*folder.rglob("*embed*.npy"), *folder.rglob("*embed*.bin")]
    return found + [np.load(path) for path in embeddings if path.suffix == ".npy"]


def integers(graph: Any, known: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Weights that the operators of a graph make of integers."""
    for node in graph.node:
        given = [known.get(name) for name in node.input]
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "DequantizeLinear" and given[0] is not None:
            codes, scale, zero = given[0].astype(np.float32), given[1], (*given, None)[2]
            zero = np.zeros_like(scale) if zero is None else zero.astype(np.float32)
            if scale.ndim:
                axis = options.get("axis", 1)
                size = options.get("block_size", 0)
                if scale.ndim == 1 and codes.ndim > 1:
                    shape = [-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)]
                    scale, zero = scale.reshape(shape), zero.reshape(shape)
                elif size:
                    scale, zero = (np.repeat(each, size, axis) for each in (scale, zero))
            yield (codes - zero) * scale
        elif node.op_type == "MatMulNBits":
            packed, scale = given[1], given[2]
            assert options["bits"] == 4
            codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
            values = (codes.astype(np.float32) - 8) * scale.reshape(*codes.shape[:2], 1)
            values = values.reshape(options["N"], -1)[:, : options["K"]]
            # Layers of the same input are one product, whose result is split.
            readers = [n for n in graph.node if n.input[:1] == node.output]
            counts = [known[n.input[1]] for n in readers if n.op_type == "Split"]
            yield from np.split(values, np.cumsum(counts[0])[:-1] if counts else [])


# What reads the base that a target writes; None: only its runtime does, which is compared in logits.
READERS: dict[str, Callable[[Path], Values] | None] = {
    **dict.fromkeys(("hf", "mlx", "gguf", "qairt_pipeline"), checkpoint),
    **dict.fromkeys(("onnx", "onnx_each", "aimet", "qairt", "qnn", "genai", "web"), graphs),
    **dict.fromkeys(("openvino", "executorch"), None),
}
# For the HTP, and which share of a tensor's range its floats may be off: half a step of 16 bits.
TABLE, STEP = [LayerRule("*embed_tokens", Scheme(8))], 2.0**-16


def base(scheme: str = "w4-block32", rules: Sequence[LayerRule] = ()) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(**DECODER | {"num_hidden_layers": 1}, tie_word_embeddings=False)
    model: Any = with_large_weights(Qwen2ForCausalLM(config))
    quantize_(model, scheme, "search", rules=rules)
    for tensor in float_tensors(model).values():  # norms, biases, embedding and head
        tensor.data.add_(torch.randn_like(tensor) / 8)
    return model


def expected(model: Any) -> Values:
    weights = [layer.tensor.dequantize() for layer in packed_weights(model).values()]
    return [t.detach().float().numpy() for t in (*weights, *float_tensors(model).values())]


def write(name: str, model: Any, folder: Path) -> None:
    target = TARGETS[name]
    if not target.is_simulated:
        target.backend.write_base(ExportedBase(model, byte_tokenizer()), folder)
        return
    batch = {"input_ids": IDS.repeat(2, 1), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), "first").eval()
    schemes = HTP if name == "qnn" else Schemes(policy="weights-only")  # the HTP has no floats
    made = simulate_adapters(adapted, batch, schemes, "none")
    made.calibrate([batch])
    sizes = {"graphs": [8, 1], "context": [32]} if target.cached_graphs else {}
    takes_all = name in ("onnx", "qairt", "qnn")
    exported: Any = made if takes_all else made["first"]
    export(exported, name, folder, sample={n: t[:1] for n, t in batch.items()}, **sizes)


def assert_holds(found: Values, tensors: Values, step: float = 0.0) -> None:
    for values in tensors:
        most = step * float(np.abs(values).max()) + 2**-20
        same = [
            other
            for each in found
            for other in (each, each.T)
            if other.shape == values.shape and np.allclose(other, values, 2**-20, most)
        ]
        assert same, f"no tensor has the values of one of the base's, {values.shape}"


@pytest.mark.parametrize("name", with_clients([name for name in READERS if READERS[name] is None]))
def test_a_runtime_computes_with_every_tensor(name: str, tmp_path: Path) -> None:
    model = base("w4-bf16block32")
    write(name, model, tmp_path)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    found = TARGETS[name].backend.open(tmp_path, "base").logits(IDS)
    limit = 2e-2 if name == "executorch" else 1e-4  # XNNPACK rounds activations
    assert float((found - logits).abs().max()) < limit * float(logits.abs().max())


@pytest.mark.parametrize("name", [name for name in READERS if READERS[name] is not None])
def test_every_tensor_is_the_bases(name: str, tmp_path: Path) -> None:
    assert READERS.keys() == TARGETS.keys()
    read, of_htp = READERS[name], name == "qnn"
    assert read is not None
    model = base("w4-channel", TABLE) if of_htp else base()
    tensors = expected(model)
    write(name, model, tmp_path / name if TARGETS[name].is_simulated else tmp_path)
    assert_holds(read(tmp_path), tensors, STEP if of_htp else 0.0)


BITS = (32, 16)
STORED = {"bfloat16": "BFLOAT16", "float16": "FLOAT16", "float32": "FLOAT"}


def with_floats(dtype: torch.dtype, architecture: str = "llama") -> Any:
    """A packed base whose embedding, and head, a checkpoint of `dtype` had: llama's is tied, qwen3
    has a head of its own."""
    model = tiny_model(architecture, layers=1)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[0, 0] = 2.0**-30 if dtype == torch.bfloat16 else 1.0  # no float16 has that
            layer.weight.copy_(layer.weight.to(dtype).float())
    quantize_(model, "w4-block32", "rtn")
    return model


def in_both(target: str, model: Any, folder: Path) -> list[Path]:
    folders = [folder / str(bits) for bits in BITS]
    for bits, part in zip(BITS, folders, strict=True):
        part.mkdir()
        TARGETS[target].backend.write_base(ExportedBase(model, None, None, bits), part)
    return folders


def stored_types(file: Path) -> dict[str, int]:
    tensors = onnx.load(file, load_external_data=False).graph.initializer
    return {t.name: t.data_type for t in tensors if list(t.dims) == [260, 64]}


@pytest.mark.parametrize(
    ("dtype", "architecture", "tables"),
    [
        ("bfloat16", "qwen3", 2),
        pytest.param("float16", "llama", 1, marks=pytest.mark.slow),
        pytest.param("float32", "llama", 1, marks=pytest.mark.slow),
    ],
)
def test_16_bits_give_equal_logits(
    dtype: str, architecture: str, tables: int, tmp_path: Path
) -> None:
    model = with_floats(getattr(torch, dtype), architecture)
    wide, narrow = (folder / "model.onnx" for folder in in_both("genai", model, tmp_path))
    assert torch.equal(*(in_onnx_runtime(file, IDS, first=16) for file in (wide, narrow)))
    assert [*stored_types(narrow).values()] == [getattr(onnx.TensorProto, STORED[dtype])] * tables
    assert [*stored_types(wide).values()] == [onnx.TensorProto.FLOAT] * tables


@pytest.mark.parametrize("name", with_clients(["genai", "openvino", "hf"]))
def test_16_bits_in_the_runtime(name: str, tmp_path: Path) -> None:
    wide, narrow = in_both(name, with_floats(torch.float16), tmp_path)
    opened = [TARGETS[name].backend.open(part, "base") for part in (wide, narrow)]
    assert torch.equal(*(runtime.logits(IDS) for runtime in opened))
    first, second = (runtime.decode(IDS, 8) for runtime in opened)
    assert first == second
    if name == "hf":
        with safe_open(narrow / "model.safetensors", "pt") as file:
            assert file.get_slice("model.embed_tokens.weight").get_dtype() == "F16"


@pytest.mark.parametrize(
    ("target", "bits", "held"), [("aimet", 16, "32"), ("mlx", 16, "8 or 32"), ("hf", 8, "16 or 32")]
)
def test_bits_that_a_target_lacks_are_refused(
    recipe_for: Any, target: str, bits: int, held: str
) -> None:
    changes = (f"export.targets=[{target}]", "simulation.residual_adds=quantize")
    path = recipe_for()
    load_recipe(path, changes)
    problem = rf"{target}: export\.embedding_bits: .* {held} bits only"
    with pytest.raises(RecipeError, match=problem):
        load_recipe(path, (*changes, f"export.embedding_bits={bits}"))
