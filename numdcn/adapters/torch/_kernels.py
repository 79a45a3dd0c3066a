"""One call of an operator on tensors whose numbers are there: what numdcn sees of them, and its results as tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from numdcn.adapters._operators import Operator
from numdcn.adapters._tensors import HALVES, widened

Arrays = Sequence[Tensor | None]  # in the order of an operator's table; None for one that is absent
Given = Sequence[Any]  # the same for a backward: of an array that is not saved the shape alone
Options = Mapping[str, Any]  # by name


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a batch of images is contiguous with its channels last, and not with its channels first as well."""
    if tensor.is_contiguous() or tensor.dim() != 4:
        return False
    _, c, h, w = tensor.shape
    return tuple(tensor.stride()) == (h * w * c, 1, w * c, c)


def new(shape: Sequence[Any], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    """An uninitialised tensor, with its channels last if asked for and it has four axes, else in C order."""
    last = channels_last and len(shape) == 4
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=form)


def needs_float32(tensor: Tensor) -> bool:
    """Whether an operator on such tensors is computed in float32."""
    return tensor.dtype in HALVES and tensor.device.type == "cpu"


def gradient_kind(array: Any, grad_y: Tensor, channels_last: bool) -> tuple[Sequence[Any], torch.dtype, bool]:
    """The shape and dtype of the gradient of an array, and whether it has its channels last."""
    if isinstance(array, Tensor):
        return array.shape, array.dtype, is_channels_last(array)
    return array, grad_y.dtype, channels_last


def run(operator: Operator, arrays: Arrays, options: Options) -> list[Any]:
    """y and the residuals; None for a residual that is absent. y has its channels last if x has."""
    x: Any = arrays[0]
    if needs_float32(x):
        _check_dtypes(operator, arrays)
        y, *residuals = run(operator, list(map(widened, arrays)), options)
        return [y.to(x.dtype), *residuals]
    more: dict[str, Any] = {} if x.is_cpu else _flags(operator.forward)
    room = _room(operator, arrays, options) if is_channels_last(x) else None
    if room is not None:
        (more["out"],) = _seen([room])
    results = _tensors(operator.run(_seen(arrays), options, **more))
    return results if room is None else [room, *results[1:]]


def run_backward(
    operator: Operator,
    grad_y: Tensor,
    arrays: Given,
    residuals: Arrays,
    options: Options,
    wanted: Sequence[bool],
    channels_last: bool,
) -> list[Any]:
    """The gradients, in the order of `operator.differentiable`; None where not wanted or the array is absent.

    A gradient has its channels last if its array has; `channels_last` says so of those whose shape alone is given.
    """
    if needs_float32(grad_y):
        wide, kept = list(map(widened, arrays)), list(map(widened, residuals))
        grads = run_backward(operator, grad_y.float(), wide, kept, options, wanted, channels_last)
        given = dict(zip(operator.names, arrays))
        types = [gradient_kind(given[name], grad_y, False)[1] for name in operator.differentiable]
        return [grad if grad is None else grad.to(dtype) for grad, dtype in zip(grads, types)]
    more: dict[str, Any] = {} if grad_y.is_cpu else _flags(operator.backward)
    rooms, last = None, channels_last
    for array in arrays:
        last = last or (isinstance(array, Tensor) and is_channels_last(array))
    if last:
        rooms = _rooms(operator, grad_y, arrays, wanted, channels_last)
        more["out"] = operator.gradients(*_seen(rooms))
    like = grad_y.dtype, grad_y.device
    arrays = [_stand_in(array, *like) if isinstance(array, tuple) else array for array in arrays]
    count, seen = len(arrays) + 1, _seen([grad_y, *arrays, *residuals])
    grads = _tensors(operator.run_backward(seen[0], seen[1:count], seen[count:], options, wanted, **more))
    return grads if rooms is None else [grad if room is None else room for grad, room in zip(grads, rooms)]


def _rooms(operator: Operator, grad_y: Tensor, arrays: Given, wanted: Sequence[bool], channels_last: bool) -> list[Any]:
    """Room for the gradients that have their channels last; None for the others."""
    given = dict(zip(operator.names, arrays))
    rooms: list[Any] = []
    for name, want in zip(operator.differentiable, wanted):
        array = given[name] if want else None
        shape, dtype, last = ((), None, False) if array is None else gradient_kind(array, grad_y, channels_last)
        rooms.append(new(shape, dtype, grad_y.device, True) if last and dtype is not None else None)
    return rooms


@functools.lru_cache(256)
def _stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """What numdcn is given, without the memory, in the place of an array of which it reads the shape alone."""
    return _seen([torch.empty((), dtype=dtype, device=device).expand(shape)])[0]


def _seen(tensors: Given) -> list[Any]:
    """What numdcn is given for tensors: NumPy arrays of the same memory, or tensors on a GPU; anything else as it is."""
    seen: list[Any] = []
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            here = tensor.is_cpu
            if tensor.requires_grad and (torch.is_grad_enabled() or not here):
                tensor = tensor.detach()
            if tensor.is_neg():
                tensor = tensor.resolve_neg()
            if here:
                tensor = tensor.numpy()
        seen.append(tensor)
    return seen


def _tensors(results: Sequence[Any]) -> list[Any]:
    """Results of numdcn as tensors."""
    return [torch.from_numpy(result) if type(result) is np.ndarray else result for result in results]


def _check_dtypes(operator: Operator, arrays: Arrays) -> None:
    """Raise unless half types share one dtype; coordinates may be float32."""
    x: Any = arrays[0]
    for argument, array in zip(operator.arrays, arrays):
        if array is None or array.dtype == x.dtype or (argument.coordinates and array.dtype == torch.float32):
            continue
        finer = ", or torch.float32 here" * argument.coordinates
        raise TypeError(
            f"`{argument.name}` has dtype {array.dtype} but `{operator.arrays[0].name}` has {x.dtype}; "
            f"expected one dtype for all arrays{finer}"
        )


def _room(operator: Operator, arrays: Arrays, options: Options) -> Tensor | None:
    """Room for y, of four axes, with its channels last; None if the arguments do not fit, as the operator will say."""
    x: Any = arrays[0]
    try:
        shape = operator.shapes(arrays, operator.full_options(options))[0]
        return new(shape, x.dtype, x.device, True) if len(shape) == 4 else None
    except (IndexError, RuntimeError):
        return None


@functools.cache
def _accepted(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _flags(function: Callable[..., Any]) -> dict[str, bool]:
    """torch's settings, as arguments of a function for arrays on a GPU."""
    accepted, flags = _accepted(function), {}
    if "deterministic" in accepted:
        flags["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if "allow_tf32" in accepted:
        flags["allow_tf32"] = torch.backends.cuda.matmul.allow_tf32
    return flags
