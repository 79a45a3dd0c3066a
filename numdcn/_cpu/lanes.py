"""Operations across the lanes of SIMD vectors: transposing blocks, and sums in a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from numdcn._cpu.simd import load_value, store_value
from numdcn._formulas.halves import number_type
from numdcn._formulas.jit import lanes
from numdcn._formulas.vectors import I32, I64, Vec


def shuffle(builder: Any, a: Any, b: Any, picks: list[int]) -> Any:
    """IR: the lanes `picks` of the concatenation of a and b."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(picks)), picks))


@intrinsic
def transpose(typingctx, source, stride, target, target_stride):
    """target[j * target_stride + i] = source[i * stride + j] for i, j < L, the number of lanes of a full register."""
    number = number_type(source.dtype)
    count = lanes(number)

    def codegen(context, builder, sig, args):
        vector = ir.VectorType(context.get_value_type(number), count)
        places = [[builder.mul(args[n], ir.Constant(I64, i)) for i in range(count)] for n in (1, 3)]
        rows = [load_value(builder, args[0], place, vector, source.dtype) for place in places[0]]
        step = 1
        while step < count:  # exchange the off-diagonal blocks of step x step elements
            for i in range(count):
                if not i & step:
                    a, b = rows[i], rows[i + step]
                    low = [j if not j & step else count + j - step for j in range(count)]
                    high = [j + step if not j & step else count + j for j in range(count)]
                    rows[i], rows[i + step] = shuffle(builder, a, b, low), shuffle(builder, a, b, high)
            step *= 2
        for row, place in zip(rows, places[1], strict=True):
            store_value(builder, row, args[2], place, target.dtype)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), codegen


@intrinsic
def room(typingctx, one):
    """Memory of the calling kernel for L * L elements of the type of `one`, on its stack: L as in `transpose`."""
    count, result = lanes(one), types.CPointer(one)

    def codegen(context, builder, sig, args):
        memory = cgutils.alloca_once(builder, context.get_value_type(one), count * count)
        memory.align = 64
        return memory

    return result(one), codegen


def _sums(builder: Any, vectors: list[Any], wanted: int) -> Any:
    """IR: a tuple of the sums of the lanes of the first `wanted` of 2 or 4 vectors, added in a fixed order."""
    values, count, spread = vectors, vectors[0].type.count, vectors[0].type.count
    while len(values) > 1 and spread > 1:  # merge two vectors into one with their half-sums side by side
        even = [2 * j for j in range(count // 2)] + [count + 2 * j for j in range(count // 2)]
        odd = [i + 1 for i in even]
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [builder.fadd(shuffle(builder, a, b, even), shuffle(builder, a, b, odd)) for a, b in pairs]
        spread //= 2
    while spread > 1:  # all sums are in one vector, each in `spread` lanes
        even = [s * spread + 2 * j for s in range(len(vectors)) for j in range(spread // 2)]
        odd = [i + 1 for i in even]
        values = [
            builder.fadd(shuffle(builder, values[0], values[0], even), shuffle(builder, values[0], values[0], odd))
        ]
        spread //= 2
    each = len(vectors) // len(values)
    sums = [builder.extract_element(values[i // each], ir.Constant(I32, i % each)) for i in range(wanted)]
    return cgutils.pack_array(builder, sums)


@intrinsic
def sum3(typingctx, a, b, c):
    """The sums of the lanes of a, b and c (or the scalars themselves), as a tuple."""
    if not isinstance(a, Vec):
        return types.UniTuple(a, 3)(a, b, c), lambda context, builder, sig, args: cgutils.pack_array(builder, args)
    result = types.UniTuple(a.element, 3)

    def codegen(context, builder, sig, args):
        return _sums(builder, [*args, ir.Constant(args[0].type, None)], 3)

    return result(a, b, c), codegen


@intrinsic
def sum1(typingctx, a):
    """The sum of the lanes of a, added in a fixed order."""

    def codegen(context, builder, sig, args):
        value, count = args[0], args[0].type.count
        while count > 1:
            count //= 2
            low, high = list(range(count)), list(range(count, 2 * count))
            value = builder.fadd(shuffle(builder, value, value, low), shuffle(builder, value, value, high))
        return builder.extract_element(value, ir.Constant(I32, 0))

    return a.element(a), codegen


def _pick_lanes(a: Any, picks: Callable[[int], list[int]]) -> Any:
    """Signature and code of an intrinsic that picks lanes of two vectors one after the other."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return shuffle(builder, args[0], args[1], picks(a.count))

    return a(a, a), codegen


@intrinsic
def even_lanes(typingctx, a, b):
    """Lanes 0, 2, 4, ... of a, then of b."""
    return _pick_lanes(a, lambda count: list(range(0, 2 * count, 2)))


@intrinsic
def odd_lanes(typingctx, a, b):
    """Lanes 1, 3, 5, ... of a, then of b."""
    return _pick_lanes(a, lambda count: list(range(1, 2 * count, 2)))


@intrinsic
def alternate_low(typingctx, a, b):
    """The first half of a and b, their lanes in turn: a0, b0, a1, b1, ..."""
    return _pick_lanes(a, lambda count: [i // 2 + i % 2 * count for i in range(count)])


@intrinsic
def alternate_high(typingctx, a, b):
    """The second half of a and b, their lanes in turn."""
    return _pick_lanes(a, lambda count: [count // 2 + i // 2 + i % 2 * count for i in range(count)])
