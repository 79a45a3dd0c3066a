"""The CUDA wing: arrays on a GPU. Imported when the first such array is passed.

Each room (`conv`, `points`, `roi`) has a `run`, where calls enter: it asks a `Workspace` for memory and copies, and
launches the kernels of its folder. Shared by all:

    workspace    the work of one call: memory, copies, launches
    layout       copy kernels: between strides and types, and between NCHW and channels-last images
    jit, launch  how kernels are specialised for their constants, cached, and launched
    memory, mma  what kernels need that Numba lacks: arrays at addresses, vectors, tensor cores
    sample       samples under the border rule `zeros`: what they read and what they add
    scatter      gradients of images without atomics
"""

from numdcn._call.frameworks import require_cuda

require_cuda()  # raises its error first, whichever module of the wing is imported first
