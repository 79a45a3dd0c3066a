"""Four or eight elements of global memory at a time, as 32-bit words: two words, or four."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from numdcn._call.numba_cuda import intrinsic, types
from numdcn._cuda.jit import device
from numdcn._cuda.memory import I32, I64, asm, compiled_as, load_words, place_of


@intrinsic
def _load_two(typingctx, array, index, words, first):
    def codegen(context, builder, sig, args):
        place = builder.ptrtoint(place_of(context, builder, sig.args[0], args[0], args[1]), I64)
        kind = ir.LiteralStructType([I32] * 2)
        both = asm(builder, kind, "ld.global.nc.v2.b32 {$0,$1}, [$2];", "=r,=r,l", [place], False)
        for i in range(2):
            position = builder.add(args[3], ir.Constant(args[3].type, i))
            builder.store(builder.extract_value(both, i), place_of(context, builder, sig.args[2], args[2], position))
        return context.get_dummy_value()

    return types.void(array, types.int64, words, types.int64), codegen


def _check(array: Any, index: int, nbytes: int) -> None:
    address = array.elements.ctypes.data + (int(index) + array.origin) * array.elements.itemsize
    if address % nbytes:
        raise ValueError(f"{nbytes} bytes are used at element {index}, which is not at a multiple of {nbytes} bytes")


@compiled_as(_load_two)
def load_two(array, index, words, first):
    """Read 8 bytes of memory that nothing writes in the meantime into words[first] and words[first + 1]."""
    _check(array, index, 8)
    words[first : first + 2] = np.array([array[index + i] for i in range(8 // array.elements.itemsize)]).view(np.uint32)


def _storing(count: int) -> Any:
    """The intrinsic that stores so many words."""

    @intrinsic
    def store(typingctx, array, index, words):
        def codegen(context, builder, sig, args):
            vector = ir.Constant(ir.VectorType(I32, count), ir.Undefined)
            for i in range(count):
                word = builder.load(place_of(context, builder, sig.args[2], args[2], ir.Constant(I64, i)))
                vector = builder.insert_element(vector, word, ir.Constant(I32, i))
            place = place_of(context, builder, sig.args[0], args[0], args[1])
            builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=4 * count)
            return context.get_dummy_value()

        return types.void(array, types.int64, words), codegen

    return store


def _simulated_store(array: Any, index: int, words: Any, count: int) -> None:
    _check(array, index, 4 * count)
    for i, element in enumerate(np.array(words[:count]).view(array.elements.dtype)):
        array[index + i] = element


@compiled_as(_storing(2))
def store_two(array, index, words):
    """Store two words as elements, at a multiple of 8 bytes."""
    _simulated_store(array, index, words, 2)


@compiled_as(_storing(4))
def store_four(array, index, words):
    """Store four words as elements, at a multiple of 16 bytes."""
    _simulated_store(array, index, words, 4)


def word_mover(WORDS: int) -> tuple[Any, Any]:
    """Make `load(array, index, words, first)` and `store(array, index, words)` for two words or four."""

    @device
    def load(array, index, words, first):
        if WORDS == 4:
            load_words(array, index, words, first)
        else:
            load_two(array, index, words, first)

    @device
    def store(array, index, words):
        if WORDS == 4:
            store_four(array, index, words)
        else:
            store_two(array, index, words)

    return load, store
