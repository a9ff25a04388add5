"""Which revision of the statistics and solvers a base was made with. What another one made, when a job or its parts are taken up again, is made again."""

REVISION = "2"  # 2: tokens are weighed (`observe.py`)
TUNING_REVISION = (
    "3"  # of what tuning leaves; 2: norms are tuned as well; 3: the solver's scales are kept
)
MOMENTS_REVISION = "2"  # of what is kept for starts; 2: moments of outputs as well
