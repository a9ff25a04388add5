"""Do documents that share a sequence see each other?

transformers' mask makers read it from `position_ids` that begin again, for eager and sdpa attention (any attention that goes through
`create_causal_mask`), if there is neither an attention mask nor a cache: the mask becomes block diagonal, and a sliding window counts within a document.
Models with a mask of their own, and recurrent ones, may take the positions and mix the documents all the same. So it is not looked up but tried, on the
model itself:

    |logits(b after a, positions begin again) - logits(b)|  <=  0.02 |logits(b after a) - logits(b)|

for two documents of random tokens, in one batch of three sequences, so that the model's weights are read once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwlora.errors import SourceError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

_DOCUMENT_TOKENS = 12
_LEAK = 0.02


def check_isolation(model: PreTrainedModel | PeftModel) -> None:
    """See that `model` keeps documents apart by their positions.

    Raises:
        SourceError: it does not.
    """
    leak = isolation_leak(model)
    if leak is None or leak > _LEAK:
        how = (
            "takes no position_ids"
            if leak is None
            else f"mixes documents that share a sequence ({leak:.0%} of what it does without positions of their own)"
        )
        name = type(getattr(model, "get_base_model", lambda: model)()).__name__
        raise SourceError(
            f"{name} {how}, so data.packing: documents would train each on the one before it. Choose data.packing: none (padding), or join (mixed)"
        )


def isolation_leak(model: PreTrainedModel | PeftModel) -> float | None:
    """The share above: 0 if documents are apart, 1 if positions change nothing; None if the model takes no positions."""
    import torch

    embedding: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(
        embedding.weight.shape[0], (2, _DOCUMENT_TOKENS), generator=generator
    )
    on, again = torch.arange(2 * _DOCUMENT_TOKENS), torch.arange(_DOCUMENT_TOKENS).repeat(2)
    ids, positions = (
        torch.stack([torch.cat([second, first]), *[torch.cat([first, second])] * 2]),
        torch.stack([on, on, again]),
    )
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(
                input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False
            ).logits.float()
        alone, joined, apart = (
            logits[0, :_DOCUMENT_TOKENS],
            logits[1, _DOCUMENT_TOKENS:],
            logits[2, _DOCUMENT_TOKENS:],
        )
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        return None
    finally:
        model.train(training)
    mixing = (joined - alone).norm()
    return float((apart - alone).norm() / mixing) if mixing > 0 else 0.0
