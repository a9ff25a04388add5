"""Step 3: place quantizers in a captured graph, calibrate them, simulate integer arithmetic."""
