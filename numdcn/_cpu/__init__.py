"""The CPU wing: NumPy arrays, Numba kernels, threads.

A call comes in at `conv.run`, `points.run` or `roi.run`. These choose a blocking (`conv.blocking`, `points_blocking`), take scratch
memory, copy x to zero-padded images (`images`; position-sensitive boxes read x in place) and launch the kernels of their folder in
threads (`threads`, `team`). `arrays` has what they do with the caller's arrays, `modulation` a layer's arithmetic between its
convolutions, in NumPy.

What kernels are made of, from the bottom up: `jit` (decorators, register tiles), `simd` and `lanes` (vectors and memory),
`parameters` (how a record reaches a kernel), `layout` (images and matrices), `tile` and `tile_io` (output pixels), `sample`
(plan, sample, and the backward), `gemm` (the matrix product), `sums`.
"""
