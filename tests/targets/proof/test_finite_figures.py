"""A runtime that computes NaN, infinity or far too large logits fails its proof, and says so."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences
from qwlora.errors import ExportError, MissingExtraError
from qwlora.graph.quantized_graph import Interface
from qwlora.grid.encoding import sqnr_db
from qwlora.system import strict_json
from qwlora.targets.npu import qnn
from qwlora.targets.proof.checks import LIMITS, Parity, only_finite, verdict
from qwlora.targets.proof.compare import compare_cache, compare_outputs
from qwlora.targets.proof.prove import fitting, proven, results_of
from qwlora.targets.proof.readme import proof_table
from qwlora.targets.proof.reference import Reference, compare_first, logits_of, make_reference
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import Rounding
from targets.proof.toy_runtime import TableRuntime
from targets.proofs import measure_logits, verify_weights

TOKENS = VOCABULARY = 24
IDS = torch.arange(TOKENS)[None]  # each token once, so that a row of logits is of one place
LOGITS = torch.randn(1, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(8))
LABELS = IDS.clone()
LABELS[:, :8] = IGNORED
TEXT = Sequences(IDS, LABELS)
REFERENCE = make_reference({"adapter": lambda ids: LOGITS}, TEXT, {"adapter": lambda ids: LOGITS})


def damaged(value: float, token: int, entry: int = 0) -> Tensor:
    """The right logits, with one value at one token; tokens 0 to 6 predict no loss token."""
    logits = LOGITS.clone()
    logits[0, token, entry] = value
    return logits


NOT_IN_THE_LOSS, IN_THE_LOSS = 2, 12
UNLIKELY = int(LOGITS[0, NOT_IN_THE_LOSS].argmin())
LARGE = "a wrong scale"
BROKEN = {
    "NaN": damaged(math.nan, IN_THE_LOSS),
    "NaN at a token that is not in the loss": damaged(math.nan, NOT_IN_THE_LOSS),
    "infinity": damaged(math.inf, IN_THE_LOSS),
    "minus infinity at an unlikely token": damaged(-math.inf, NOT_IN_THE_LOSS, UNLIKELY),
    LARGE: 1e5 * LOGITS.flip(1),
}


class Model:
    """A trained model that says LOGITS, in the parts of PeftModel that a proof uses."""

    def __init__(self) -> None:
        self.logits = LOGITS

    def disable_adapter(self) -> Any:
        return nullcontext()

    def __call__(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.logits[:, : input_ids.shape[1]])


class Runtime(TableRuntime):
    """A runtime with chosen logits, also of tokens that follow others in a cache."""

    def __init__(self, logits: Tensor, shipped: Tensor | None = None):
        super().__init__({"": logits[0]})
        self.shipped = None if shipped is None else Runtime(shipped)

    def run(self, tensors: Any) -> dict[str, Tensor]:
        return {"logits": self.logits(IDS)}

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.logits(ids), {}


def weights_parity(logits: Tensor, shipped: Tensor | None = None) -> Parity:
    return verify_weights(Runtime(logits, shipped), Model(), Path(), TEXT)


def outputs_parity(logits: Tensor) -> Parity:
    shapes = {"input_ids": ("batch", "tokens"), "logits": ("batch", "tokens", VOCABULARY)}
    interface = Interface(("input_ids",), ("logits",), "logits", shapes)
    graph, outputs = SimpleNamespace(interface=interface, marks=[]), {"logits": LOGITS}
    of_batch = dict.fromkeys(("outputs", "perturbed_outputs"), lambda batch: outputs)
    simulation: Reference = SimpleNamespace(  # type: ignore[assignment]
        graph=lambda: graph, values=lambda batch: {}, bind=lambda batch: batch, **of_batch
    )
    runtime: Any = Runtime(logits)
    return compare_outputs(simulation, [{"input_ids": IDS}], runtime)


def graphs_parity(logits: Tensor) -> Parity:
    return measure_logits(lambda ids: logits, REFERENCE)


def test_an_sqnr_of_values_that_are_not_finite_is_nan() -> None:
    assert math.isnan(sqnr_db(1.0, math.inf))
    assert math.isnan(sqnr_db(math.nan, 1.0))
    assert sqnr_db(1e-300, 1e300) == -math.inf


@pytest.mark.parametrize("compare", [weights_parity, outputs_parity, graphs_parity])
@pytest.mark.parametrize("name", BROKEN)
def test_logits_that_are_not_finite_fail_every_proof(compare: Any, name: str) -> None:
    parity = compare(BROKEN[name])
    if name == LARGE and compare is not outputs_parity:
        assert any("perplexity" in p and ": not finite" in p for p in parity.problems)
    assert any("not finite" in problem for problem in parity.problems) or name == LARGE
    assert parity.problems
    strict_json.dumps(only_finite(parity.figures) | verdict(parity.checks))
    assert not compare(LOGITS).problems


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_cache_that_gives_no_numbers_fails(value: float) -> None:
    runtime: Any = Runtime(damaged(value, TOKENS - 1))
    first, *_ = compare_cache(runtime, REFERENCE, None, []).problems
    assert first.startswith("largest logit of 16 tokens, one by one with the cache: not finite")


@contextmanager
def overflow(model: Model) -> Iterator[None]:
    """A runtime's rounding of activations that breaks a model."""
    model.logits = BROKEN["NaN"]
    yield
    model.logits = LOGITS


def test_a_model_that_the_rounding_breaks_limits_nothing() -> None:
    model = Model()
    rounding = Rounding([partial(overflow, model)])
    problems = verify_weights(Runtime(LOGITS), model, Path(), TEXT, rounding).problems
    assert any("limit: at most not finite" in problem for problem in problems)


def record_of(logits: Tensor, shipped: Tensor | None = None) -> tuple[dict[str, Any], str]:
    """The record of a proof, and its table in a README."""
    model: Any = Model()
    parity, reference = weights_parity(logits, shipped), make_reference(logits_of(model), TEXT)
    record = proven(TARGETS["hf"], parity, reference, LIMITS)
    strict_json.dumps(record)
    return record, "\n".join(proof_table({"first": record}))


@pytest.mark.parametrize("name", BROKEN)
def test_a_proof_shows_what_is_not_finite_and_checks_nothing_as_shipped(name: str) -> None:
    record, table = record_of(BROKEN[name])
    what = "perplexity" if name == LARGE else "largest logit"
    assert any(f"{what} with the adapter: not finite" in each for each in record["problems"])
    assert not any("switched off" in problem for problem in record["problems"])
    assert (", not finite |" if name == LARGE else "| not finite |") in table
    record, table = record_of(LOGITS, BROKEN[name])
    assert record["passed"], record["problems"]
    assert "not finite" in table


def test_results_have_figures_as_shipped_next_to_exact_ones() -> None:
    record, _ = record_of(LOGITS, 1.5 * LOGITS)
    found = results_of(TARGETS["hf"], record, has_proof=True)
    own = record["figures"]["shipped"]["adapter"]
    for key in ("perplexity", "top1_agreement", "kl_divergence", "max_log_prob_difference"):
        assert found[f"shipped_{key}"] == own[key]
    assert found["shipped_kl_divergence"] > 100 * found["kl_divergence"]


RANDOM = torch.Generator().manual_seed(7)
PAIR = torch.randint(0, 16, (2, 12), generator=RANDOM)
ANSWERS = torch.randn(1, 12, 16, generator=RANDOM)
SAYS = {"adapter": lambda ids: ANSWERS}
SAID = make_reference(SAYS, Sequences(PAIR[:1], PAIR[:1]), SAYS)
PLACED = {"partitions": 2, "cpu_nodes": 3, "cpu_names": ["a", "b", "c"]}


def replace_qnn(monkeypatch: pytest.MonkeyPatch, model: type) -> Callable[[Any], Parity]:
    """The comparison of a qnn bundle with a reference, which runs `model` without files and
    emulator."""
    parity, files = qnn.QnnModel.parity, SimpleNamespace(folder=Path(), adapter=Path("first"))
    for name, fake in (("QnnModel", model), ("_devices", list)):
        monkeypatch.setattr(qnn, name, fake)
    return lambda reference: parity(files, partial(compare_first, reference), LIMITS)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_qnn_bundle_is_compared_on_cpu_and_htp(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        def __init__(self, *arguments: Any, htp: bool, **options: Any):
            self.logits = lambda ids, steps: ANSWERS + 0.1 * htp * ANSWERS.flip(1)

        def placement(self) -> dict[str, dict[str, Any]]:
            return {"prefill": {"partitions": 1, "cpu_nodes": 0}, "decode": PLACED}

    compare = replace_qnn(monkeypatch, Model)
    if not is_installed:
        absent = mock.Mock(side_effect=MissingExtraError("qwlora[qnn]"))
        monkeypatch.setattr(qnn, "_devices", absent)
    parity = compare(SAID)
    problems = parity.problems
    if not is_installed:
        assert problems == []
        assert parity.figures["not_run"] == "qwlora[qnn]"
        return
    assert parity.figures["exact"]["adapter"] == parity.figures["htp"] != parity.figures["cpu"]
    assert any("on the HTP" in problem for problem in problems)
    assert "partitions of graph decode on the HTP: 2 (limit: at most 1)" in problems
    assert "nodes of graph decode on the CPU (of a, b, c): 3 (limit: at most 0)" in problems
    assert not any("prefill" in problem for problem in problems)


@pytest.mark.parametrize(
    ("prompt", "rows", "counted"),
    [((4, 10), [0], 4), ((9, 10), [0, 1], 14)],
    ids=["one answer fits", "no answer fits"],
)
def test_masked_tokens_do_not_count_where_the_context_cuts_a_sequence(
    prompt: tuple[int, int], rows: list[int], counted: int, tmp_path: Path
) -> None:
    labels = PAIR.clone()
    for row, tokens in enumerate(prompt):
        labels[row, :tokens] = IGNORED
    graphs = {"prompt": {"tokens": 4, "context": 6}, "token": {"tokens": 1, "context": 8}}
    (tmp_path / "graphs.json").write_text(json.dumps({"graphs": graphs}))
    text = fitting(Sequences(PAIR, labels), TARGETS["qairt"].parts(tmp_path, "first"))
    assert torch.equal(text.input_ids, PAIR[rows, :8])
    assert int((text.labels[:, 1:] != IGNORED).sum()) == counted


def test_profiles_of_a_runtime_that_fails_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    class Model:
        def __init__(self, *_: Any, htp: bool, profiles: Path | None = None):
            if profiles is not None:
                assert profiles.is_dir()
                folders.append(profiles)
            self.htp = htp

        def logits(self, ids: torch.Tensor, steps: int) -> torch.Tensor:
            if self.htp:
                raise ExportError("the HTP refuses the graph")
            return ANSWERS

    compare = replace_qnn(monkeypatch, Model)
    with pytest.raises(ExportError, match="the HTP refuses"):
        compare(SAID)
    (folder,) = folders
    assert not folder.exists()


def test_a_compiler_that_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compiled(*arguments: object) -> None:
        (tmp_path / "device" / "prefill_ctx.onnx").touch()

    version = SimpleNamespace(__version__="1")
    fakes = {"_devices": list, "open_graph": compiled, "require": lambda *names: version}
    for name, fake in fakes.items():
        monkeypatch.setattr(qnn, name, fake)
    assert "onnxruntime-qnn" in qnn.compile_graphs(tmp_path, ["prefill"])
    assert "exit 139" in (tmp_path / "device" / "README.md").read_text()
    shutil.rmtree(tmp_path / "device")
    with pytest.raises(ExportError, match=r"decode.onnx.*wrote no device/decode_ctx.onnx"):
        qnn.compile_graphs(tmp_path, ["prefill", "decode"])
