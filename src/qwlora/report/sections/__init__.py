"""The sections of the report, in their order. A section costs one module and one template."""

from __future__ import annotations

from qwlora.report.section import Section
from qwlora.report.sections import (
    activation_ranges,
    adapter_table,
    data_summary,
    layer_errors,
    reproduction,
    runtime_parity,
    stage_costs,
    task_scores,
    time_and_size,
    training_course,
)

SECTIONS: tuple[Section, ...] = tuple(
    module.SECTION
    for module in (
        adapter_table,
        stage_costs,
        training_course,
        layer_errors,
        activation_ranges,
        runtime_parity,
        task_scores,
        time_and_size,
        data_summary,
        reproduction,
    )
)
