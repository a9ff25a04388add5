"""Paths of files and folders that stages write in a job's directory. Imports no torch."""

MOMENTS = "moments"  # second moments of the base's layers, in base/
SOLVER_SCALES = "tuning/solver_scales.safetensors"  # scales before tuning, in base/
BASE_SIMULATION = "base_simulation"  # encodings of the base without an adapter; workflow qwa-lora
SHARED = "simulation/_shared"  # encodings that adapters share; not a valid adapter name
ADAPTER = "adapter"  # in simulation/NAME/: the adapter as it was calibrated
ZERO_ADAPTER = "simulation/_base"  # of bundles of simulations; not a valid adapter name
USE_CASES = "simulation/_use_cases"  # of export.use_cases; not a valid adapter name
