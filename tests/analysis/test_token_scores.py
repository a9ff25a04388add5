"""KL divergence, token agreement and standard errors equal those of plain transformers."""

import math
from functools import reduce
from operator import getitem
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import tiny_model
from qwlora.analysis import token_scores
from qwlora.analysis.token_scores import clustered_error, logits_of, score_tokens
from qwlora.data.sequences import IGNORED, Sequences
from qwlora.errors import NonFiniteError
from qwlora.pipeline.run import run
from qwlora.pipeline.sources import Sources
from qwlora.pipeline.stages.job_context import JobContext
from qwlora.recipe import load_recipe
from qwlora.system.progress import untracked

IDS = torch.arange(40).view(4, 10) * 5


@torch.no_grad()
def independent(model: Any, float_model: Any, ids: Tensor) -> dict[str, float]:
    """The figures by their definitions, with float64 softmax over everything at once."""
    q = model(ids).logits[:, :-1].double().softmax(-1)
    p = float_model(ids).logits[:, :-1].double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    nll = [-x.gather(-1, ids[:, 1:, None])[..., 0].log() for x in (q, p)]
    by_sequence = kl.mean(1)  # sequences of equal length, so the mean over tokens is that of these
    return {
        "perplexity": math.exp(nll[0].mean()),
        "ratio": math.exp((nll[0] - nll[1]).mean()),
        "kl": float(kl.mean()),
        "kl_stderr": float(by_sequence.std() / len(ids) ** 0.5),
        "p999": float(torch.quantile(kl.flatten(), 0.999)),
        "top1": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }


def from_results(results: dict[str, Any], *stage: str) -> dict[str, float]:
    """The same figures in results.json."""
    keys = ("perplexity", "perplexity_ratio", "kl", "top1")
    at = {key: reduce(getitem, stage, results[key]) for key in keys}
    return {
        "perplexity": at["perplexity"],
        "ratio": at["perplexity_ratio"]["value"],
        "kl": at["kl"]["mean"],
        "kl_stderr": at["kl"]["stderr"],
        "p999": at["kl"]["p999"],
        "top1": at["top1"]["share"],
    }


def test_figures_of_a_job_agree_with_plain_transformers(recipe_for, tmp_path, checkpoints) -> None:
    """The figures of a job, and independent ones from the folders that it wrote."""
    float_model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).eval()
    job, out = load_recipe(recipe_for()), tmp_path / "out"
    results = run(job, out, ("quantize", "train", "evaluate"))
    # the float model against itself says nothing
    assert results["kl"].keys() == {"base", "adapted"}
    ids = JobContext(job, Sources(job), out, untracked).text(None).evaluation.input_ids
    base = AutoModelForCausalLM.from_pretrained(out / "base").eval()
    expected = {"base": independent(base, float_model, ids)}
    adapted = PeftModel.from_pretrained(base, out / "adapters" / "first").eval()
    expected["adapted"] = independent(adapted, float_model, ids)
    assert from_results(results, "base") == pytest.approx(expected["base"], rel=5e-5)
    assert from_results(results, "adapted", "first") == pytest.approx(expected["adapted"], rel=5e-5)


def test_a_model_compared_with_itself_and_tokens_that_it_excludes() -> None:
    model = logits_of(tiny_model("llama", layers=1))

    def excluding(ids: Tensor) -> Tensor:
        return model(ids).index_fill(-1, torch.tensor([7]), -math.inf)

    found = score_tokens(excluding, IDS, "", reference=excluding).to_json()
    nothing = {"mean": 0, "stderr": 0, "document_stderr": None, "p999": 0}
    assert found["kl"] == pytest.approx(nothing, abs=1e-6)
    assert found["top1"]["share"] == found["perplexity_ratio"]["value"] == 1
    # The other direction is infinite: the model gives no probability to what the reference may say.
    with pytest.raises(NonFiniteError, match=r"perplexity, base: the KL .* sequence 1 of 4 .* inf"):
        score_tokens(excluding, IDS, "perplexity, base", reference=model)


def test_only_loss_tokens_count_and_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny_model("llama", layers=1), tiny_model("llama", 1, layers=1)
    labels = IDS.clone()
    labels[:, ::3] = IGNORED
    labels[1, 4:] = IGNORED
    documents = torch.tensor([[0] * 10, [0] * 10, [1] * 5 + [2] * 5, [3] * 10])
    data = Sequences(IDS, labels, documents=documents)
    whole = score_tokens(logits_of(model), data, "", reference=logits_of(other))
    monkeypatch.setattr(token_scores, "_AT_ONCE", 2 * 260)
    parts = score_tokens(logits_of(model), data, "", reference=logits_of(other))
    for key, value in whole.to_json().items():
        assert value == pytest.approx(parts.to_json()[key])
    with torch.no_grad():
        p, q = (m(IDS).logits[:, :-1].log_softmax(-1) for m in (other, model))
    kept = labels[:, 1:] != IGNORED
    kl = (p.exp() * (p - q)).sum(-1)[kept].double()
    torch.testing.assert_close(whole.comparison.kl, kl, rtol=1e-4, atol=1e-5)
    assert whole.sequences.tolist() == kept.nonzero()[:, 0].tolist()
    assert whole.documents.tolist() == documents[:, 1:][kept].tolist()
    assert data.counts() == {"sequences": 4, "loss_tokens": int(kept.sum()), "documents": 4}


def test_tokens_of_one_cluster_are_not_independent_samples() -> None:
    """Repeating every token in its cluster adds no information, so the error stays."""
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clusters = torch.arange(50)
    alone = clustered_error(values, clusters)
    assert alone == pytest.approx(float(values.std()) / 50**0.5)
    assert clustered_error(values.repeat(9), clusters.repeat(9)) == pytest.approx(alone)
    assert clustered_error(values, torch.zeros(50, dtype=torch.int64)) is None


def test_the_error_covers_the_mean_of_other_samples() -> None:
    """Means of many samples, with clusters of unequal size, spread as one of them predicts."""
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        sizes = torch.randint(1, 20, (40,), generator=generator)
        clusters = torch.arange(40).repeat_interleave(sizes)
        shared = torch.randn(40, generator=generator, dtype=torch.float64)
        own = torch.randn(len(clusters), generator=generator, dtype=torch.float64)
        values = shared[clusters] + own
        means.append(float(values.mean()))
        errors.append(clustered_error(values, clusters) or 0.0)
    spread = float(torch.tensor(means).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.1)
