"""Write a simulation for real runtimes, and run what was written."""
