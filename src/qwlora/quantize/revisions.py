"""Revisions of the algorithms whose results are stored.

Stage keys and caches contain the revisions of what they run, so results of an older one are
computed again. Raise a number when the same inputs give other results:
`tests/quantize/test_revisions.py` fails if a result changes and its number does not. Imports no
torch: keys are made before it is loaded.
"""

from __future__ import annotations

REVISIONS = {
    # solvers, by their names in a recipe
    "rtn": 1,
    "search": 2,  # 2: ranges below 0.3 of the min-max range
    "sqnr": 2,
    "gptq": 2,
    # of the base
    "layer_statistics": 2,  # 2: tokens are weighted
    "second_moments": 2,  # 2: moments of outputs as well
    "tune_scales": 3,  # 2: norms are tuned as well; 3: the solver's scales are kept
    # 2: qera weighs outputs; 3: corrects the solver's error; 4: shorter B where inputs are large
    "initialize_adapter": 4,
    "activation_samples": 2,  # 2: smaller
    "token_scores": 2,  # 2: KL divergence, same likeliest token and standard errors
}
