"""Memory access of the CPU kernels: SIMD vectors (`Vec`) loaded and stored through typed pointers.

`pointer(address, one)` makes a pointer to elements of the type of `one`; `load(p, i)` and `store(p, i, v)` move a full
register, `load_like(p, i, v)` as many lanes as v has. `full(scalar)` and `narrow(scalar, LANES)` make such a v.

Vectors may overrun: in scratch memory, a loop over full registers reads and writes up to one register past the last
valid element. Every buffer there has room for that: at least 64 bytes, `OVERRUN` elements. The caller's arrays are
never accessed past their ends; prefetches may go anywhere.

A pointer to 16-bit integers is one to a half type (`_formulas.halves`): loads widen to float32, stores round to it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from numdcn._formulas import halves
from numdcn._formulas.jit import lanes
from numdcn._formulas.vectors import I32, I64, Vec, llvm_type, splat_value, suffix

OVERRUN = 16  # elements in the widest register


def vector_at(builder: Any, pointer: Any, index: Any, vector: ir.VectorType) -> Any:
    """IR: the address of a vector starting at element `index`."""
    return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())


def load_value(builder: Any, pointer: Any, index: Any, vector: ir.VectorType, element: Any = None) -> Any:
    """IR: an unaligned vector load; `element` is the Numba type of what is in memory, if it may be a half type."""
    half = halves.number_type(element) != element
    kind = ir.VectorType(halves.I16, vector.count) if half else vector
    loaded = builder.load(vector_at(builder, pointer, index, kind))
    loaded.align = 1 if half else 4
    return halves.widened(builder, loaded, element) if half else loaded


def store_value(builder: Any, value: Any, pointer: Any, index: Any, element: Any = None) -> None:
    """IR: an unaligned vector store; `element` as in `load_value`."""
    half = halves.number_type(element) != element
    if half:
        value = halves.rounded(builder, value, element)
    builder.store(value, vector_at(builder, pointer, index, value.type)).align = 1 if half else 4


def _load_scalar(builder: Any, pointer: Any, index: Any, element: Any) -> Any:
    """IR: one element of a Numba type."""
    if halves.number_type(element) == element:
        return builder.load(builder.gep(pointer, [index]))
    lane = load_value(builder, pointer, index, ir.VectorType(ir.FloatType(), 1), element)
    return builder.extract_element(lane, ir.Constant(I32, 0))


@intrinsic
def as_int32(typingctx, integer, vector):
    """`integer` as int32, in as many lanes as `vector` has."""
    result = Vec(types.int32, vector.count) if isinstance(vector, Vec) else types.int32

    def codegen(context, builder, sig, args):
        value = context.cast(builder, args[0], sig.args[0], types.int32)
        return splat_value(builder, value, vector.count) if isinstance(vector, Vec) else value

    return result(integer, vector), codegen


@intrinsic
def narrow(typingctx, scalar, count):
    """A vector with a constant number of lanes, fewer than a full register, with `scalar` in every lane."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    vec = Vec(scalar, count.literal_value)
    return vec(scalar, count), lambda context, builder, sig, args: splat_value(builder, args[0], vec.count)


@intrinsic
def full(typingctx, scalar):
    """A full register with `scalar` in every lane."""
    vec = Vec(scalar, lanes(scalar))
    return vec(scalar), lambda context, builder, sig, args: splat_value(builder, args[0], vec.count)


# Memory.


def prefetch_value(builder: Any, pointer: Any) -> None:
    """IR: prefetch the cache line at `pointer` into L2. Any address is allowed."""
    byte = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    read, near, data = (ir.Constant(I32, i) for i in (0, 2, 1))
    function_type = ir.FunctionType(ir.VoidType(), [byte.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    builder.call(function, [byte, read, near, data])


@intrinsic
def prefetch(typingctx, p, index):
    """Prefetch the cache line of element `index` into L2. Any index is allowed."""

    def codegen(context, builder, sig, args):
        prefetch_value(builder, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(p, types.intp), codegen


@intrinsic
def pointer(typingctx, address, one):
    """The address as a pointer to elements of the type of `one`."""
    result = types.CPointer(one)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(address, one), codegen


@intrinsic
def at(typingctx, p, index):
    """The pointer to element `index` of p."""
    return p(p, types.intp), lambda context, builder, sig, args: builder.gep(args[0], [args[1]])


@intrinsic
def load(typingctx, p, index):
    """A full register starting at element `index`."""
    number = halves.number_type(p.dtype)
    vec = Vec(number, lanes(number))
    return vec(p, types.intp), lambda context, builder, sig, args: load_value(builder, *args, llvm_type(vec), p.dtype)


@intrinsic
def load_like(typingctx, p, index, vector):
    """A vector of the type of `vector`, or a scalar if it is one, starting at element `index`."""

    def codegen(context, builder, sig, args):
        if isinstance(vector, Vec):
            return load_value(builder, args[0], args[1], llvm_type(vector), p.dtype)
        return _load_scalar(builder, args[0], args[1], p.dtype)

    return vector(p, types.intp, vector), codegen


@intrinsic
def load_scalar(typingctx, p, index):
    """Element `index`."""
    result = halves.number_type(p.dtype)
    return result(p, types.intp), lambda context, builder, sig, args: _load_scalar(builder, *args, p.dtype)


@intrinsic
def load_once(typingctx, p, index):
    """Element `index` of memory that others may be writing; however it is used, the compiler reads it only once.

    So a value that passed a range check is the value that is used.
    """

    def codegen(context, builder, sig, args):
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "monotonic", p.dtype.bitwidth // 8)

    return p.dtype(p, types.intp), codegen


@intrinsic
def store(typingctx, p, index, value):
    """Write a vector or a scalar at element `index`."""

    def codegen(context, builder, sig, args):
        if isinstance(value, Vec):
            store_value(builder, args[2], args[0], args[1], p.dtype)
            return context.get_dummy_value()
        number = halves.number_type(p.dtype)
        cast = context.cast(builder, args[2], sig.args[2], number)
        if number != p.dtype:
            store_value(builder, splat_value(builder, cast, 1), args[0], args[1], p.dtype)
        else:
            builder.store(cast, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(p, types.intp, value), codegen


def _masked(builder: Any, name: str, result: Any, vector: Any, *args: Any) -> Any:
    """IR: a masked load or store; lanes that are off touch no memory."""
    function_type = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.masked.{name}.{suffix(vector)}.p0")
    return builder.call(function, args)


@intrinsic
def load_masked(typingctx, p, index, mask):
    """As many elements starting at `index` as the mask has lanes; lanes that are off are 0 and read nothing."""
    vec = Vec(p.dtype, mask.count)

    def codegen(context, builder, sig, args):
        vector = llvm_type(vec)
        source, zero = vector_at(builder, args[0], args[1], vector), ir.Constant(vector, None)
        return _masked(builder, "load", vector, vector, source, ir.Constant(I32, 4), args[2], zero)

    return vec(p, types.intp, mask), codegen


@intrinsic
def store_masked(typingctx, p, index, value, mask):
    """Write the lanes of `value` that the mask selects, starting at element `index`."""

    def codegen(context, builder, sig, args):
        target = vector_at(builder, args[0], args[1], args[2].type)
        _masked(builder, "store", ir.VoidType(), args[2].type, args[2], target, ir.Constant(I32, 4), args[3])
        return context.get_dummy_value()

    return types.void(p, types.intp, value, mask), codegen


@intrinsic
def first_lanes(typingctx, count, vector):
    """A mask for a vector like `vector`: its first `count` lanes, which may be none or more than there are."""
    mask = Vec(types.boolean, vector.count)

    def codegen(context, builder, sig, args):
        numbers = ir.Constant(ir.VectorType(I64, vector.count), list(range(vector.count)))
        return builder.icmp_signed("<", numbers, splat_value(builder, args[0], vector.count))

    return mask(types.int64, vector), codegen


@intrinsic
def some_lane(typingctx, mask):
    """Whether a mask has any lane on."""

    def codegen(context, builder, sig, args):
        bits = builder.bitcast(args[0], ir.IntType(mask.count))
        return context.cast(builder, builder.icmp_unsigned("!=", bits, bits.type(0)), types.boolean, types.boolean)

    return types.boolean(mask), codegen


@intrinsic
def width(typingctx, one):
    """Lanes of a full register of the type of `one`, a constant to the compiler."""
    count = lanes(one)
    return types.intp(one), lambda context, builder, sig, args: ir.Constant(I64, count)


@intrinsic
def next_task(typingctx, address):
    """Take the next number from the counter at `address`, made by `parameters.parameters` and shared by a call's
    threads."""

    def codegen(context, builder, sig, args):
        counter = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.intp), codegen
