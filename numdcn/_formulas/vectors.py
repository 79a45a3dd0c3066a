"""The number types of formulas: scalars, and `Vec`, a SIMD vector with operators, so that a formula reads like scalar
code and compiles to full-width registers. A GPU uses scalars only."""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

from numdcn._formulas.jit import has_fma

I32, I64 = ir.IntType(32), ir.IntType(64)


class Vec(types.Type):
    """`count` elements of type `element` in one register; booleans for the result of a comparison."""

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


def call_llvm(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """IR: call an LLVM intrinsic by name."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def suffix(kind: Any) -> str:
    """The type suffix of an LLVM intrinsic's name, such as v16f32 or f64."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{suffix(kind.element)}"
    return "f32" if isinstance(kind, ir.FloatType) else "f64"


def fma_value(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """IR: a * b + c for scalars or vectors, fused if the machine can (otherwise `llvm.fma` would call a library)."""
    if has_fma():
        return call_llvm(builder, f"llvm.fma.{suffix(a.type)}", a.type, a, b, c)
    return builder.fadd(builder.fmul(a, b), c)


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


_register(
    operator.ge, _Comparison, lambda b, x, y: b.fcmp_ordered(">=", x, y), lambda b, x, y: b.icmp_signed(">=", x, y)
)


_register(operator.lt, _Comparison, lambda b, x, y: b.fcmp_ordered("<", x, y), lambda b, x, y: b.icmp_signed("<", x, y))


_register(operator.ne, _Comparison, lambda b, x, y: b.fcmp_unordered("!=", x, y), None)


@intrinsic
def like(typingctx, scalar, vec):
    """`scalar` converted to the element type of `vec`, in every lane; a scalar if `vec` is one."""
    if not isinstance(vec, Vec):
        return vec(scalar, vec), lambda context, builder, sig, args: context.cast(
            builder, args[0], sig.args[0], sig.return_type
        )

    def codegen(context, builder, sig, args):
        value = context.cast(builder, args[0], sig.args[0], vec.element)
        return splat_value(builder, value, vec.count)

    return vec(scalar, vec), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once if the machine has the instruction."""
    return a(a, b, c), lambda context, builder, sig, args: fma_value(builder, *args)


@intrinsic
def select(typingctx, condition, a, b):
    """a where the condition holds, else b."""
    return a(condition, a, b), lambda context, builder, sig, args: builder.select(*args)


@intrinsic
def floor(typingctx, a):
    """The largest integer not above a, as a float."""

    def codegen(context, builder, sig, args):
        return call_llvm(builder, f"llvm.floor.{suffix(args[0].type)}", args[0].type, *args)

    return a(a), codegen


@intrinsic
def to_index(typingctx, a):
    """A float with an integer value, known to be in range, as int64."""
    result = Vec(types.int64, a.count) if isinstance(a, Vec) else types.int64

    def codegen(context, builder, sig, args):
        return builder.fptosi(args[0], context.get_value_type(result))

    return result(a), codegen
