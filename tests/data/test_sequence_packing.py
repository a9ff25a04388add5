"""Sequences: packed documents are as if alone, no loss token is lost uncounted, padding is not in the loss."""

import random
from itertools import pairwise

import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from conftest import VOCABULARY, tiny_model
from qwlora.analysis.token_scores import score_tokens
from qwlora.data.sequences import IGNORED, Sequences, check_isolation, cut_into_sequences
from qwlora.data.tokenization import Tokens
from qwlora.errors import SourceError

PAD = 257


def records(count: int, longest: int, seed: int = 0) -> list[Tokens]:
    """Documents of which the second half is in the loss."""
    chance = random.Random(seed)
    lengths = [chance.randint(2, longest) for _ in range(count)]
    return [
        Tokens([chance.randrange(256) for _ in range(n)], [i >= n // 2 for i in range(n)])
        for n in lengths
    ]


def sliding_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "sliding_window": 8}
    counts = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "vocab_size": VOCABULARY}
    config = t.Gemma3TextConfig(**sizes, **counts, **layers, eos_token_id=256, pad_token_id=257)
    return t.Gemma3ForCausalLM(config).eval()


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "qwen3": lambda: tiny_model("qwen3"),
    "gpt2": lambda: tiny_model("gpt2"),
    "sliding": sliding_model,
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_in_a_pack_are_those_of_the_document_alone(name: str, attention: str) -> None:
    model = MODELS[name]()
    check_isolation(model)
    model.set_attn_implementation(attention)
    documents = records(7, 30)
    packed, _ = cut_into_sequences(documents, 64, "documents", [], PAD, "training")
    assert len(packed) < len(documents)
    logits = model(packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits
    assert packed.position_ids is not None
    waiting = {tuple(d.ids): d for d in documents}
    for row in range(len(packed)):
        starts = [*(packed.position_ids[row] == 0).nonzero().flatten().tolist(), 64]
        for start, end in pairwise(starts):
            document = waiting.pop(tuple(packed.input_ids[row, start:end].tolist()), None)
            if document is None:
                assert (packed.input_ids[row, start:end] == PAD).all()
                continue
            alone = model(torch.tensor([document.ids]), use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, start:end], alone, rtol=1e-4, atol=1e-4)
    assert not waiting


def test_loss_of_packs_is_the_mean_over_the_loss_tokens_of_all_documents() -> None:
    model, documents = tiny_model("llama"), records(9, 30)
    packed, counts = cut_into_sequences(documents, 64, "documents", [], PAD, "training")
    padded, _ = cut_into_sequences(documents, 64, "none", [], PAD, "training")
    total, loss_tokens = 0.0, 0
    for document in documents:
        ids, in_loss = torch.tensor(document.ids), torch.tensor(document.in_loss)
        labels = torch.where(in_loss, ids, IGNORED)[1:]
        logits = model(ids[None], use_cache=False).logits[0, :-1].detach()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        loss_tokens += int((labels != IGNORED).sum())
    assert counts.loss_tokens == packed.loss_tokens == padded.loss_tokens == loss_tokens
    for sequences in (packed, padded):
        rows = [sequences[i] for i in range(len(sequences))]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        found = float(model(**batch, use_cache=False, num_items_in_batch=loss_tokens).loss.detach())
        assert found == pytest.approx(total / loss_tokens, rel=1e-5)
    found = score_tokens(lambda ids: model(ids, use_cache=False).logits, padded, "").perplexity
    assert found == pytest.approx(torch.tensor(total / loss_tokens).exp().item(), rel=1e-5)


@torch.no_grad()
def test_models_that_mix_documents_are_refused() -> None:
    torch.manual_seed(0)
    tokens = {"vocab_size": VOCABULARY, "eos_token_id": 256, "pad_token_id": 257}
    tokens["bos_token_id"] = 256
    mamba = t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=2, **tokens))
    for model in (mamba.train(), tiny_model("opt")):
        message = rf"{type(model).__name__} .*Set data.packing to none"
        with pytest.raises(SourceError, match=message):
            check_isolation(model)
    assert mamba.training


document_lists = st.lists(
    st.tuples(st.integers(1, 25), st.booleans(), st.integers(0, 25)), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=80)
@given(document_lists, st.sampled_from(["join", "documents", "none"]), st.integers(8, 20))
def test_every_token_is_counted(shapes, packing, width) -> None:
    documents = [
        Tokens([k * 30 + i for i in range(n)], [i >= prompt for i in range(n)], document=k)
        for k, (n, _, prompt) in enumerate(shapes)
    ]
    try:
        found, counts = cut_into_sequences(documents, width, packing, [], -1, "training")
    except SourceError:
        assert packing == "join" or not any(any(t.in_loss[1:width]) for t in documents)
        return
    assert counts.sequences == len(found)
    assert found.input_ids.shape == found.labels.shape == (counts.sequences, counts.sequence_tokens)
    assert counts.sequence_tokens <= width
    assert counts.tokens == sum(len(d.ids) for d in documents)
    assert counts.tokens - counts.dropped_tokens == int((found.input_ids >= 0).sum())
    assert int((found.input_ids < 0).sum()) == counts.padding_tokens
    too_long = sum(max(0, len(d.ids) - width) for d in documents)
    assert counts.truncated_tokens == (0 if packing == "join" else too_long)
    assert counts.loss_tokens == found.loss_tokens > 0
    wanted = {i for d in documents for i, flag in zip(d.ids, d.in_loss, strict=True) if flag}
    in_loss = found.labels != IGNORED
    assert set(found.labels[in_loss].tolist()) <= wanted
    assert torch.equal(found.labels[in_loss], found.input_ids[in_loss])
    assert in_loss[:, 1:].any(dim=1).all()
    assert found.documents is not None
    assert torch.equal(found.documents, torch.where(found.input_ids < 0, -1, found.input_ids // 30))
    if found.position_ids is not None:
        # no loss token is predicted by the document before it
        assert not in_loss[found.position_ids == 0].any()


def test_running_text_is_cut_into_pieces_each_begun_and_nothing_is_lost() -> None:
    text = Tokens(list(range(25)), [True] * 25, divisible=True)
    found, counts = cut_into_sequences([text], 10, "none", [99], -1, "training")
    ids = [[99, *range(9)], [99, *range(9, 18)], [99, *range(18, 25), -1, -1]]
    assert found.input_ids.tolist() == ids
    not_in_loss = {99: -100, -1: -100}
    assert found.labels.tolist() == [[not_in_loss.get(i, i) for i in row] for row in ids]
    assert (counts.dropped_tokens, counts.truncated_documents, counts.padding_tokens) == (0, 0, 2)
    assert found.documents is not None
    assert found.documents.tolist() == [[0] * 10, [0] * 10, [0] * 8 + [-1] * 2]
    two = [Tokens([1] * 14, [True] * 14, divisible=True, document=k) for k in (3, 5)]
    joined, _ = cut_into_sequences(two, 10, "join", [99], -1, "training")
    assert joined.documents is not None
    assert joined.documents.tolist() == [[3] * 10, [3] * 6 + [5] * 4, [5] * 10]
    packed, _ = cut_into_sequences([text], 10, "documents", [99], -1, "training")
    assert packed.position_ids is not None
    assert packed.position_ids[0].tolist() == list(range(10))


def test_what_is_too_long_is_truncated_and_counted() -> None:
    sizes = ((12, 6), (20, 12), (3, 1))  # tokens, and those that are not in the loss
    documents = [Tokens([*range(n)], [i >= prompt for i in range(n)]) for n, prompt in sizes]
    _, counts = cut_into_sequences(documents, 10, "documents", [], -1, "training")
    assert (counts.documents, counts.tokens, counts.sequences) == (3, 35, 2)
    assert (counts.truncated_documents, counts.truncated_tokens) == (2, 12)
    assert (counts.dropped_documents, counts.dropped_tokens) == (1, 22)
    assert counts.loss_tokens == 4 + 2
    only_the_first = Tokens([*range(12)], [True] + [False] * 11)
    for document, packing, message in (
        (documents[1], "none", r"first 10 tokens: raise data.sequence_tokens"),
        (only_the_first, "join", "no sequence of the training part has a loss token"),
    ):
        with pytest.raises(SourceError, match=message):
            cut_into_sequences([document], 10, packing, [], -1, "training")


def test_rows_end_with_the_last_learnt_token() -> None:
    labels = torch.tensor([[-100, 1, -100, -100], [-100, -100, -100, 7]])
    sequences = Sequences(torch.arange(8).view(2, 4), labels)
    assert [(ids.tolist(), labels.tolist()) for ids, labels in sequences.rows()] == [
        ([0, 1], [-100, 1]),
        ([4, 5, 6, 7], [-100, -100, -100, 7]),
    ]
    assert sequences.loss_tokens == 2
    assert set(sequences.first(1)[0]) == {"input_ids", "labels"}


def test_sequences_are_spread_evenly_and_none_is_lost() -> None:
    sequences = Sequences(*(torch.arange(20).view(10, 2) for _ in range(3)))
    chosen, others = sequences.spread(4)
    assert chosen.input_ids[:, 0].tolist() == [0, 4, 10, 14]
    assert others.input_ids[:, 0].tolist() == [2, 6, 8, 12, 16, 18]
    assert chosen.position_ids is not None
    assert torch.equal(chosen.position_ids, chosen.labels)
    assert [len(part) for part in sequences.spread(99)] == [10, 0]
    assert [len(part) for part in sequences.first(3).spread(1)] == [1, 2]
