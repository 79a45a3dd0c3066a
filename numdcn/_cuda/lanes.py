"""Sums over the lanes of a warp, and the divisions that tell lanes what to do."""

from __future__ import annotations

import numpy as np

from numdcn._call.numba_cuda import intrinsic, types
from numdcn._cuda.jit import F64, SIMULATED, THREADS, cuda, device
from numdcn._cuda.memory import compiled_as

WARP = 4 if SIMULATED else 32  # lanes that can add up their numbers


@intrinsic
def _split(typingctx, number, size):
    def codegen(context, builder, sig, args):
        a, b = (context.cast(builder, arg, kind, types.int32) for arg, kind in zip(args, sig.args, strict=True))
        quotient = builder.udiv(a, b)
        rest = builder.sub(a, builder.mul(quotient, b))
        return context.make_tuple(builder, sig.return_type, (quotient, rest))

    return types.UniTuple(types.int32, 2)(number, size), codegen


@compiled_as(_split)
def split(number, size):
    """(number // size, number % size) as int32, of numbers that fit and are not negative. (Numba's own division has 64
    bits, and asks whether the divisor is 0.)"""
    return np.int32(number // size), np.int32(number % size)


@device
def _add_lanes(a, b, c, lanes):
    step = 1
    while step < lanes:
        a += cuda.shfl_xor_sync(0xFFFFFFFF, a, step)
        b += cuda.shfl_xor_sync(0xFFFFFFFF, b, step)
        c += cuda.shfl_xor_sync(0xFFFFFFFF, c, step)
        step *= 2
    return a, b, c


def _simulated_add_lanes(a, b, c, lanes):
    box = cuda.shared.array((THREADS, 3), F64)
    thread, numbers, step = cuda.threadIdx.x, np.array([a, b, c]), 1
    while step < lanes:
        cuda.syncthreads()
        box[thread] = numbers
        cuda.syncthreads()
        numbers = numbers + box[thread ^ step].astype(numbers.dtype)
        step *= 2
    return tuple(numbers)


# The sums of three numbers over each `lanes` consecutive threads, a power of two up to WARP, in a fixed order; every thread
# of the block calls it and gets those of its own.
add_lanes = cuda.jit(device=True)(_simulated_add_lanes) if SIMULATED else _add_lanes
