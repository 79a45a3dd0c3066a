"""Weighted samples of channels-last images: deformable attention, DCNv3, DCNv4. Calls enter at `run`.

access     memory accesses that only this room needs
points     the table of points, and where a point's sample lies
kernels    y, and the gradients
in_order   the gradient of value without atomics
"""
