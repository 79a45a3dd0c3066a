"""Run in the device server by test_simulated_blocks.py: kernels whose threads wait for each other."""

import numpy as np
from numba import cuda

THREADS, ROUNDS = 7, 50


@cuda.jit
def _pass_on(first, out):
    shared, i = cuda.shared.array(THREADS, np.int64), cuda.threadIdx.x
    if i < first:
        return
    following = i + 1 if i + 1 < THREADS else first
    number = i
    for _ in range(ROUNDS):
        shared[following] = number
        cuda.syncthreads()
        number = shared[i]
        cuda.syncthreads()
    out[cuda.blockIdx.x, i] = number


def passed_on(first):
    """Numbers that the threads of two blocks passed on to their neighbours in a ring, one place in each round. Threads before
    `first` end at once, and have -1."""
    out = np.full((2, THREADS), -1)
    _pass_on[2, THREADS](first, out)
    return out


@cuda.jit
def _fail(number):
    if cuda.threadIdx.x == number:
        raise ValueError("the reason")
    cuda.syncthreads()


def failing(number):
    """One thread fails, the others wait."""
    _fail[1, THREADS](number)
