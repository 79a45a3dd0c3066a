"""Kernel parameters: a nested NamedTuple passed as one int64 array. Fields are ints, tuples of ints, or such
NamedTuples.

Unboxing tuples field by field would make up most of a kernel's machine code and compile time.
"""

from __future__ import annotations

import functools
import typing
from array import array
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from numdcn._formulas.vectors import I64


class Place(NamedTuple):
    """Where a kernel finds an array's elements: the address of the first, and strides in elements."""

    address: int
    strides: tuple[int, int, int, int]  # zeros where there are fewer axes


NOWHERE = Place(0, (0, 0, 0, 0))  # the place of an absent array


def flatten(value: Any) -> list[int]:
    """The ints of a nested tuple, in order."""
    flat: list[int] = []
    for item in value:
        if type(item) is int:
            flat.append(item)
        elif isinstance(item, tuple):
            flat += _flatten_large(item) if len(item) > 8 else flatten(item)
        else:  # a bool or a NumPy integer; `array` rejects anything else
            flat.append(item)
    return flat


@functools.lru_cache(256)
def _flatten_large(value: Any) -> list[int]:
    """`flatten`, cached: problems and blockings recur, and so do the places of arrays, in the second kernel of a
    backward and when a caller reuses its arrays."""
    return flatten(value)


_COUNTER = [0] * 17  # the counter, after enough unused words that it shares no pair of cache lines with the parameters


def parameters(value: Any) -> tuple[array, int]:  # type: ignore[type-arg]
    """The int64 array that `unpack` reads, and the address of a task counter at its end."""
    words = array("q", flatten(value) + _COUNTER)
    address, count = words.buffer_info()
    return words, address + 8 * (count - 1)


@functools.cache
def _numba_type(annotation: Any) -> Any:
    """The Numba type of an annotation: int, a tuple of ints, or a NamedTuple of these."""
    if annotation is int:
        return types.int64
    if hasattr(annotation, "_fields"):
        hints = typing.get_type_hints(annotation)
        fields = [_numba_type(hints[name]) for name in annotation._fields]
        return types.BaseTuple.from_types(fields, annotation)  # type: ignore[attr-defined]
    if typing.get_origin(annotation) is tuple and set(typing.get_args(annotation)) == {int}:
        return types.UniTuple(types.int64, len(typing.get_args(annotation)))  # type: ignore[attr-defined]
    raise TypeError(f"a parameter is annotated as {annotation}, expected int, a tuple of ints or a NamedTuple of these")


def _build(context: Any, builder: Any, pointer: Any, numba_type: Any, position: int) -> tuple[Any, int]:
    """IR: a value of a Numba type read from the int64s starting at `position`; returns it and the position after it."""
    if numba_type == types.int64:
        return builder.load(builder.gep(pointer, [ir.Constant(I64, position)])), position + 1
    values = []
    for field_type in numba_type:
        value, position = _build(context, builder, pointer, field_type, position)
        values.append(value)
    return context.make_tuple(builder, numba_type, values), position


@intrinsic
def unpack(typingctx, address, cls):
    """The NamedTuple `cls` stored as flattened ints at `address`."""
    if not isinstance(cls, types.NamedTupleClass):
        return None
    result = _numba_type(cls.instance_class)

    def codegen(context, builder, sig, args):
        return _build(context, builder, builder.inttoptr(args[0], I64.as_pointer()), result, 0)[0]

    return result(address, cls), codegen
