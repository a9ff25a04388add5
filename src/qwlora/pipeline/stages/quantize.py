"""`quantize` freezes the base. `quantize/sample` is text that the float model writes for it, and
`quantize/activations` are its activation ranges (workflow qwa-lora)."""

from __future__ import annotations

from qwlora.pipeline.stage import ACTIVATIONS, BASE_SIMULATION, SAMPLE, SAMPLED, Planner, revisions
from qwlora.quantize.solvers import SOLVERS
from qwlora.recipe.implied import is_calibrated, sampled_sequences


def add_sample(plan: Planner) -> None:
    """Text of the float model, if the base is calibrated on some."""
    recipe, parts = plan.recipe, plan.recipe.base.calibration
    if counts := sampled_sequences(recipe):
        sampled = {
            str(n): {"sequences": count, "temperature": parts[n].temperature}
            for n, count in counts.items()
        }
        tokens = {"sequence_tokens": recipe.data.sequence_tokens}
        inputs = {**plan.model, "calibration": sampled, "data": tokens, "seed": recipe.seed}
        from_ = "(sequences, from base.calibration_sequences or base.tuning.steps)"
        labels = {f"calibration.{n}.sequences": f"base.calibration.{n} {from_}" for n in sampled}
        plan.add(SAMPLE, inputs | revisions("sampled_text"), artifact=SAMPLED, labels=labels)


def add(plan: Planner) -> None:
    """The frozen base."""
    recipe, base, model = plan.recipe, plan.recipe.base, plan.recipe.model
    named = {base.solver, *(rule.solver for rule in base.rules)}
    used = [name for name in SOLVERS if name in named]
    # Keys that nothing reads are no inputs: changing them makes nothing run again.
    without = {"tuning", "calibrate_on", "calibration", "rotation", *(SOLVERS.keys() - named)}
    without |= set() if is_calibrated(recipe) else {"calibration_sequences"}
    inputs = {**plan.model, "base": base.model_dump(mode="json", exclude=without)}
    if is_calibrated(recipe) or base.tuning.steps:
        inputs |= plan.calibration()
    used += ["layer_statistics"] * is_calibrated(recipe)
    if base.has_budget:
        inputs["schemes_to_choose_from"] = [*map(str, recipe.budget_schemes())]
        used.append("bit_budget")
    if base.tuning.steps:
        inputs["base"] |= {"tuning": base.tuning.model_dump(mode="json")}
        used.append("tune_scales")
    if model.encodings is not None:
        settings = model.model_dump(include={"keep_float", "block_order", "prefix"})
        inputs["model"] |= {"encodings": plan.sources.file(model.encodings), **settings}
    # The template is stored with the base's tokenizer, and exported.
    if recipe.data.chat_template is not None:
        inputs["chat_template"] = plan.sources.file(recipe.data.chat_template)
    needs = [SAMPLE] * ("calibration" in inputs and SAMPLE in plan.stages)
    labels = {"chat_template": "data.chat_template"}
    labels["schemes_to_choose_from"] = "export.targets (schemes that base.bits chooses from)"
    inputs |= revisions(*used)
    plan.add("quantize", inputs, *needs, artifact="base", labels=labels)


def add_activations(plan: Planner) -> None:
    """Workflow qwa-lora: activations of the base without an adapter are frozen too."""
    ranges = plan.ranges(plan.recipe.base_texts(), plan.base_text)
    plan.add(ACTIVATIONS, ranges, "quantize", artifact=BASE_SIMULATION)
