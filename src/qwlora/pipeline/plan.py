"""The plan of a job: its stages in order. What each needs and depends on is in its module.

    evaluate/float            perplexity of the float model
    quantize/sample           text that the float model writes, if the base is calibrated on it
    quantize                  freeze the base
    evaluate/base
    export/TARGET             of a bundle: the base; where all use cases are together: everything
    quantize/activations      encodings of the base's activations, in workflow qwa-lora
    evaluate/imported/NAME    the float model with an adapter from elsewhere
    train/NAME
    train/NAME/float          the same adapter on the float model, with `reference: float`
    evaluate/reference/NAME   the float model with that adapter
    calibrate                 encodings that adapters share, if they share any
    calibrate/_base           the zero adapter, for targets that switch simulations
    evaluate/adapted/NAME, calibrate/NAME, evaluate/simulated/NAME
    export/TARGET/NAME, verify/TARGET/NAME
    verify/TARGET             the zero adapter
    calibrate/_use_cases      for targets that hold all use cases; then export, verify/TARGET/CASE

With several texts, evaluate/MODEL/on/TEXT measures the float model and the base on the text of each
adapter, and with `evaluate: all` every adapter on the text of each other. If no target holds
activations, nothing is calibrated (`Recipe.is_simulated`). Imports no torch.
"""

from __future__ import annotations

from itertools import chain

from qwlora.pipeline.sources import Sources
from qwlora.pipeline.stage import ZERO, Planner, Stage
from qwlora.pipeline.stages import calibrate, evaluate, export, quantize, train
from qwlora.recipe import Recipe
from qwlora.recipe.implied import REFERENCE, is_foreign, reference_stage


def make_plan(recipe: Recipe, sources: Sources) -> list[Stage]:
    """All stages in the order of a full run."""
    plan = Planner(recipe, sources)
    calibration = map(recipe.calibration_texts, recipe.base.calibration)
    # An error in a text is reported before the model's files, which may be large, are read.
    for data in (*recipe.base_texts(), *recipe.texts().values(), *chain(*calibration)):
        sources.text(data)
    targets = plan.targets
    bundles = [name for name, target in targets.items() if target.has_base]
    with_cases = [name for name, target in targets.items() if target.has_cases]
    switched = [name for name, target in targets.items() if target.has_base and target.is_simulated]
    if sources.holds_floats:
        evaluate.add(plan, "float")
    # The float model writes text while `evaluate/float` still has it in memory.
    quantize.add_sample(plan)
    quantize.add(plan)
    evaluate.add(plan, "base", "quantize")
    for name in bundles:
        if name not in switched:
            export.add_base(plan, name, "quantize")
    if recipe.workflow == "qwa-lora":
        quantize.add_activations(plan)
    for adapter in recipe.adapters:
        is_imported = is_foreign(recipe, adapter) and adapter.unknown_base != "refuse"
        if sources.holds_floats and is_imported:
            evaluate.add(plan, "imported", adapter=adapter)
        train.add(plan, adapter)
        if (reference := reference_stage(recipe, adapter)) is not None:
            train.add_reference(plan, adapter, reference)
            evaluate.add(plan, REFERENCE, reference, adapter=adapter)
    if plan.shares:
        calibrate.add_shared(plan)
    if switched:
        calibrate.add_zero_adapter(plan)
    for name in switched:
        export.add_base(plan, name, ZERO)
    # All stages of one adapter follow each other: its simulation is captured once for all of them.
    for adapter in recipe.adapters:
        evaluate.add(plan, "adapted", f"train/{adapter.name}", adapter=adapter)
        if recipe.is_simulated:
            calibrate.add(plan, adapter)
            evaluate.add(plan, "simulated", f"calibrate/{adapter.name}", adapter=adapter)
        for name in targets:
            if name not in with_cases:
                export.add(plan, name, adapter)
                export.add_check(plan, name, adapter.name, [recipe.data_of(adapter)])
    # These come last, so that a failure leaves nothing of the adapters undone.
    for name in switched:
        export.add_check_of_zero_adapter(plan, name)
    if with_cases:
        calibrate.add_use_cases(plan)
    for name in with_cases:
        export.add_use_cases(plan, name)
        for case in recipe.use_cases():
            export.add_check(plan, name, case, recipe.texts().values())
    return list(plan.stages.values())
