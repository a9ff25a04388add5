"""Target `executorch`: the graph that XNNPACK gets, its rounding, the program in ExecuTorch, and the
process that runs it, with a library that does what a test wants."""

import gc
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import tiny_model
from qwlora import quantize_
from qwlora.data.sequences import as_sequences
from qwlora.errors import ExportError
from qwlora.grid.scheme import Bf16Block, PerBlock, PerChannel, Scheme, parse_scheme, short_name
from qwlora.nn import packed_weights
from qwlora.quantize.gptq import solve_gptq
from qwlora.quantize.layer_rules import LayerRule
from qwlora.quantize.scale_search import search_scale
from qwlora.targets.adapter_branches import adapter_inputs, zero_adapter
from qwlora.targets.canonical_adapter import CanonicalAdapter, read_canonical
from qwlora.targets.proof.reference import logits_of
from qwlora.targets.registry import TARGETS
from qwlora.targets.weights import executorch, executorch_program
from qwlora.targets.weights.executorch import RANK, ExecutorchRuntime
from qwlora.targets.weights.executorch_program import ADAPTER, MODEL, NO_ADAPTER
from targets.proofs import verify_weights
from targets.weights.bundles import write_adapter, write_base
from targets.weights.test_weights_targets import adapters, target

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(3))
W8 = Scheme(8, True, PerChannel())
SOME = [LayerRule(match=name, scheme=W8) for name in ("*.mlp.*", "*embed_tokens")]


def base() -> Any:
    """Blocks, channels, a packed embedding and the head on its codes."""
    model: Any = tiny_model("llama", layers=1)
    with torch.no_grad():  # else values of integers and norms of 1 are on ties of the rounding
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.8, 1.2)
    quantize_(model, "w4-bf16block32", "search", rules=SOME)
    return model


@torch.no_grad()
def test_the_program_computes_base_and_adapters_with_a_cache(tmp_path: Path) -> None:
    model = base()
    program, sizes = executorch.switchable_program(model, 16)
    assert sizes["lm_head.lora_B"] == (None, 260)  # a tied head has its own place
    adapted, run = adapters(model, tmp_path), program.module()
    for adapter in (None, "first", "second", None):
        inputs = zero_adapter(sizes, rank=1)
        if adapter is not None:
            adapted.set_adapter(adapter)
            inputs = adapter_inputs(read_canonical(tmp_path / adapter).factors, inputs)
        factors = [torch.from_numpy(inputs[name]) for name in sizes]
        cache, parts = [torch.zeros(1, 2, 0, 16)] * 2, list[Tensor]()
        for part in IDS[:1].split([9, 1, 6], dim=1):
            past, new = cache[0].shape[2], part.shape[1]
            mask, positions = torch.ones(1, past + new).long(), torch.arange(past, past + new)
            logits, *cache = run(part, mask, positions[None], *cache, *factors)
            parts.append(logits)
        logits_by_state = logits_of(adapted, target("executorch").rounding(adapted))
        expected = logits_by_state["adapter" if adapter else "base"](IDS[:1])
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=2e-3)


def test_rounding_is_that_of_torchs_operators_and_is_undone() -> None:
    model, seen = base(), list[Tensor]()
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    x[0, 0], x[1, 1], x[2, 2, 3] = 0, x[1, 1].abs(), -20
    exact = layer(x)
    with target("executorch").rounding(model):
        watching = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        layer(x)
        watching.remove()
    ops: Any = torch.ops.quantized_decomposed
    numbers = (*ops.choose_qparams_per_token_asymmetric(x, torch.int8), -128, 127, torch.int8)
    codes = ops.quantize_per_token(x, *numbers)
    torch.testing.assert_close(seen[0], ops.dequantize_per_token(codes, *numbers, torch.float32))
    assert torch.equal(layer(x), exact)


@pytest.mark.parametrize("bits", [2, 4])
def test_solvers_choose_scales_that_are_bfloat16(bits: int) -> None:
    scheme = parse_scheme(f"w{bits}-bf16block32")
    assert scheme == Scheme(bits, granularity=Bf16Block(32)) == Scheme.from_json(scheme.to_json())
    assert short_name(scheme) == f"w{bits}-bf16block32"
    generator = torch.Generator().manual_seed(0)
    x, inputs = (torch.randn(rows, 128, generator=generator) for rows in (16, 512))
    moment, errors = inputs.T @ inputs / 512, list[float]()
    for grid in (scheme, Scheme(bits, granularity=PerBlock(32))):
        searched, solved = search_scale(x, grid), solve_gptq(x, grid, moment)[0]
        for scale in (searched.scale, solved.encoding.scale):
            assert torch.equal(scale, scale.bfloat16().float()) == (grid == scheme)
        for values in (searched.fake_quantize(x), solved.dequantize()):
            errors.append(float(((x - values) @ moment * (x - values)).sum()))
    assert errors[0] < 1.02 * errors[2]
    assert errors[1] < 1.02 * errors[3]


def test_a_rank_beyond_the_programs_is_refused(tmp_path: Path) -> None:
    adapter = CanonicalAdapter({"up_proj": (torch.zeros(RANK + 1, 8), torch.zeros(8, 1))}, None)
    with pytest.raises(ExportError, match=f"rank {RANK + 1}.* up to {RANK}"):
        target("executorch").write_adapter(adapter, tmp_path, tmp_path)


@pytest.mark.client
def test_a_wrong_code_fails_the_proof(tmp_path: Path) -> None:
    folder, model = tmp_path / "bundle", base()
    folder.mkdir()
    write_base(target("executorch"), model, folder)
    adapted = adapters(model, folder / "trained")
    for name in ("first", "second"):
        write_adapter(target("executorch"), folder, name)
    program = (folder / "base" / MODEL).read_bytes()
    layer = packed_weights(adapted)["model.layers.0.mlp.down_proj.weight"]
    codes = (layer.codes.to(torch.int16) - 128).to(torch.int8).numpy().tobytes()
    assert program.count(codes) == 1
    wrong = bytes([codes[0] ^ 64]) + codes[1:]  # the first code, by a quarter of its grid
    for content, is_right in ((program, True), (program.replace(codes, wrong), False)):
        copy = Path(shutil.copytree(folder, tmp_path / str(is_right)))
        (copy / "base" / MODEL).write_bytes(content)
        adapted.set_adapter("second")
        runtime = target("executorch").open(copy / "base", "base")
        rounding = target("executorch").rounding(adapted)
        found = verify_weights(runtime, adapted, copy / "second", as_sequences(IDS), rounding)
        assert (found.problems == []) == is_right
        assert found.figures["exact"]["off_is_equal"]
    file = copy / "first" / ADAPTER
    save_file({name: torch.zeros(3, 3) for name in load_file(file)}, file)
    with pytest.raises(ExportError, match="ExecuTorch cannot run the program"):
        TARGETS["executorch"].open(copy, "first").logits(IDS[:1])
    (copy / "base" / MODEL).write_bytes(b"no program")
    with pytest.raises(ExportError, match="ExecuTorch cannot load"):
        TARGETS["executorch"].open(copy)


# Logits are ids times the adapter's factor plus the number of past tokens. Id 9 ends the process by
# the signal in the program, id 8 raises, id 7 sleeps.
LIBRARY = """
import os, time, torch
from types import SimpleNamespace as Of
SIZES = [(1, 4), (1, 12), (1, 4), (1, 1, 8, 2)]
class Method:
    def __init__(self, number):
        self.number = number
        inputs = [Of(sizes=lambda s=s: s) for s in SIZES]
        self.metadata = Of(num_inputs=lambda: 5, input_tensor_meta=lambda i: inputs[i])
    def execute(self, inputs):
        ids, mask, positions, cache, factor = inputs
        if 9 in ids: os.kill(os.getpid(), self.number)
        if 8 in ids: raise RuntimeError("error 0x12")
        if 7 in ids: time.sleep(60)
        longer = torch.cat([cache, torch.zeros(1, 1, ids.shape[1], 2)], 2)
        assert mask.shape[1] == longer.shape[2] and positions[0, 0] == cache.shape[2]
        return ids.float()[..., None] * factor + cache.shape[2], longer
class Runtime:
    @staticmethod
    def get(): return Runtime()
    def load_program(self, file):
        return Of(load_method=lambda name: Method(int(open(file).read())))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library = tmp_path / "library" / "executorch"
    library.mkdir(parents=True)
    (library / "runtime.py").write_text(LIBRARY)
    (library / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "library")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the current folder ran')")
    (tmp_path / MODEL).write_text(str(int(signal.SIGSEGV)))
    save_file({"m.lora_A": torch.ones(1)}, tmp_path / NO_ADAPTER)
    (tmp_path / "first").mkdir()
    save_file({"m.lora_A": torch.full((1,), 3.0)}, tmp_path / "first" / ADAPTER)
    return tmp_path


def test_caches_are_kept_by_their_owners(folder: Path) -> None:
    runtime, ids = ExecutorchRuntime(folder), torch.tensor([[1, 2, 3, 4, 5]])
    for adapter, factor in ((None, 1), (folder / "first", 3), (None, 1)):
        runtime.use(adapter)
        logits, cache = runtime.extend(ids, {})
        past = torch.tensor([0.0, 0, 0, 0, 4])  # calls of at most 4 tokens
        assert torch.equal(logits[0, :, 0], ids[0] * factor + past)
        for _ in range(2):  # the same cache twice
            again = runtime.extend(ids[:, :1], cache)[0]
            assert again.item() == factor + 5
        del cache
    gc.collect()
    assert {*runtime._dropped} == {7, 9}  # earlier ones were dropped there by now
    assert runtime.process_bytes > 2**20
    with pytest.raises(ExportError, match="holds 8 past tokens"):
        runtime.extend(torch.ones(1, 13, dtype=torch.int64), {})
    with pytest.raises(ExportError, match=r"cannot run the program.*0x12"):
        runtime.logits(torch.tensor([[8]]))
    assert runtime.logits(ids[:, :1]).item() == 1  # it goes on
    number = runtime._process.pid
    del runtime
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_is_an_error_that_names_the_file(number: int, folder: Path) -> None:
    (folder / MODEL).write_text(str(int(number)))
    runtime = ExecutorchRuntime(folder)
    for ids in ([[9]], [[1]]):  # and later calls
        with pytest.raises(ExportError, match=rf"{MODEL}'.*exit code -{int(number)};"):
            runtime.logits(torch.tensor(ids))


def test_an_interrupted_call_does_not_answer_the_next_one(folder: Path) -> None:
    runtime, before = ExecutorchRuntime(folder), signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            runtime.logits(torch.tensor([[7]]))
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ExportError, match=rf"{MODEL}'.*exit code -9"):
        runtime.logits(torch.tensor([[1]]))


def test_what_hangs_or_is_no_program_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = ExecutorchRuntime(folder)
    monkeypatch.setattr(executorch_program, "_SECONDS", 0.2)
    with pytest.raises(ExportError, match=rf"{MODEL}'.*exit code -9"):
        runtime.logits(torch.tensor([[7]]))
    monkeypatch.undo()
    monkeypatch.syspath_prepend(folder / "library")
    (folder / MODEL).write_text("no program")
    with pytest.raises(ExportError, match=rf"cannot load.*{MODEL}"):
        ExecutorchRuntime(folder)
