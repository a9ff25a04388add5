"""Step 1: freeze a model's weights to integers. Packed layers, solvers, the base on disk, its fingerprint."""
