"""SIMD vectors for Numba: a type `Vec` with operators, so that a kernel reads like scalar code and compiles to full-width
registers. Vectors live inside kernels only; memory is reached through typed pointers.

`pointer(address, one)` makes a pointer to elements of the type of `one`; `load(p, i)` and `store(p, i, v)` move a full
register, `load_like(p, i, v)` as many lanes as v has. `part(scalar, LANES)` makes a smaller vector.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

from numdcn._kernels.jit_cpu import has_fma, lanes

I32, I64 = ir.IntType(32), ir.IntType(64)


class Vec(types.Type):
    """`count` elements of `element` in one register; of booleans: the result of a comparison."""

    def __init__(self, element: types.Type, count: int) -> None:
        self.element, self.count = element, count
        super().__init__(name=f"Vec({element}, {count})")


def llvm_type(vec: Vec) -> ir.VectorType:
    """The LLVM vector of a `Vec`."""
    scalar = {
        types.float32: ir.FloatType(),
        types.float64: ir.DoubleType(),
        types.int32: I32,
        types.int64: I64,
        types.boolean: ir.IntType(1),
    }
    return ir.VectorType(scalar[vec.element], vec.count)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vec) -> None:
        super().__init__(dmm, fe_type, llvm_type(fe_type))


def splat_value(builder: Any, scalar: Any, count: int) -> Any:
    """IR: a vector with `scalar` in every lane."""
    vector = ir.VectorType(scalar.type, count)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, count), None)
    )


def shuffle(builder: Any, a: Any, b: Any, picks: list[int]) -> Any:
    """IR: the lanes `picks` of a followed by b."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(picks)), picks))


def call_llvm(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """IR: call an LLVM intrinsic by name."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def suffix(kind: Any) -> str:
    """The type part of an LLVM intrinsic's name, such as v16f32 or f64."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{suffix(kind.element)}"
    return "f32" if isinstance(kind, ir.FloatType) else "f64"


def fma_value(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """IR: a * b + c for scalars or vectors, fused where the machine can (else `llvm.fma` would call a library)."""
    if has_fma():
        return call_llvm(builder, f"llvm.fma.{suffix(a.type)}", a.type, a, b, c)
    return builder.fadd(builder.fmul(a, b), c)


def vector_at(builder: Any, pointer: Any, index: Any, vector: ir.VectorType) -> Any:
    """IR: the address of a vector that begins at element `index`."""
    return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())


def load_value(builder: Any, pointer: Any, index: Any, vector: ir.VectorType) -> Any:
    """IR: an unaligned vector load."""
    loaded = builder.load(vector_at(builder, pointer, index, vector))
    loaded.align = 4
    return loaded


def store_value(builder: Any, value: Any, pointer: Any, index: Any) -> None:
    """IR: an unaligned vector store."""
    builder.store(value, vector_at(builder, pointer, index, value.type)).align = 4


# Arithmetic: operators between equal vectors.


class _Binary(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        if len(args) == 2 and isinstance(args[0], Vec) and args[0] == args[1]:
            return signature(self.result(args[0]), *args)
        return None

    def result(self, vec: Vec) -> Vec:
        return vec


class _Comparison(_Binary):
    def result(self, vec: Vec) -> Vec:
        return Vec(types.boolean, vec.count)


def _register(op: Any, template: type, floats: Any, integers: Any) -> None:
    infer_global(op)(type(f"Vec_{op.__name__}", (template,), {}))

    @lower_builtin(op, Vec, Vec)
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit = floats if isinstance(sig.args[0].element, types.Float) else integers
        return emit(builder, *args)


_register(operator.add, _Binary, lambda b, x, y: b.fadd(x, y), lambda b, x, y: b.add(x, y))
_register(operator.sub, _Binary, lambda b, x, y: b.fsub(x, y), lambda b, x, y: b.sub(x, y))
_register(operator.mul, _Binary, lambda b, x, y: b.fmul(x, y), lambda b, x, y: b.mul(x, y))
_register(operator.and_, _Binary, None, lambda b, x, y: b.and_(x, y))
_register(operator.or_, _Binary, None, lambda b, x, y: b.or_(x, y))
_register(operator.ge, _Comparison, lambda b, x, y: b.fcmp_ordered(">=", x, y), None)
_register(operator.lt, _Comparison, lambda b, x, y: b.fcmp_ordered("<", x, y), None)
_register(operator.ne, _Comparison, lambda b, x, y: b.fcmp_unordered("!=", x, y), None)


# Functions of vectors, and of scalars where formulas are shared with code that has no vectors.


@intrinsic
def like(typingctx, scalar, vec):  # type: ignore[no-untyped-def]
    """`scalar`, converted to the element type of `vec`, in every lane (or as it is, where `vec` is a scalar)."""
    if not isinstance(vec, Vec):
        return vec(scalar, vec), lambda context, builder, sig, args: context.cast(
            builder, args[0], sig.args[0], sig.return_type
        )

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        value = context.cast(builder, args[0], sig.args[0], vec.element)
        return splat_value(builder, value, vec.count)

    return vec(scalar, vec), codegen


@intrinsic
def as_int32(typingctx, integer, kind):  # type: ignore[no-untyped-def]
    """`integer` as int32, in as many lanes as `kind` has."""
    result = Vec(types.int32, kind.count) if isinstance(kind, Vec) else types.int32

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        value = context.cast(builder, args[0], sig.args[0], types.int32)
        return splat_value(builder, value, kind.count) if isinstance(kind, Vec) else value

    return result(integer, kind), codegen


@intrinsic
def part(typingctx, scalar, count):  # type: ignore[no-untyped-def]
    """A vector of a constant number of lanes with `scalar` in every lane: its type tells `load_like` what to load."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    vec = Vec(scalar, count.literal_value)
    return vec(scalar, count), lambda context, builder, sig, args: splat_value(builder, args[0], vec.count)


@intrinsic
def full(typingctx, scalar):  # type: ignore[no-untyped-def]
    """A full register with `scalar` in every lane."""
    vec = Vec(scalar, lanes(scalar))
    return vec(scalar), lambda context, builder, sig, args: splat_value(builder, args[0], vec.count)


@intrinsic
def fma(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c, rounded once where the machine has the instruction."""
    return a(a, b, c), lambda context, builder, sig, args: fma_value(builder, *args)


@intrinsic
def select(typingctx, condition, a, b):  # type: ignore[no-untyped-def]
    """a where the condition holds, else b."""
    return a(condition, a, b), lambda context, builder, sig, args: builder.select(*args)


@intrinsic
def floor(typingctx, a):  # type: ignore[no-untyped-def]
    """The largest integer not above a, as a floating number."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return call_llvm(builder, f"llvm.floor.{suffix(args[0].type)}", args[0].type, *args)

    return a(a), codegen


@intrinsic
def to_index(typingctx, a):  # type: ignore[no-untyped-def]
    """A floating integer, known to be in range, as int64."""
    result = Vec(types.int64, a.count) if isinstance(a, Vec) else types.int64

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.fptosi(args[0], context.get_value_type(result))

    return result(a), codegen


# Memory.


def prefetch_value(builder: Any, pointer: Any) -> None:
    """IR: bring the cache line at `pointer` into the L2 cache. Any address will do."""
    byte = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    read, near, data = (ir.Constant(I32, i) for i in (0, 2, 1))
    kind = ir.FunctionType(ir.VoidType(), [byte.type, I32, I32, I32])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [byte, read, near, data])


@intrinsic
def prefetch(typingctx, p, index):  # type: ignore[no-untyped-def]
    """Bring the cache line of element `index` into the L2 cache. Any index will do."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        prefetch_value(builder, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(p, types.intp), codegen


@intrinsic
def pointer(typingctx, address, one):  # type: ignore[no-untyped-def]
    """The address as a pointer to elements of the type of `one`."""
    result = types.CPointer(one)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(address, one), codegen


@intrinsic
def at(typingctx, p, index):  # type: ignore[no-untyped-def]
    """The pointer to element `index` of p."""
    return p(p, types.intp), lambda context, builder, sig, args: builder.gep(args[0], [args[1]])


@intrinsic
def load(typingctx, p, index):  # type: ignore[no-untyped-def]
    """A full register from element `index` on."""
    vec = Vec(p.dtype, lanes(p.dtype))
    return vec(p, types.intp), lambda context, builder, sig, args: load_value(builder, *args, llvm_type(vec))


@intrinsic
def load_like(typingctx, p, index, kind):  # type: ignore[no-untyped-def]
    """A vector of the type of `kind`, or a scalar where it is one, from element `index` on."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        if isinstance(kind, Vec):
            return load_value(builder, args[0], args[1], llvm_type(kind))
        return builder.load(builder.gep(args[0], [args[1]]))

    return kind(p, types.intp, kind), codegen


@intrinsic
def load_scalar(typingctx, p, index):  # type: ignore[no-untyped-def]
    """Element `index`."""
    return p.dtype(p, types.intp), lambda context, builder, sig, args: builder.load(builder.gep(args[0], [args[1]]))


@intrinsic
def load_once(typingctx, p, index):  # type: ignore[no-untyped-def]
    """Element `index` of memory that others may write meanwhile: whatever is made of it, the compiler reads it once only.

    So a number that was found to be in range stays the number that was found."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "monotonic", p.dtype.bitwidth // 8)

    return p.dtype(p, types.intp), codegen


@intrinsic
def store(typingctx, p, index, value):  # type: ignore[no-untyped-def]
    """Write a vector or a scalar at element `index`."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        if isinstance(value, Vec):
            store_value(builder, args[2], args[0], args[1])
        else:
            cast = context.cast(builder, args[2], sig.args[2], p.dtype)
            builder.store(cast, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(p, types.intp, value), codegen


def _masked(builder: Any, name: str, result: Any, vector: Any, *args: Any) -> Any:
    """IR: a masked load or store; lanes whose mask is off touch no memory."""
    kind = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.{name}.{suffix(vector)}.p0")
    return builder.call(function, args)


@intrinsic
def load_masked(typingctx, p, index, mask):  # type: ignore[no-untyped-def]
    """As many elements from `index` on as the mask has lanes; 0, and no access, where it is off."""
    vec = Vec(p.dtype, mask.count)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        vector = llvm_type(vec)
        source, zero = vector_at(builder, args[0], args[1], vector), ir.Constant(vector, None)
        return _masked(builder, "load", vector, vector, source, ir.Constant(I32, 4), args[2], zero)

    return vec(p, types.intp, mask), codegen


@intrinsic
def store_masked(typingctx, p, index, value, mask):  # type: ignore[no-untyped-def]
    """Write the lanes of `value` whose mask is on, from element `index` on."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        target = vector_at(builder, args[0], args[1], args[2].type)
        _masked(builder, "store", ir.VoidType(), args[2].type, args[2], target, ir.Constant(I32, 4), args[3])
        return context.get_dummy_value()

    return types.void(p, types.intp, value, mask), codegen


@intrinsic
def width(typingctx, one):  # type: ignore[no-untyped-def]
    """Lanes of a full register of the type of `one`: a constant to the compiler."""
    count = lanes(one)
    return types.intp(one), lambda context, builder, sig, args: ir.Constant(I64, count)


@intrinsic
def next_task(typingctx, address):  # type: ignore[no-untyped-def]
    """Take the next number from the counter at `address`, shared by the threads of a call."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        counter = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.intp), codegen
