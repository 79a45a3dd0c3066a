"""Pairs of bfloat16 numbers, as the dot products of AVX512-BF16 multiply them.

A pair fills the 32 bits of a float32, the first number in the lower half. Kernels that only move pairs move them as
float32 numbers. Kernels that compute take them apart, compute in float32 and round to pairs again.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from numdcn._cpu.lanes import exchanged, shuffle, store_rows
from numdcn._cpu.simd import vector_at
from numdcn._formulas.halves import I16
from numdcn._formulas.jit import lanes, simd_bytes, target
from numdcn._formulas.vectors import I32, I64, Vec, call_llvm

_F32 = ir.FloatType()


@functools.cache
def has_dot_products() -> bool:
    """Whether the target multiplies pairs: AVX512-BF16."""
    return simd_bytes() == 64 and "avx512bf16" in target()[2]


def dot_value(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """IR: c + the sum of the products of the numbers of two pairs, lane by lane.

    The instruction takes subnormal numbers as 0 and makes none. LLVM knows its operands as vectors of bfloat, a type
    that llvmlite lacks; it also accepts the integers of LLVM's first version of this intrinsic.
    """
    bits = ir.VectorType(I32, c.type.count)
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * c.type.count}"
    return call_llvm(builder, name, c.type, c, builder.bitcast(a, bits), builder.bitcast(b, bits))


def _bits(builder: Any, pairs: Any) -> Any:
    """IR: the bits of pairs, a vector or a scalar."""
    return builder.bitcast(pairs, ir.VectorType(I32, pairs.type.count) if _is_vector(pairs) else I32)


def _is_vector(value: Any) -> bool:
    return isinstance(value.type, ir.VectorType)


@intrinsic
def firsts(typingctx, pairs):
    """The first number of each pair, as float32."""

    def codegen(context, builder, sig, args):
        bits = _bits(builder, args[0])
        sixteen = ir.Constant(bits.type, [16] * bits.type.count if _is_vector(bits) else 16)
        return builder.bitcast(builder.shl(bits, sixteen), args[0].type)

    return pairs(pairs), codegen


@intrinsic
def seconds(typingctx, pairs):
    """The second number of each pair, as float32."""

    def codegen(context, builder, sig, args):
        bits = _bits(builder, args[0])
        upper = ir.Constant(bits.type, [0xFFFF0000] * bits.type.count if _is_vector(bits) else 0xFFFF0000)
        return builder.bitcast(builder.and_(bits, upper), args[0].type)

    return pairs(pairs), codegen


def _round(builder: Any, a: Any, b: Any) -> Any:
    """IR: vectors a and b rounded to pairs: to the nearest, ties to even, subnormal numbers to 0."""
    count = a.type.count
    halves = ir.VectorType(I16, 2 * count)
    rounded = call_llvm(builder, f"llvm.x86.avx512bf16.cvtne2ps2bf16.{32 * count}", halves, b, a)  # a, then b
    return builder.bitcast(
        shuffle(builder, rounded, rounded, [i // 2 + i % 2 * count for i in range(2 * count)]), a.type
    )


@intrinsic
def pairs_of(typingctx, a, b):
    """Pairs of the numbers of a and b: to the nearest, ties to even, subnormal numbers to 0."""

    def codegen(context, builder, sig, args):
        if isinstance(a, Vec):
            return _round(builder, *args)
        zero, lane = ir.Constant(ir.VectorType(_F32, 4), None), ir.Constant(I32, 0)
        vectors = [builder.insert_element(zero, number, lane) for number in args]
        return builder.extract_element(_round(builder, *vectors), lane)

    return a(a, a), codegen


def _pairs_at(builder: Any, halves: Any, index: Any, distance: Any, count: int) -> Any:
    """IR: the pairs of the bfloat16 numbers at `index` and `distance` elements on, and so on for `count` elements."""
    vector, parts = ir.VectorType(I32, count), []
    for place in (index, builder.add(index, distance)):
        loaded = builder.load(vector_at(builder, halves, place, ir.VectorType(I16, count)))
        loaded.align = 2
        parts.append(builder.zext(loaded, vector))
    return builder.or_(parts[0], builder.shl(parts[1], ir.Constant(vector, [16] * count)))


@intrinsic
def load_pair(typingctx, halves, index, distance):
    """The pair of the bfloat16 numbers at `index` and at `index + distance`."""

    def codegen(context, builder, sig, args):
        pair = _pairs_at(builder, *args, 1)
        return builder.bitcast(builder.extract_element(pair, ir.Constant(I32, 0)), _F32)

    return types.float32(halves, types.intp, types.intp), codegen


@intrinsic
def transpose_pairs(typingctx, halves, stride, distance, target, target_stride, count):
    """target[j * target_stride + i] = the pair of halves[i * stride + j] and halves[i * stride + j + distance], for i <
    L, the number of lanes of a full register, and j < `count`, at most L. Reads as if `count` were L."""
    size, vector = lanes(types.float32), ir.VectorType(_F32, lanes(types.float32))

    def codegen(context, builder, sig, args):
        halves, stride, distance, target, target_stride, count = args
        places = [builder.mul(stride, ir.Constant(I64, i)) for i in range(size)]
        rows = [builder.bitcast(_pairs_at(builder, halves, place, distance, size), vector) for place in places]
        store_rows(builder, exchanged(builder, rows), target, target_stride, types.float32, count)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(halves, integer, integer, target, integer, integer), codegen
