"""Convolutions, deformable or not. Calls enter at `run`.

call                     the parameters of all kernels
columns, columns_mma     what taps read: planned, sampled, stored in shared memory
products                 tile products by threads; those on tensor cores are in `_cuda.mma`
forward, forward_mma     y
backward, backward_mma   gradients of columns, and from them those of x, offsets and mask; with mma also that of w
weights                  gradients of w and of the bias
pack                     weights in the layouts of the kernels
"""
