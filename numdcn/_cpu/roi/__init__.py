"""Pooling over boxes. Calls enter at `run`."""
