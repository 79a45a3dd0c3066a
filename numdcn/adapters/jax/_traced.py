"""Operators in traced programs: their calls, and their gradients."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numdcn.adapters import _operators
from numdcn.adapters._operators import INTEGERS, Operator
from numdcn.adapters.jax import _ffi, _host


def _register() -> bool:
    """Make numdcn known to XLA's FFI; False if programs have to call Python in another way."""
    if os.environ.get("NUMDCN_JAX_CALLBACK", "") not in ("", "0"):
        return False
    try:
        capsule = jax.ffi.pycapsule(_ffi.handler(_host.run))
        jax.ffi.register_ffi_target(_ffi.NAME, capsule, platform="cpu", api_version=1)
    except Exception:  # of any kind: no FFI, another version of it, an LLVM without MCJIT
        return False
    return True


FFI = _register()  # whether compiled programs call numdcn through XLA's FFI; else through `jax.pure_callback`


class Call(NamedTuple):
    """What is static in a call."""

    operator: str
    options: str  # as JSON
    layout: str


@jax.tree_util.register_static
class _Static(NamedTuple):
    """What a backward knows of its forward beside arrays."""

    kinds: tuple[tuple[Any, Any] | None, ...]  # shape and dtype of each array
    wanted: tuple[bool, ...]  # of the differentiable arrays, which gradients


def _results(static: Call, inputs: dict[str, Any], outputs: dict[str, tuple[Any, Any]]) -> list[Any]:
    """The outputs, given by shape and dtype, of a call in a compiled program."""
    arrays = list(inputs.values())
    call = _host.Call(
        static.operator, json.loads(static.options), static.layout, arrays[0].ndim, list(inputs), list(outputs)
    )
    results = [_result(shape, dtype, arrays[0]) for shape, dtype in outputs.values()]
    if FFI:
        return list(jax.ffi.ffi_call(_ffi.NAME, results, vmap_method="expand_dims")(*arrays, call=call.text()))
    callback = functools.partial(_callback, call.text(), results)
    made = jax.pure_callback(callback, results, *arrays, vmap_method="expand_dims")
    return list(varying([*made, arrays[0]])[:-1])  # it knows nothing of `_result`'s further words


def _callback(text: str, results: Sequence[Any], *inputs: Any) -> list[np.ndarray]:
    """What `jax.pure_callback` calls."""
    arrays = [np.asarray(array) for array in inputs]
    mapped = arrays[0].ndim - json.loads(text)["axes"]  # axes of vmap
    front = np.broadcast_shapes(*(array.shape[:mapped] for array in arrays))
    outputs = [np.empty((*front, *result.shape), result.dtype) for result in results]
    _host.run(text, arrays, outputs)
    return outputs


def varying(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """The arrays, under shard_map all varying along the same axes of the mesh, as JAX's own operations make them."""
    if not hasattr(jax, "typeof"):
        return tuple(arrays)
    along = [frozenset() if array is None else _axes(array) for array in arrays]
    every = frozenset().union(*along)
    return tuple(
        array if array is None or axes == every else _spread(array, tuple(sorted(every - axes)))
        for array, axes in zip(arrays, along)
    )


def _axes(array: Any) -> frozenset[str]:
    """The axes of the mesh along which an array varies."""
    kind = jax.typeof(array)
    kind = getattr(kind, "manual_axis_type", kind)
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", ())))


def _spread(array: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.pcast(array, axes, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(array, axes)


def _result(shape: Any, dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """What a result will be; under shard_map it varies along the axes along which the inputs do."""
    kind: Any = jax.typeof(like) if hasattr(jax, "typeof") else None
    more = {key: getattr(kind, key) for key in ("vma", "manual_axis_type") if hasattr(kind, key)}
    if more and not kind.sharding.mesh.empty:
        more["sharding"] = jax.sharding.NamedSharding(kind.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, **more)


def _ordered(array: Any, order: _host.Order) -> Any:
    """Shape and dtype of an array with its axes in this order."""
    shape = array.shape if order is None else tuple(array.shape[axis] for axis in order)
    return jax.ShapeDtypeStruct(shape, array.dtype)


def as_nchw(operator: Operator, layout: str, arrays: Sequence[Any]) -> list[Any]:
    """Shapes and dtypes of the arrays as numdcn takes them."""
    made = []
    for argument, array in zip(operator.arrays, arrays):
        order = _host.from_nhwc(argument.axes, array.ndim) if layout == "NHWC" and array is not None else None
        made.append(None if array is None else _ordered(array, order))
    return made


def _forward(call: Call, arrays: Sequence[Any], keep: bool) -> tuple[Any, dict[str, Any]]:
    """y, and the residuals by name if they are to be kept."""
    operator, options = _operators.operator(call.operator), json.loads(call.options)
    inputs = {argument.name: array for argument, array in zip(operator.arrays, arrays) if array is not None}
    shapes = operator.shapes(as_nchw(operator, call.layout, arrays), options)
    names = ("y", *(argument.name for argument in operator.residuals))
    axes, outputs = _host.axes_of(operator), {}
    for name, shape in zip(names, shapes):
        if shape is not None and (keep or name == "y"):
            made = jax.ShapeDtypeStruct(shape, np.int32 if name in INTEGERS else arrays[0].dtype)
            outputs[name] = _ordered(made, _host.to_nhwc(axes[name], made.ndim) if call.layout == "NHWC" else None)
    y, *residuals = _results(call, inputs, {name: (out.shape, out.dtype) for name, out in outputs.items()})
    return y, dict(zip(list(outputs)[1:], residuals))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(call: Call, arrays: tuple[Any, ...]) -> Any:
    """y of an operator."""
    return _forward(call, arrays, keep=False)[0]


def _apply_forward(call: Call, arrays: tuple[Any, ...]) -> tuple[Any, Any]:
    """y, and what the backward needs; of the arrays, those whose numbers it reads."""
    operator = _operators.operator(call.operator)
    values = [None if array is None else array.value for array in arrays]
    varied = {a.name for a, array in zip(operator.arrays, arrays) if array is not None and array.perturbed}
    wanted = tuple(name in varied for name in operator.differentiable)
    y, residuals = _forward(call, values, keep=any(wanted))
    kept = [
        array if argument.saved or not (argument.optional or argument.name in varied) else None
        for argument, array in zip(operator.arrays, values)
    ]
    kinds = tuple(None if array is None else (array.shape, array.dtype) for array in values)
    return y, (kept, residuals, _Static(kinds, wanted))


def _apply_backward(call: Call, saved: Any, grad_y: Any) -> tuple[tuple[Any, ...]]:
    """The gradients of the arrays; zeros, which XLA removes, where nobody asked or there is none."""
    kept, residuals, (kinds, wanted) = saved
    operator = _operators.operator(call.operator)
    of = dict(zip((argument.name for argument in operator.arrays), kinds))
    outputs = {name: of[name] for name, want in zip(operator.differentiable, wanted) if want}
    gradients: dict[str, Any] = {}
    if outputs and not isinstance(grad_y, jax.custom_derivatives.SymbolicZero):
        inputs = {"grad_y": grad_y, **{name: array for name, array in zip(of, kept) if array is not None}, **residuals}
        gradients = dict(zip(outputs, _results(call, inputs, outputs)))
    for name, kind in of.items():  # JAX 0.7 wants as many from every backward of one call, so None would not do
        if kind is not None and name not in gradients:
            gradients[name] = varying([jnp.zeros(*kind), *residuals.values(), *kept])[0]
    return (tuple(map(gradients.get, of)),)


_apply.defvjp(_apply_forward, _apply_backward, symbolic_zeros=True)
run = jax.jit(_apply, static_argnums=0)
