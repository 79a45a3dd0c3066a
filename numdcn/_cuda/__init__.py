"""The CUDA wing: arrays on a GPU. Imported when the first of them comes.

Each room (`conv`, `points`, `roi`) has a `run`, where a call comes in: it asks a `Workspace` for memory and copies, and launches
the kernels that stand beside it. What all share:

    workspace    the work of one call: memory, copies, launches
    layout       kernels that copy: between strides and types, and between NCHW and images along the channels
    jit, launch  how kernels are made for their constants, cached, and launched
    memory, mma  what kernels do that Numba does not: arrays at addresses, vectors, tensor cores
    sample       samples under border mode `zeros`: what they read and what they add
    scatter      gradients of images without atomics
"""

from numdcn._call.frameworks import require_cuda

require_cuda()  # its error comes before others, whichever module of the wing is imported first
