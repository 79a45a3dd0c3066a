"""The CPU wing: NumPy arrays, Numba kernels, threads.

A call enters at `conv.run`, `points.run` or `roi.run`. These choose a blocking (`conv.blocking`, `points_blocking`),
take scratch memory, copy x to zero-padded images (`images`; position-sensitive boxes read x in place) and launch the
kernels of their folder in threads (`threads`, `team`). `arrays` deals with the caller's arrays, `modulation` with a
layer's arithmetic between its convolutions, in NumPy. The kernels know float32 and float64; for float16 and bfloat16
`widened` stands before the `run`, converting with the kernels of `halves`, but where convolutions multiply pairs of
bfloat16 (`conv.pairs`).

The building blocks of kernels, from the bottom up: `jit` (decorators, register tiles), `compiler` (what they add to
Numba's), `simd` and `lanes` (vectors and memory), `pairs` (of bfloat16, for dot products), `parameters` (how a record
reaches a kernel), `layout` (images and matrices), `tile` and `tile_io` (output pixels), `sample` (plan, sample, and the
backward; for a few channels `several` pixels at a time), `gemm` (the matrix product, `aside` while it makes columns),
`bands` (of rows, that boxes and points add to), `sums`.
"""
