"""Interpolation, written once for scalars, SIMD vectors and CUDA."""
