"""Every tensor of every exported base is the base's: codes and floats, also those that changed after
loading, as tuning changes them. A new target needs a row in `READERS`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from conftest import byte_tokenizer
from qwlora import LayerRule, Scheme, Schemes, export, quantize_, simulate, simulate_adapters
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.nn import packed_weights
from qwlora.simulation.kv_cache_graph import cache_sizes
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase, ExportedGraph
from qwlora.targets.weights.weights_folder import float_tensors
from simulation.tiny_architectures import DECODER, with_large_weights
from targets.client_programs import with_clients

Values = list[np.ndarray]
IDS = torch.randint(3, 250, (1, 16), generator=torch.Generator().manual_seed(2))


def checkpoint(folder: Path) -> Values:
    """Of a file or folder that this package reads."""
    file, encodings = folder / "base.gguf", folder / "model.encodings"
    path, more = (file, None) if file.exists() else (folder, encodings)
    model = load_precomputed(open_checkpoint(path, more if more and more.exists() else None))
    return expected(model)


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
            yield ((codes.astype(np.float32) - 8) * scale.reshape(*codes.shape[:2], 1)).reshape(
                options["N"], -1
            )[:, : options["K"]]


# What reads the base that a target writes; None: only its runtime does, which is compared in logits.
READERS: dict[str, Callable[[Path], Values] | None] = {
    **dict.fromkeys(("hf", "mlx", "gguf", "qairt_pipeline"), checkpoint),
    **dict.fromkeys(("onnx", "onnx_each", "aimet", "qairt", "qnn", "genai", "web"), graphs),
    **dict.fromkeys(("openvino", "executorch"), None),
}


HTP = Schemes(
    quantize_residual_adds=True,
    symmetric_matmul_second_input=True,
    key_value_bitwidth=8,
    adapter_weights=Scheme(8),
)
# For the HTP, and which share of a tensor's range its floats may be off: half a step of 16 bits.
TABLE, STEP = [LayerRule("*embed_tokens", Scheme(8))], 2.0**-16


def base(scheme: str = "w4-block32", rules: Sequence[LayerRule] = ()) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(**DECODER | {"num_hidden_layers": 1}, tie_word_embeddings=False)
    model: Any = with_large_weights(Qwen2ForCausalLM(config))
    quantize_(model, scheme, "search", rules=rules)
    change_floats_(model)
    return model


def change_floats_(model: Any) -> None:
    """Norms, biases, embedding and head."""
    with torch.no_grad():
        for tensor in float_tensors(model).values():
            tensor.add_(torch.randn_like(tensor) / 8)


def expected(model: Any) -> Values:
    weights = [layer.tensor.dequantize() for layer in packed_weights(model).values()]
    return [t.detach().float().numpy() for t in (*weights, *float_tensors(model).values())]


def write(name: str, model: Any, folder: Path, source: Path | None = None) -> None:
    target = TARGETS[name]
    if not target.is_simulated:
        target.backend.write_base(ExportedBase(model, byte_tokenizer(), source), folder)
        return
    batch = {"input_ids": IDS.repeat(2, 1), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
    if name == "qnn":  # the HTP has no floats
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), "first").eval()
        adapters = simulate_adapters(adapted, batch, HTP, "none")
        adapters.calibrate([batch])
        export(adapters, name, folder, graphs=[8, 1], context=[32])
        return
    simulation = simulate(model, batch, Schemes(policy="weights-only"))
    simulation.calibrate([batch])
    sizes = cache_sizes([8, 1], [32]) if target.cached_graphs else ()
    exported = ExportedGraph(simulation, {}, {n: t[:1] for n, t in batch.items()}, graphs=sizes)
    if target.has_cases:
        target.backend.write_cases(exported, {"none": exported}, folder)
    elif target.has_base:
        target.backend.write_base(exported, folder)
    else:
        target.backend.write_adapter(exported, folder, folder)


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


def test_every_target_has_a_row() -> None:
    assert READERS.keys() == TARGETS.keys()


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
    read, of_htp = READERS[name], name == "qnn"
    assert read is not None
    model = base("w4-channel", TABLE) if of_htp else base()
    tensors = expected(model)
    write(name, model, tmp_path / name if of_htp else tmp_path)
    assert_holds(read(tmp_path), tensors, STEP if of_htp else 0.0)


def test_every_tensor_of_a_base_from_gguf_is_the_bases(tmp_path: Path) -> None:
    write("gguf", base(), tmp_path)
    source = (tmp_path / "base.gguf").rename(tmp_path / "source.gguf")
    model = load_precomputed(open_checkpoint(source))
    change_floats_(model)
    write("gguf", model, tmp_path, source)
    assert_holds(checkpoint(tmp_path), expected(model))
