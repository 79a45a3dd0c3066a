"""Pooling over boxes. Calls enter at `run`.

bins         boxes, bins and where their samples lie
pool         kernels of operators that sample
pool_whole   kernels of operators over whole pixels
"""
