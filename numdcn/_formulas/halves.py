"""float16 and bfloat16 as LLVM vectors: their bits widened to float32, and float32 rounded to them.

Widening is exact. Rounding goes to the nearest number, of two as near to the one whose last bit is 0; subnormal numbers
are kept, a NaN stays one, and what float16 cannot hold becomes infinite. Where the processor converts float16 itself,
LLVM's `fpext` and `fptrunc` become its instructions; elsewhere they would call a library, so integers do the same.
(bfloat16 is the upper half of a float32. AVX512-BF16 is not used here: its rounding drops subnormal numbers.)

Numba has neither type on a CPU. A pointer to 16-bit integers stands for one to a half type: unsigned for float16, signed
for bfloat16 (`FLOAT16`, `BFLOAT16`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from numdcn._formulas.jit import target
from numdcn._formulas.vectors import I32

FLOAT16, BFLOAT16 = types.uint16, types.int16
I16 = ir.IntType(16)


def number_type(element: Any) -> Any:
    """The Numba type of the numbers that elements of a type stand for."""
    return types.float32 if element in (FLOAT16, BFLOAT16) else element


def converts_float16() -> bool:
    """Whether the target has instructions between float16 and float32."""
    architecture, _, features = target()
    return "f16c" in features or architecture in ("aarch64", "arm64")


def _like(vector: ir.VectorType, element: Any) -> ir.VectorType:
    return ir.VectorType(element, vector.count)


def _number(vector: ir.VectorType, value: int) -> Any:
    """IR: an integer in every lane."""
    return ir.Constant(vector, [value] * vector.count)


class _Bits:
    """IR of 32-bit integers, lane by lane; ints stand for constants."""

    def __init__(self, builder: Any, vector: ir.VectorType) -> None:
        self.builder, self.vector = builder, vector

    def _pair(self, a: Any, b: Any) -> tuple[Any, Any]:
        made = tuple(_number(self.vector, value) if isinstance(value, int) else value for value in (a, b))
        return made[0], made[1]

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.add(*self._pair(a, b))

    def both(self, a: Any, b: Any) -> Any:
        return self.builder.and_(*self._pair(a, b))

    def either(self, a: Any, b: Any) -> Any:
        return self.builder.or_(*self._pair(a, b))

    def left(self, a: Any, count: int) -> Any:
        return self.builder.shl(a, _number(self.vector, count))

    def right(self, a: Any, count: int) -> Any:
        return self.builder.lshr(a, _number(self.vector, count))

    def where_less(self, a: Any, limit: int, yes: Any, no: Any) -> Any:
        """`yes` where a, not negative, is below the limit, else `no`."""
        return self.builder.select(self.builder.icmp_signed("<", a, _number(self.vector, limit)), *self._pair(yes, no))


def _widened_float16(builder: Any, halves: Any) -> Any:
    """IR: the float32s that these bits of float16 stand for, without the processor's help."""
    vector = _like(halves.type, I32)
    floats, bits = _like(vector, ir.FloatType()), _Bits(builder, vector)
    wide = builder.zext(halves, vector)
    magnitude = bits.both(wide, 0x7FFF)
    shifted = bits.left(magnitude, 13)  # exponent and mantissa in their places, the exponent too small by 112
    unit = ir.Constant(floats, [2.0**-24] * floats.count)  # of the subnormal numbers
    small = builder.bitcast(builder.fmul(builder.sitofp(magnitude, floats), unit), vector)
    quiet = bits.where_less(magnitude, 0x7C01, 0, 1 << 22)  # an instruction makes every NaN a quiet one, too
    special = bits.either(bits.add(shifted, 224 << 23), quiet)  # infinities and NaN
    normal = bits.where_less(magnitude, 0x7C00, bits.add(shifted, 112 << 23), special)
    sign = bits.left(bits.both(wide, 0x8000), 16)
    return builder.bitcast(bits.either(sign, bits.where_less(magnitude, 0x0400, small, normal)), floats)


def _rounded_float16(builder: Any, singles: Any) -> Any:
    """IR: bits of the float16s nearest to float32s, without the processor's help."""
    floats, vector = singles.type, _like(singles.type, I32)
    bits = _Bits(builder, vector)
    whole = builder.bitcast(singles, vector)
    magnitude = bits.both(whole, 0x7FFFFFFF)
    even = bits.both(bits.right(magnitude, 13), 1)
    normal = bits.right(bits.add(bits.add(magnitude, 0xFFF - (112 << 23)), even), 13)
    # the last place of 0.5 is the unit of the subnormal numbers, so adding 0.5 rounds to them
    half = ir.Constant(floats, [0.5] * floats.count)
    moved = builder.bitcast(builder.fadd(builder.bitcast(magnitude, floats), half), vector)
    finite = bits.where_less(magnitude, 0x38800000, bits.add(moved, -0x3F000000), normal)  # below 2^-14
    nan = bits.either(bits.both(bits.right(magnitude, 13), 0x1FF), 0x7E00)
    special = bits.where_less(magnitude, 0x7F800001, 0x7C00, nan)
    made = bits.where_less(magnitude, 0x477FF000, finite, special)  # from 65520 on infinite
    return builder.trunc(bits.either(made, bits.both(bits.right(whole, 16), 0x8000)), _like(vector, I16))


def _widened_bfloat16(builder: Any, halves: Any) -> Any:
    """IR: the float32s that these bits of bfloat16 stand for."""
    vector = _like(halves.type, I32)
    wide = _Bits(builder, vector).left(builder.zext(halves, vector), 16)
    return builder.bitcast(wide, _like(vector, ir.FloatType()))


def _rounded_bfloat16(builder: Any, singles: Any) -> Any:
    """IR: bits of the bfloat16s nearest to float32s."""
    vector = _like(singles.type, I32)
    bits = _Bits(builder, vector)
    whole = builder.bitcast(singles, vector)
    upper = bits.right(whole, 16)
    number = bits.right(bits.add(bits.add(whole, 0x7FFF), bits.both(upper, 1)), 16)
    is_number = bits.both(whole, 0x7FFFFFFF)
    made = bits.where_less(is_number, 0x7F800001, number, bits.either(upper, 0x40))
    return builder.trunc(made, _like(vector, I16))


def widened(builder: Any, halves: Any, element: Any) -> Any:
    """IR: float32s of bits of a half type, lane by lane."""
    if element == BFLOAT16:
        return _widened_bfloat16(builder, halves)
    if not converts_float16():
        return _widened_float16(builder, halves)
    return builder.fpext(builder.bitcast(halves, _like(halves.type, ir.HalfType())), _like(halves.type, ir.FloatType()))


def rounded(builder: Any, singles: Any, element: Any) -> Any:
    """IR: bits of the numbers of a half type nearest to float32s, lane by lane."""
    if element == BFLOAT16:
        return _rounded_bfloat16(builder, singles)
    if not converts_float16():
        return _rounded_float16(builder, singles)
    return builder.bitcast(builder.fptrunc(singles, _like(singles.type, ir.HalfType())), _like(singles.type, I16))
