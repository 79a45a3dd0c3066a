"""Convolutions, deformable or not. `run` is where a call comes in.

call                     the parameters of all kernels
columns, columns_mma     what taps read: planned, sampled, stored in shared memory
products                 products of tiles by threads; those by tensor cores are in `_cuda.mma`
forward, forward_mma     y
backward, backward_mma   the gradients of columns, and with them those of x, offsets and mask; with mma also that of w
weights                  the gradients of w and of the bias
pack                     weights as the kernels want them
"""
