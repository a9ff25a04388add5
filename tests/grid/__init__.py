"""Properties and golden values of `qwlora.grid`."""
