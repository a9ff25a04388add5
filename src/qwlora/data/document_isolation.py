"""Test whether a model keeps documents that share a sequence apart.

transformers builds a block-diagonal attention mask from `position_ids` that restart at 0, for eager
and sdpa attention (whatever uses `create_causal_mask`), if there is no attention mask and no cache.
Models with their own mask and recurrent models may accept the positions and mix the documents
anyway. So the model itself is tested, with two documents a and b of random tokens, in one batch:

    |logits(b after a, positions restart) - logits(b)|  <=  0.02 |logits(b after a) - logits(b)|
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
    """Check that `model` separates documents by their positions.

    Raises:
        SourceError: it mixes them, or takes no position_ids.
    """
    leak = isolation_leak(model)
    if leak is None or leak > _LEAK:
        how = (
            "takes no position_ids"
            if leak is None
            else "mixes documents that share a sequence (restarting positions removes only "
            f"{1 - leak:.0%} of the influence of the earlier document)"
        )
        name = type(getattr(model, "get_base_model", lambda: model)()).__name__
        raise SourceError(
            f"{name} {how}, so data.packing: documents would condition each document on the one "
            "before it. Set data.packing to none (padding) or join (mixed)"
        )


def isolation_leak(model: PreTrainedModel | PeftModel) -> float | None:
    """0 if documents are separate, 1 if positions have no effect; None without position_ids."""
    import torch

    embedding: Any = model.get_input_embeddings()
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    count, generator = _DOCUMENT_TOKENS, torch.Generator().manual_seed(0)
    first, second = torch.randint(embedding.weight.shape[0], (2, count), generator=generator)
    ids = torch.stack([torch.cat([second, first]), *[torch.cat([first, second])] * 2])
    on, again = torch.arange(2 * count), torch.arange(count).repeat(2)
    inputs = {"input_ids": ids.to(device), "position_ids": torch.stack([on, on, again]).to(device)}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(**inputs, use_cache=False).logits.float()
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        return None
    finally:
        model.train(training)
    alone, joined, apart = logits[0, :count], logits[1, count:], logits[2, count:]
    mixing = (joined - alone).norm()
    return float((apart - alone).norm() / mixing) if mixing > 0 else 0.0
