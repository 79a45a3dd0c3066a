"""Loads that may be switched off, and stores of vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from numdcn._call.numba_cuda import intrinsic, types
from numdcn._cuda.jit import F16, F32, F64
from numdcn._cuda.memory import (
    DOUBLE,
    FLOAT,
    HALF,
    I16,
    I32,
    I64,
    asm,
    at,
    compiled_as,
    load_vector,
    narrow,
    narrowed,
    place_of,
    widen,
)


def _switched(zeros: str, load: str, switch: int) -> str:
    """PTX: a load by the threads whose operand number `switch` is not 0; zeros for the others."""
    return f"{{ .reg .pred live; setp.ne.b32 live, ${switch}, 0; {zeros} @live {load} }}"


def _widened(builder: Any, dtype: Any, half: Any) -> Any:
    """IR: 16 bits, widened."""
    if dtype == F16:
        return builder.fpext(builder.bitcast(half, HALF), FLOAT)
    return builder.bitcast(builder.shl(builder.zext(half, I32), ir.Constant(I32, 16)), FLOAT)


def _element_if(builder: Any, dtype: Any, place: Any, switch: Any) -> list[Any]:
    """IR: an element of global memory that nothing writes, widened."""
    result, letter, name, zero = {
        F32: (FLOAT, "f", "f32", "0f00000000"),
        F64: (DOUBLE, "d", "f64", "0d0000000000000000"),
    }.get(dtype, (I16, "h", "b16", "0"))
    text = _switched(f"mov.{name} $0, {zero};", f"ld.global.nc.{name} $0, [$1];", 2)
    value = asm(builder, result, text, f"=&{letter},l,r", [place, switch], False)
    return [value if dtype in (F32, F64) else _widened(builder, dtype, value)]


def _vector_if(builder: Any, dtype: Any, place: Any, switch: Any) -> list[Any]:
    """IR: the elements of 16 bytes of global memory that nothing writes, widened."""
    if dtype == F64:
        zeros = " ".join(f"mov.f64 ${i}, 0d0000000000000000;" for i in range(2))
        text = _switched(zeros, "ld.global.nc.v2.f64 {$0,$1}, [$2];", 3)
        packed = asm(builder, ir.LiteralStructType([DOUBLE] * 2), text, "=&d,=&d,l,r", [place, switch], False)
        return [builder.extract_value(packed, i) for i in range(2)]
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    text = _switched(zeros, "ld.global.nc.v4.b32 {$0,$1,$2,$3}, [$4];", 5)
    packed = asm(builder, ir.LiteralStructType([I32] * 4), text, "=&r,=&r,=&r,=&r,l,r", [place, switch], False)
    words = [builder.extract_value(packed, i) for i in range(4)]
    if dtype == F32:
        return [builder.bitcast(word, FLOAT) for word in words]
    halves = [builder.trunc(builder.lshr(word, ir.Constant(I32, shift)), I16) for word in words for shift in (0, 16)]
    return [_widened(builder, dtype, half) for half in halves]


def _loader(read: Callable[..., list[Any]]) -> Any:
    """The intrinsic of a load."""

    @intrinsic
    def load(typingctx, live, array, index, target, first):
        def codegen(context, builder, sig, args):
            _, source, _, into, _ = sig.args
            place = builder.ptrtoint(place_of(context, builder, source, args[1], args[2]), I64)
            for i, value in enumerate(read(builder, source.dtype, place, builder.zext(args[0], I32))):
                position = builder.add(args[4], ir.Constant(args[4].type, i))
                builder.store(value, place_of(context, builder, into, args[3], position))
            return context.get_dummy_value()

        return types.void(types.boolean, array, types.int64, target, types.int64), codegen

    return load


@compiled_as(_loader(_element_if))
def load_element_if(live, array, index, target, first):
    """Read an element of memory that nothing writes in the meantime, widened, into target[first]; zero, and no access,
    unless `live`."""
    target[first] = widen(at(array, index)) if live else 0


@compiled_as(_loader(_vector_if))
def load_vector_if(live, array, index, target, first):
    """The same for 16 bytes, into target[first], target[first + 1], ..."""
    if live:
        load_vector(array, index, target, first)
    else:
        target[first : first + 16 // array.elements.itemsize] = 0


@intrinsic
def _store_vector(typingctx, array, index, values):
    def codegen(context, builder, sig, args):
        target, kind, _ = sig.args[0], sig.args[2], sig.return_type
        element = context.get_data_type(target.dtype)
        count = 128 // target.dtype.bitwidth
        vector = ir.Constant(ir.VectorType(element, count), ir.Undefined)
        for i in range(count):
            value = builder.load(place_of(context, builder, kind, args[2], ir.Constant(I64, i)))
            value = narrowed(context, builder, value, kind.dtype, target.dtype)
            vector = builder.insert_element(vector, value, ir.Constant(I32, i))
        words = builder.bitcast(vector, ir.VectorType(I32, 4))
        place = place_of(context, builder, target, args[0], args[1])
        builder.store(words, builder.bitcast(place, words.type.as_pointer()), align=16)
        return context.get_dummy_value()

    return types.void(array, types.int64, values), codegen


@compiled_as(_store_vector)
def store_vector(array, index, values):
    """Store values[0], values[1], ... as the elements of 16 bytes, rounded to nearest even, at a multiple of 16 bytes."""
    stored = array.elements.dtype
    for i in range(16 // stored.itemsize):
        array[index + i] = narrow(values[i], types.uint16 if stored == np.uint16 else stored)
