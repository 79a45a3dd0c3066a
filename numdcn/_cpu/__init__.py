"""The CPU wing: NumPy arrays, Numba kernels, threads."""
