"""Pooling over boxes. `run` is where a call comes in."""
