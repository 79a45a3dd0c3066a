"""Kernel parameters: a nested NamedTuple passed as one int64 array. Fields are ints, tuples of ints, or such
NamedTuples.

Unboxing tuples field by field would make up most of a kernel's machine code and compile time.
"""

from __future__ import annotations

import functools
import struct
import typing
from array import array
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, models, register_model

from numdcn._formulas.vectors import I64


class Place(NamedTuple):
    """Where a kernel finds an array's elements: the address of the first, and strides in elements."""

    address: int
    strides: tuple[int, int, int, int]  # zeros where there are fewer axes


class Numbers:
    """Whole numbers in memory, which kernels read at `address`: that of a copy, if one is given."""

    __slots__ = ("address", "memory")

    def __init__(self, values: Iterable[int], address: int = 0) -> None:
        self.memory = array("q", values)
        self.address = address or self.memory.buffer_info()[0]

    def __len__(self) -> int:
        return len(self.memory)


@functools.lru_cache(256)
def channel_bounds(channels: int, block: int) -> Numbers:
    """The first channel of each block of channels, then the end."""
    return Numbers([*range(0, channels, block), channels])


NOWHERE = Place(0, (0, 0, 0, 0))  # the place of an absent array


RECURRING = 8  # words above which a part without places is looked for among those of earlier calls
COUNTER = bytes(
    8 * 17
)  # the counter, after enough unused words that it shares no pair of cache lines with the parameters
_known: dict[int, tuple[Any, bytes]] = {}  # by the id of a part, the part and its words; problems and blockings recur


def parameters(value: Any) -> tuple[array, int]:  # type: ignore[type-arg]
    """The int64 array that `unpack` reads, and the address of a task counter at its end."""
    words = array("q", words_of(value) + COUNTER)
    address, count = words.buffer_info()
    return words, address + 8 * (count - 1)


def words_of(value: Any) -> bytes:
    """The words that `unpack` reads."""
    kind: Any = type(value)
    return _writer(kind)(value)


@functools.cache
def _writer(kind: Any) -> Callable[[Any], bytes]:
    """The function that turns a `kind` into the bytes of its words. Each is a single expression, such as
    `known(v[0]) + pack_3(v[1], *v[2])`: a call has little else to do, so a loop over the fields would take most of it."""
    pieces: list[str] = []
    names: dict[str, Any] = {"known": _words}
    run: list[str] = []
    length = 0

    def end_run() -> None:
        nonlocal length
        if run:
            names[f"pack_{length}"] = struct.Struct(f"={length}q").pack
            pieces.append(f"pack_{length}({', '.join(run)})")
        run.clear()
        length = 0

    def add(annotation: Any, path: str) -> None:
        nonlocal length
        if not hasattr(annotation, "_fields"):
            run.append(path if annotation is int else f"*{path}")
            length += _length(annotation)
        elif _length(annotation) > RECURRING and not _has_places(annotation) and path != "v":
            end_run()
            pieces.append(f"known({path})")
        else:
            for i, field in enumerate(_field_types(annotation)):
                add(field, f"{path}[{i}]")

    add(kind, "v")
    end_run()
    return eval(f"lambda v: {' + '.join(pieces)}", names)


def _words(value: Any) -> bytes:
    """The words of a part that recurs."""
    kind: Any = type(value)
    found = _known.get(id(value))
    if found is None or found[0] is not value:
        if len(_known) >= 512:
            _known.clear()
        _known[id(value)] = found = value, _writer(kind)(value)
    return found[1]


@functools.cache
def _field_types(kind: Any) -> list[Any]:
    """The annotations of a NamedTuple's fields."""
    hints = typing.get_type_hints(kind)
    return [hints[name] for name in kind._fields]


@functools.cache
def _length(annotation: Any) -> int:
    """The number of words of an int, a tuple of ints, or a NamedTuple of these."""
    if hasattr(annotation, "_fields"):
        return sum(map(_length, _field_types(annotation)))
    return 1 if annotation is int else len(typing.get_args(annotation))


def _has_places(annotation: Any) -> bool:
    """Whether a NamedTuple holds addresses, which are others in each call."""
    return annotation is Place or any(
        hasattr(field, "_fields") and _has_places(field) for field in _field_types(annotation)
    )


class Record(types.Type):
    """A NamedTuple stored as int64s at an address. A kernel carries the address alone, and reads a field where it is used."""

    def __init__(self, cls: Any) -> None:
        self.fields: dict[str, tuple[int, Any]] = {}  # of each, words before it, and its type
        start = 0
        for name, annotation in zip(cls._fields, _field_types(cls), strict=True):
            self.fields[name] = start, _numba_type(annotation)
            start += _length(annotation)
        self.cls = cls
        super().__init__(name=f"Record({cls.__module__}.{cls.__qualname__})")

    @property
    def key(self) -> Any:
        """What makes records equal: two classes may have the same name."""
        return self.name, self.cls


@register_model(Record)
class _RecordModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Record) -> None:
        super().__init__(dmm, fe_type, I64)


@functools.cache
def _numba_type(annotation: Any) -> Any:
    """The Numba type of an annotation: int, a tuple of ints, or a NamedTuple of these."""
    if annotation is int:
        return types.int64
    if hasattr(annotation, "_fields"):
        return Record(annotation)
    if typing.get_origin(annotation) is tuple and set(typing.get_args(annotation)) == {int}:
        return types.UniTuple(types.int64, len(typing.get_args(annotation)))  # type: ignore[attr-defined]
    raise TypeError(f"a parameter is annotated as {annotation}, expected int, a tuple of ints or a NamedTuple of these")


@infer_getattr
class _Fields(AttributeTemplate):
    key = Record

    def generic_resolve(self, record: Record, name: str) -> Any:
        return record.fields[name][1] if name in record.fields else None


@lower_getattr_generic(Record)
def _read_field(context: Any, builder: Any, record: Record, address: Any, name: str) -> Any:
    start, kind = record.fields[name]
    address = builder.add(address, ir.Constant(I64, 8 * start))
    if isinstance(kind, Record):
        return address
    if kind == types.int64:
        return _read_word(builder, address, 0)
    return context.make_tuple(builder, kind, [_read_word(builder, address, i) for i in range(kind.count)])


def _read_word(builder: Any, address: Any, i: int) -> Any:
    """IR: the i-th int64 at an address, which no kernel ever changes."""
    word = builder.load(builder.gep(builder.inttoptr(address, I64.as_pointer()), [ir.Constant(I64, i)]))
    word.set_metadata("invariant.load", builder.module.add_metadata([]))
    return word


@intrinsic
def unpack(typingctx, address, cls):
    """The NamedTuple `cls` stored as int64s at `address`, as a `Record`."""
    if not isinstance(cls, types.NamedTupleClass):
        return None
    return Record(cls.instance_class)(address, cls), lambda context, builder, sig, args: args[0]
