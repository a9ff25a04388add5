"""Step 1: freeze a model's weights to integers: solvers, the block runner, tuned scales."""
