"""numdcn's operators for JAX, on the CPU: under jit, grad, vmap, scan, shard_map and export.

There is a function for each operator, with the arguments of its `<op>_forward` and `layout`; it returns y.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from numdcn._call.arguments import Argument
from numdcn._call.checks import describe
from numdcn.adapters import _operators
from numdcn.adapters._operators import PER_CALL, Operator, shaped
from numdcn.adapters.jax._traced import Call, as_nchw, run, varying

LAYOUTS = ("NCHW", "NHWC")

__all__ = list(_operators.NAMES)


def _call(operator: Operator, layout: str, given: dict[str, Any]) -> Any:
    """y of the operator, given its arguments by name."""
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` is {describe(layout)}, expected 'NCHW' or 'NHWC'")
    arrays = [_array(argument, given.pop(argument.name)) for argument in operator.arrays]
    options = operator.full_options(given)
    dtype = _one_dtype(operator, arrays)
    _check(operator, layout, arrays, options)
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    call = Call(operator.name, json.dumps(plain), layout)
    wide = [array if array is None or not _half(array.dtype) else array.astype(np.float32) for array in arrays]
    y = run(call, varying(wide))
    return y if y.dtype == dtype else y.astype(dtype)


def _array(argument: Argument, value: Any) -> Any:
    """An argument as an array of JAX."""
    if value is None and argument.optional:
        return None
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"`{argument.name}` is {describe(value)}, expected a jax.Array, {argument.axes}")
    return jnp.asarray(value)


def _half(dtype: Any) -> bool:
    return bool(dtype.itemsize == 2 and jnp.issubdtype(dtype, jnp.floating))


def _one_dtype(operator: Operator, arrays: Sequence[Any]) -> Any:
    """The dtype of y. Raises if only some arrays have a half type; coordinates may be float32 beside it."""
    first = arrays[0].dtype
    for argument, array in zip(operator.arrays, arrays):
        if array is None or array.dtype == first or not (_half(first) or _half(array.dtype)):
            continue
        if not (argument.coordinates and array.dtype == np.float32):
            raise TypeError(
                f"`{argument.name}` has dtype {array.dtype} but `{operator.arrays[0].name}` has {first}; expected one dtype "
                f"for all arrays{', or float32 here' if argument.coordinates and _half(first) else ''}"
            )
    return first


def _check(operator: Operator, layout: str, arrays: Sequence[Any], options: dict[str, Any]) -> None:
    """Raise what the operator would, as far as it depends on shapes, dtypes and options. (The handler checks all.)"""
    seen = as_nchw(operator, layout, arrays)
    if not all(isinstance(size, int) for array in seen if array is not None for size in array.shape):
        return  # symbols of `jax.export`
    plain = [
        None if array is None else shaped(array.shape, np.float32 if _half(array.dtype) else array.dtype)
        for array in seen
    ]
    try:
        operator.check(plain, options)
    except (TypeError, ValueError) as error:
        if layout == "NCHW":
            raise
        raise type(error)(f"{error} (shapes are told in the order of layout='NCHW')") from None


_CHANGES = (  # to the docstrings of the plain functions, where they do not hold here
    (rf"(?m)^    (?:{'|'.join(sorted(PER_CALL))}): .*\n(?:     +.*\n)*", ""),
    (r",\s+or the result of `prepare_weights`", ""),
    (
        r"float16, bfloat16, float32 or float64, any\s+strides",
        "float16, bfloat16, float32 or float64, one type for all arrays",
    ),
    (r",? or is on a GPU", ""),
    (r"a parameter is out of range, or `out` overlaps an input", "or a parameter is out of range"),
    (r",\s+or `out` overlaps an input", ""),
    (r"\s+`out` overlaps an input,", ""),
)
_LAYOUT = """    layout: "NCHW" for the axes written here; "NHWC" for channels last, as in Flax: x and y `(N, H, W, C)`, offsets and
        masks likewise, weights `(kh, kw, C/groups, C_out)`.
"""


def _document(operator: Operator) -> str:
    """The docstring of a function."""
    text = inspect.getdoc(operator.forward) or ""
    y = re.search(r"out: array to fill(?: with y)?, (`[^`]+`)", text)
    for pattern, here in _CHANGES:
        text = re.sub(pattern, here, text)
    text = re.sub(r"(Args:\n(?:    .*\n)+)", lambda args: args[1] + _LAYOUT, text, count=1)
    if operator.residuals and y:
        text = re.sub(
            r"Returns:\n(?:    .*\n)+", f"Returns:\n    y, {y[1]}. Bit-identical for any number of threads.\n", text
        )
    without = [argument.name for argument in operator.arrays if argument.name not in operator.differentiable]
    zeros = f"; those of {', '.join(without)} are zeros" if without else ""
    return (
        f"{text}\n\nGradients (`jax.grad`, `jax.vjp`): of {', '.join(operator.differentiable)}{zeros}. Forward mode and second "
        "derivatives raise JAX's errors.\n\nWhat depends on numbers, as a box that names no image, is checked when a program runs. It "
        "raises `jax.errors.JaxRuntimeError`, or ValueError where the program has run before."
    )


def _function(operator: Operator) -> Callable[..., jax.Array]:
    """The function of an operator."""
    hints = typing.get_type_hints(operator.forward)
    arrays = {argument.name: argument for argument in operator.arrays}
    parameters = []
    for name, parameter in inspect.signature(operator.forward).parameters.items():
        if name not in PER_CALL:
            kind = hints[name]
            if name in arrays:
                kind = jax.Array | None if arrays[name].optional else jax.Array
            parameters.append(parameter.replace(annotation=kind))
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("layout", keyword, default="NCHW", annotation=typing.Literal[LAYOUTS]))
    signature = inspect.Signature(parameters, return_annotation=jax.Array)

    def function(*args: Any, **keywords: Any) -> jax.Array:
        try:
            bound = signature.bind(*args, **keywords)
        except TypeError as error:
            raise TypeError(f"{operator.name}(): {error}") from None
        bound.apply_defaults()
        return _call(operator, bound.arguments.pop("layout"), bound.arguments)

    function.__name__ = function.__qualname__ = operator.name
    function.__doc__ = _document(operator)
    function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": jax.Array}
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


for _made in _operators.operators():
    globals()[_made.name] = _function(_made)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., jax.Array]: ...
