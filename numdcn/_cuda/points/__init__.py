"""Sampling at points. Calls enter at `run`."""
