"""Dispatch from doors to wings: CPU kernels for NumPy arrays, CUDA kernels for arrays on a GPU.

A door is the module of an operator, `numdcn/<op>`. A wing, `_cpu` or `_cuda`, holds all kernels for one kind of
machine; each of its rooms (`attention`, `conv`, `points`, `roi`) holds those of a family, the operators that share them. A room is
imported by the first call that enters it, so a first call loads only its own kernels, and CUDA only for an array on a
GPU. The `run` of a room has

    forward(p, arrays, y, options)                  fill y
    backward(p, grad_y, arrays, grads, options)     fill the gradients in `grads` that are not None

`p` holds the sizes; `arrays` and `grads` hold the arrays under the names of the family. Everything has been checked.
Neither y nor any gradient in `grads` is empty, but x may contain no images (on a GPU, where boxes need not be checked).
NaN and infinity are ordinary values: where a room computes with NumPy, it does so without warnings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from numdcn._call.arguments import Table, named
from numdcn._call.arrays import is_half
from numdcn._call.attention_views import Attentions
from numdcn._call.device_array import DeviceArray
from numdcn._call.options import DEFAULT, Options
from numdcn._call.results import Gradients, given_back, gradients_back, new_output, output_array, wanted_gradients

Family = Callable[[Any], Any]  # `attentions`, `convolutions`, `samplings` or `poolings`


def on_gpu(array: Any) -> bool:
    """Whether a received array is on a GPU."""
    return isinstance(array, DeviceArray)


def convolutions(array: Any) -> Any:
    """The `conv` room for an array."""
    if on_gpu(array):
        from numdcn._cuda.conv import run as on_cuda

        return on_cuda
    from numdcn._cpu.conv import run

    return run


def samplings(array: Any) -> Any:
    """The `points` room for an array."""
    if on_gpu(array):
        from numdcn._cuda.points import run as on_cuda

        return on_cuda
    from numdcn._cpu.points import run

    return run


def poolings(array: Any) -> Any:
    """The `roi` room for an array."""
    if on_gpu(array):
        from numdcn._cuda.roi import run as on_cuda

        return on_cuda
    from numdcn._cpu.roi import run

    return run


def attentions(array: Any) -> Attentions:
    """The `attention` room for an array, for arrays in the shapes that callers see."""
    if on_gpu(array):
        from numdcn._cuda.attention import run as on_cuda
        from numdcn._cuda.views import Views as DeviceViews

        return Attentions(on_cuda, DeviceViews)
    from numdcn._cpu.attention import run
    from numdcn._cpu.views import Views

    return Attentions(run, Views)


def modulation(array: Any) -> Any:
    """The arithmetic between the two convolutions of a deformable layer, for an array."""
    if on_gpu(array):
        from numdcn._cuda import modulation as on_cuda

        return on_cuda
    from numdcn._cpu import modulation as on_cpu

    return on_cpu


def is_half_on_cpu(array: Any) -> bool:
    """Whether an array is a NumPy array of float16 or bfloat16, of which the CPU's kernels know nothing."""
    return is_half(array.dtype) and not on_gpu(array)


def _room(family: Family, array: Any) -> Any:
    """The kernels of a family for an array."""
    room = family(array)
    if not is_half_on_cpu(array):
        return room
    from numdcn._cpu.widened import Widened

    return Widened(room)


def in_float32(value: Any) -> Any:
    """A float32 copy of a NumPy array, or of prepared weights, of a half type; anything else as it is."""
    if value is None or not is_half_on_cpu(getattr(value, "array", value)):
        return value
    from numdcn._cpu.widened import widened, widened_weights

    return widened(value) if isinstance(value, np.ndarray) else widened_weights(value)


def rounded(single: Any, dtype: Any, out: Any = None) -> Any:
    """A float32 NumPy array rounded to a half type, into `out` or a new array; for another dtype the array itself."""
    if single is None or not is_half(dtype) or on_gpu(single):
        return single
    from numdcn._cpu.widened import convert

    made = np.empty(single.shape, dtype) if out is None else out
    convert(made, np.ascontiguousarray(single), back=True)
    return made


def _without_unread(table: Table, arrays: Any) -> Any:
    """The arrays of a backward; those of which it reads the shape alone as shapes without numbers."""
    unread = {a.field: a.of(arrays) for a in table if not a.saved and a.of(arrays) is not None}
    return arrays._replace(**{field: np.broadcast_to(np.float32(0), a.shape) for field, a in unread.items()})


def run_forward(family: Family, table: Table, p: Any, arrays: Any, out: Any, options: Options = DEFAULT) -> Any:
    """Compute y of shape `p.out_shape` into `out`, or into a new array, and return it."""
    first = table[0].of(arrays)
    if out is None:
        y = new_output("out", p.out_shape, first.dtype, first)
    else:
        y = output_array("out", out, p.out_shape, first.dtype, named(table, arrays))
    if y.size:
        _room(family, y).forward(p, arrays, y, options)
    return given_back(y, out)


def run_backward(
    family: Family,
    table: Table,
    p: Any,
    grad_y: Any,
    arrays: Any,
    kind: type[Gradients],
    wrt: str | Iterable[str] | None,
    out: Gradients | None,
    options: Options = DEFAULT,
) -> Gradients:
    """The requested gradients as a `kind`, which has a field for each differentiable argument."""
    grads = wanted_gradients(table, arrays, grad_y, kind, wrt, out)
    filled = {a.field: grads[a.name] for a in table if a.name in grads and grads[a.name].size}
    if filled and grad_y.size:
        wanted = type(arrays)(*map(filled.get, arrays._fields))
        read = _without_unread(table, arrays) if is_half_on_cpu(grad_y) else arrays  # the others need no copy
        _room(family, grad_y).backward(p, grad_y, read, wanted, options)
    else:
        for grad in filled.values():
            clear(grad)
    return gradients_back(kind, grads, out)


def clear(array: Any) -> None:
    """Fill an array with zeros."""
    if on_gpu(array):
        from numdcn._cuda.workspace import Workspace

        with Workspace(array) as work:
            work.clear(array)
    else:
        array[...] = 0
