"""Pooling over boxes. `run` is where a call comes in.

bins         boxes, bins and where their samples lie
pool         kernels of operators that sample
pool_whole   kernels of operators over whole pixels
"""
