"""Where stages put their files inside a job's directory. Free of torch."""

MOMENTS = "moments"  # second moments of the base's layers, in base/
SOLVER_SCALES = "tuning/solver_scales.safetensors"  # scales before tuning, in base/
BASE_SIMULATION = "base_simulation"  # of the base alone, in workflow qwa-lora
SHARED = "simulation/_shared"  # encodings that adapters share; no adapter has such a name
SCALES = "activation_scales.safetensors"  # learned with an adapter, in adapters/NAME/
ADAPTER = "adapter"  # in simulation/NAME/: the factors that its encodings belong to
