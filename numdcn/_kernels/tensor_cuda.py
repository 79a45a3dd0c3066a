"""Tensor cores: products of 16 x 8 numbers by a warp, from float16, bfloat16 or tf32 operands with float32 sums.

Operands are words of 32 bits, along the depth of the product: two float16 or bfloat16, or one tf32. A step takes eight words:
lane 4*g + t holds the words t and t + 4 of rows g and g + 8 of the left operand, and of column g of the right one, and the sums
of rows g and g + 8, columns 2*t and 2*t + 1 (PTX ISA, mma.m16n8k16 and, for tf32, mma.m16n8k8).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from numdcn._kernels.jit_cuda import F16, F32, SIMULATED, cuda
from numdcn._kernels.memory_cuda import FLOAT, I16, I32, asm, narrow, twin

STEP = 8  # words of a step
SHAPES = {"float16": "m16n8k16.row.col.f32.f16.f16.f32", "uint16": "m16n8k16.row.col.f32.bf16.bf16.f32"}
TF32 = "m16n8k8.row.col.f32.tf32.tf32.f32"


def per_word(kind: Any) -> int:
    """Numbers of a word."""
    return 1 if kind == F32 else 2


@intrinsic
def _bits(typingctx, number):  # type: ignore[no-untyped-def]
    return types.uint32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], I32)


@twin(_bits)
def bits(number):  # type: ignore[no-untyped-def]
    """A float32 as a word."""
    return np.float32(number).view(np.uint32)


@intrinsic
def _from_bits(typingctx, word):  # type: ignore[no-untyped-def]
    return types.float32(types.uint32), lambda context, builder, sig, args: builder.bitcast(args[0], FLOAT)


@twin(_from_bits)
def from_bits(word):  # type: ignore[no-untyped-def]
    """The float32 that a word holds."""
    return np.uint32(word).view(np.float32)


@intrinsic
def _word(typingctx, first, second, kind):  # type: ignore[no-untyped-def]
    target = kind.dtype

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        if target == F32:
            return asm(builder, I32, "cvt.rna.tf32.f32 $0, $1;", "=r,f", [args[0]], False)
        name = "f16x2" if target == F16 else "bf16x2"
        return asm(builder, I32, f"cvt.rn.{name}.f32 $0, $1, $2;", "=r,f,f", [args[1], args[0]], False)

    return types.uint32(types.float32, types.float32, kind), codegen


@twin(_word)
def word(first, second, kind):  # type: ignore[no-untyped-def]
    """Two numbers as a word of `kind`, rounded to nearest; for tf32 the first alone, halves away from zero."""
    if kind == F32:
        pattern = int(bits(first))
        if np.isfinite(first):
            pattern = (pattern + 0x1000) & 0xFFFFE000
        return np.uint32(pattern & 0xFFFFFFFF)
    low, high = (np.asarray(narrow(v, kind)).view(np.uint16) for v in (first, second))
    return np.uint32(int(low) | int(high) << 16)


@intrinsic
def _pair(typingctx, first, second):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        low, high = (builder.zext(builder.bitcast(v, I16) if v.type != I16 else v, I32) for v in args)
        return builder.or_(low, builder.shl(high, ir.Constant(I32, 16)))

    return types.uint32(first, second), codegen


@twin(_pair)
def pair(first, second):  # type: ignore[no-untyped-def]
    """Two stored float16 or bfloat16 as a word."""
    low, high = (np.asarray(v).view(np.uint16) for v in (first, second))
    return np.uint32(int(low) | int(high) << 16)


@intrinsic
def _multiply_add(typingctx, a0, a1, a2, a3, b0, b1, sums, i, j, kind):  # type: ignore[no-untyped-def]
    target = kind.dtype

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        array = cgutils.create_struct_proxy(sums)(context, builder, value=args[6])
        shape = cgutils.unpack_tuple(builder, array.shape)
        start = builder.mul(
            builder.add(builder.mul(args[7], shape[1]), args[8]), shape[2]
        )  # a contiguous array (rows, columns, 4)
        places = [builder.gep(array.data, [builder.add(start, ir.Constant(start.type, k))]) for k in range(4)]
        text = f"mma.sync.aligned.{TF32 if target == F32 else SHAPES[str(target)]} "
        text += "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        values = [*args[:6], *(builder.load(place) for place in places)]
        made = asm(
            builder, ir.LiteralStructType([FLOAT] * 4), text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", values, True
        )  # fmt: skip
        for k, place in enumerate(places):
            builder.store(builder.extract_value(made, k), place)
        return context.get_dummy_value()

    words = [types.uint32] * 6
    return types.void(*words, sums, types.int64, types.int64, kind), codegen


EXCHANGED: dict[Any, Any] = {}  # in the simulator: what the lanes of a warp show each other


def _simulated_multiply_add(a0, a1, a2, a3, b0, b1, sums, i, j, kind):  # type: ignore[no-untyped-def]
    thread = int(cuda.threadIdx.x)
    warp, lane = thread // 32 * 32, thread % 32
    EXCHANGED[thread] = (a0, a1, a2, a3, b0, b1)
    cuda.syncthreads()
    g, t = lane // 4, lane % 4
    for row in range(2):
        left = _numbers([EXCHANGED[warp + 4 * g + k % 4][row + 2 * (k // 4)] for k in range(STEP)], kind)
        for column in range(2):
            owner = warp + 4 * (2 * t + column)
            right = _numbers([EXCHANGED[owner + k % 4][4 + k // 4] for k in range(STEP)], kind)
            with np.errstate(all="ignore"):
                sums[i, j, 2 * row + column] += np.float32(np.dot(left, right))
    cuda.syncthreads()


def _numbers(words: list[Any], kind: Any) -> np.ndarray:
    """The numbers of words, as float64."""
    raw = np.array(words, np.uint32)
    if kind == F32:
        return raw.view(np.float32).astype(np.float64)
    if kind == F16:
        return raw.view(np.float16).astype(np.float64)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


# sums[i, j, :] += the warp's product of one step
multiply_add = cuda.jit(device=True)(_simulated_multiply_add) if SIMULATED else _multiply_add
