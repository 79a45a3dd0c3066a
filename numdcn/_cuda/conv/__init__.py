"""Convolutions, deformable or not. Calls enter at `run`.

call                     the parameters of all kernels
columns, columns_mma     what taps read: planned, sampled, stored in shared memory
products                 tile products by threads; those on tensor cores are in `_cuda.mma`
forward, forward_mma     y
backward, backward_mma   gradients of columns, and from them those of x, offsets and mask; with mma also that of w
weights                  gradients of w and of the bias
two_step                 columns in memory and products of the caller's framework: which calls, and how
slabs                    the pixels whose columns are in memory at a time, planned by blocks
columns_kernel           those columns; y from the product
column_gradients         gradients of x, offsets and mask from those of the columns
pack                     weights in the layouts of the kernels
"""
