"""Write a simulation, or a base with its adapters, for real runtimes, and run what was written."""
