"""Which revision of the statistics and solvers a base was made with. What another one made, when a job or its parts are taken up again, is made again."""

REVISION = "2"  # 2: tokens are weighed (`observe.py`)
MOMENTS_REVISION = "2"  # of what is kept for starts; 2: moments of outputs as well
