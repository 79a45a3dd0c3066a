"""Convolutions, deformable or not. `run` is where a call comes in."""
