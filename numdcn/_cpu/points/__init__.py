"""Samples at points. `run` is where a call comes in."""
