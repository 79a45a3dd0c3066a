"""Convolutions, deformable or not. Calls enter at `run`."""
