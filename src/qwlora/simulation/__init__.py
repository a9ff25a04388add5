"""Step 3: capture base plus adapter as one graph, place quantizers by rules, calibrate them, simulate the integer computation."""
