"""A runtime that computes NaN, infinity or far too large logits fails its proof, and says so."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences
from qwlora.errors import ExportError, VerificationError
from qwlora.graph.quantized_graph import GraphValue, Interface, Kind
from qwlora.grid.encoding import sqnr_db
from qwlora.report.results_view import Job
from qwlora.report.verdict import proof_evidence
from qwlora.system import strict_json
from qwlora.targets.npu import qnn
from qwlora.targets.proof.checks import LIMITS, Parity, only_finite, verdict
from qwlora.targets.proof.compare import compare_cache, compare_layers, compare_outputs
from qwlora.targets.proof.prove import proven
from qwlora.targets.proof.readme import proof_table
from qwlora.targets.proof.reference import Reference, Rounding, logits_of, make_reference
from qwlora.targets.registry import TARGETS
from targets.proof.test_graph_parity import replace_qnn
from targets.proof.toy_runtime import TableRuntime
from targets.proofs import check_parity, measure_logits, verify_simulation, verify_weights

TOKENS = VOCABULARY = 24
IDS = torch.arange(TOKENS)[None]  # each token once, so that a row of logits is of one place
LOGITS = torch.randn(1, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(8))
LABELS = IDS.clone()
LABELS[:, :8] = IGNORED
TEXT = Sequences(IDS, LABELS)


def damaged(value: float, token: int, entry: int = 0) -> Tensor:
    """The right logits, with one value at one token; tokens 0 to 6 predict no loss token."""
    logits = LOGITS.clone()
    logits[0, token, entry] = value
    return logits


NOT_IN_THE_LOSS, IN_THE_LOSS = 2, 12
UNLIKELY = int(LOGITS[0, NOT_IN_THE_LOSS].argmin())
BROKEN = {
    "NaN": damaged(math.nan, IN_THE_LOSS),
    "NaN at a token that is not in the loss": damaged(math.nan, NOT_IN_THE_LOSS),
    "infinity": damaged(math.inf, IN_THE_LOSS),
    "minus infinity at an unlikely token": damaged(-math.inf, NOT_IN_THE_LOSS, UNLIKELY),
}
LARGE = 1e5 * LOGITS.flip(1)  # a wrong scale
every_broken = pytest.mark.parametrize("logits", BROKEN.values(), ids=BROKEN)


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


class Simulated:
    """A simulation that says LOGITS, and `perturbed` with other rounding."""

    def __init__(self, perturbed: Tensor = LOGITS):
        shapes = {"input_ids": ("batch", "tokens"), "logits": ("batch", "tokens", VOCABULARY)}
        interface = Interface(("input_ids",), ("logits",), "logits", shapes)
        self._graph = SimpleNamespace(interface=interface, marks=[])
        self.perturbed = perturbed

    def graph(self) -> Any:
        return self._graph

    def outputs(self, batch: Any) -> dict[str, Tensor]:
        return {"logits": LOGITS}

    def perturbed_outputs(self, batch: Any) -> dict[str, Tensor]:
        return {"logits": self.perturbed}

    def values(self, batch: Any) -> dict[str, Tensor]:
        return {}

    def bind(self, batch: Any) -> Any:
        return batch


def weights_parity(logits: Tensor, shipped: Tensor | None = None) -> Any:
    runtime: Any = Runtime(logits, shipped)
    model: Any = Model()
    return verify_weights(runtime, model, Path(), TEXT)


def language_parity(logits: Tensor) -> Any:
    runtime: Any = Runtime(logits)
    return verify_simulation(runtime, Simulated(), TEXT, TOKENS)


def outputs_parity(logits: Tensor, perturbed: Tensor = LOGITS) -> Any:
    runtime: Any = Runtime(logits)
    reference: Reference = Simulated(perturbed)
    return compare_outputs(reference, [{"input_ids": IDS}], runtime)


def graphs_parity(logits: Tensor) -> Parity:
    return measure_logits(lambda ids: logits, simulated_reference())


def simulated_reference() -> dict[str, Tensor]:
    logits = {"adapter": lambda ids: LOGITS}
    return make_reference(logits, TEXT, logits)


def cache_parity(logits: Tensor) -> Parity:
    runtime: Any = Runtime(logits)
    return compare_cache(runtime, simulated_reference(), None, [])


PROOFS = [weights_parity, language_parity, outputs_parity, graphs_parity]


def test_an_sqnr_of_values_that_are_not_finite_is_nan() -> None:
    assert math.isnan(sqnr_db(1.0, math.inf))
    assert math.isnan(sqnr_db(math.nan, 1.0))
    assert sqnr_db(1e-300, 1e300) == -math.inf


@every_broken
@pytest.mark.parametrize("compare", PROOFS)
def test_logits_that_are_not_finite_fail_every_proof(compare: Any, logits: Tensor) -> None:
    parity = compare(logits)
    with pytest.raises(VerificationError, match="not finite"):
        check_parity(parity, "it")
    strict_json.dumps(only_finite(parity.figures) | verdict(parity.checks))
    assert not compare(LOGITS).problems


@pytest.mark.parametrize("compare", [weights_parity, language_parity, graphs_parity])
def test_a_perplexity_that_overflows_fails_the_proof(compare: Any) -> None:
    parity = compare(LARGE)
    with pytest.raises(VerificationError, match=r"difference of perplexity.*: not finite"):
        check_parity(parity, "it")
    found = only_finite(parity.figures) | verdict(parity.checks)
    strict_json.dumps(found)
    found |= {"of": "trained", "sequences": 1, "tokens": TOKENS}
    results = {"recipe": "tiny", "parity": {"hf": {"first": found}}, "train": {"first": {}}}
    job = Job(results, {}, "", "tiny")
    said = [item.value for item in proof_evidence(job, "hf", "first")]
    assert "not finite" in said


def test_a_wrong_runtime_gives_one_sentence_everywhere() -> None:
    """Logits with noise, in every kind of proof: only where it was computed differs."""
    noise = torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(10))
    language, graphs, weights = (
        [problem.replace(" with the adapter", "") for problem in compare(LOGITS + noise).problems]
        for compare in (language_parity, graphs_parity, weights_parity)
    )
    assert language == graphs
    (said,) = (problem for problem in language if problem.startswith("difference of perplexity:"))
    assert weights.count(said) == 1
    for problems in (language, weights):  # whose limits differ
        assert any(problem.startswith("tokens with the same likeliest") for problem in problems)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_cache_that_gives_no_numbers_fails(value: float) -> None:
    parity = cache_parity(damaged(value, TOKENS - 1))
    first, *_ = parity.problems
    assert first.startswith("largest logit of 16 tokens, one by one with the cache: not finite")


@contextmanager
def overflow(model: Model) -> Iterator[None]:
    """A runtime's rounding of activations that breaks a model."""
    model.logits = BROKEN["NaN"]
    yield
    model.logits = LOGITS


def test_a_model_that_the_rounding_breaks_limits_nothing() -> None:
    model, runtime = cast(Any, Model()), cast(Any, Runtime(LOGITS))
    rounding = Rounding([partial(overflow, model)])
    problems = verify_weights(runtime, model, Path(), TEXT, rounding).problems
    assert any("limit: at most not finite" in problem for problem in problems)


def test_one_layer_that_computes_no_number_is_named() -> None:
    class Layers(Simulated):
        def graph(self) -> Any:
            marks = [GraphValue(name, name, Kind.ACTIVATION) for name in ("up", "down")]
            grid = SimpleNamespace(scale=torch.tensor(0.1))
            return SimpleNamespace(marks=marks, encodings={"up": grid, "down": grid})

        def values(self, batch: Any) -> dict[str, Tensor]:
            return {"up": torch.ones(4), "down": torch.ones(4)}

    computed = {"up": torch.ones(4), "down": torch.tensor([1.0, math.nan, 1.0, 1.0])}
    runtime: Any = SimpleNamespace(run_layers=lambda values, tensors: computed)
    (problem, *_) = compare_layers(runtime, Layers(), {}).problems
    assert "layer down, the worst of 2: not finite" in problem


def record_of(logits: Tensor, shipped: Tensor | None = None) -> tuple[dict[str, Any], str]:
    """The record of a proof, and its table in a README."""
    model: Any = Model()
    parity, reference = weights_parity(logits, shipped), make_reference(logits_of(model), TEXT)
    record = proven(TARGETS["hf"], parity, reference, LIMITS)
    strict_json.dumps(record)
    return record, "\n".join(proof_table({"first": record}))


@pytest.mark.parametrize("logits", [*BROKEN.values(), LARGE], ids=[*BROKEN, "a wrong scale"])
def test_a_proof_shows_what_is_not_finite_and_checks_nothing_as_shipped(logits: Tensor) -> None:
    record, table = record_of(logits)
    is_broken = logits is not LARGE
    what = "largest logit with the adapter" if is_broken else "perplexity with the adapter"
    assert any(f"{what}: not finite" in problem for problem in record["problems"])
    assert not any("switched off" in problem for problem in record["problems"])
    assert ("| not finite |" if is_broken else ", not finite |") in table
    record, table = record_of(LOGITS, logits)
    assert record["passed"], record["problems"]
    assert "not finite" in table


def test_profiles_of_a_runtime_that_fails_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    class Model:
        def __init__(self, *arguments: Any, htp: bool, profiles: Path | None = None):
            if profiles is not None:
                assert profiles.is_dir()
                folders.append(profiles)
            self.htp = htp

        def logits(self, ids: Tensor, steps: int) -> Tensor:
            if self.htp:
                raise ExportError("the HTP refuses the graph")
            return LOGITS

    compare = replace_qnn(monkeypatch, Model)
    with pytest.raises(ExportError, match="the HTP refuses"):
        compare(simulated_reference())
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
