"""Runs the stages of a job in order, after checks of all that they need."""
