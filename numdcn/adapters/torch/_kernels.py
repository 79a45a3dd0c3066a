"""One call of an operator on tensors whose numbers are there: what numdcn sees of them, and its results as tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from numdcn.adapters._operators import Operator

HALVES = (torch.float16, torch.bfloat16)
Arrays = Sequence[Tensor | None]  # in the order of an operator's table; None for one that is absent
Given = Sequence[Any]  # the same for a backward: of an array that is not saved the shape alone
Options = Mapping[str, Any]  # by name, in full


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a batch of images is contiguous with its channels last, and not with its channels first as well."""
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    _, c, h, w = tensor.shape
    return tuple(tensor.stride()) == (h * w * c, 1, w * c, c)


def new(shape: Sequence[Any], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    """An uninitialised tensor, with its channels last if asked for and it has four axes, else in C order."""
    last = channels_last and len(shape) == 4
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=form)


def needs_float32(tensor: Tensor) -> bool:
    """Whether an operator on such tensors is computed in float32, as numdcn has no half types on the CPU."""
    return tensor.dtype in HALVES and tensor.device.type == "cpu"


def gradient_kind(array: Any, grad_y: Tensor, channels_last: bool) -> tuple[Sequence[Any], torch.dtype, bool]:
    """The shape and dtype of the gradient of an array, and whether it has its channels last."""
    if isinstance(array, Tensor):
        return array.shape, array.dtype, is_channels_last(array)
    return array, grad_y.dtype, channels_last


def run(operator: Operator, arrays: Arrays, options: Options) -> tuple[Any, ...]:
    """y and the residuals; None for a residual that is absent. y has its channels last if x has."""
    x: Any = arrays[0]
    if needs_float32(x):
        _check_dtypes(operator, arrays)
        y, *residuals = run(operator, list(map(_widened, arrays)), options)
        return (y.to(x.dtype), *residuals)
    more: dict[str, Any] = {} if x.is_cpu else _flags(operator.forward)
    room = _room(operator, arrays, options) if is_channels_last(x) else None
    if room is not None:
        more["out"] = _seen(room)
    y, *residuals = operator.run([_seen(array) for array in arrays], options, **more)
    return (_tensor(y) if room is None else room, *map(_tensor, residuals))


def run_backward(
    operator: Operator,
    grad_y: Tensor,
    arrays: Given,
    residuals: Arrays,
    options: Options,
    wanted: Sequence[bool],
    channels_last: bool,
) -> tuple[Any, ...]:
    """The gradients, in the order of `operator.differentiable`; None where not wanted or the array is absent.

    A gradient has its channels last if its array has; `channels_last` says so of those whose shape alone is given.
    """
    named = {argument.name: array for argument, array in zip(operator.arrays, arrays)}
    kinds: list[Any] = [None] * len(wanted)
    for i, name in enumerate(operator.differentiable):
        if wanted[i] and named[name] is not None:
            kinds[i] = gradient_kind(named[name], grad_y, channels_last)
    if needs_float32(grad_y):
        wide, kept = list(map(_widened, arrays)), list(map(_widened, residuals))
        grads = run_backward(operator, grad_y.float(), wide, kept, options, wanted, channels_last)
        return tuple(grad if kind is None else grad.to(kind[1]) for grad, kind in zip(grads, kinds))
    more: dict[str, Any] = {} if grad_y.is_cpu else _flags(operator.backward)
    rooms = [new(*kind[:2], grad_y.device, True) if kind is not None and kind[2] else None for kind in kinds]
    if rooms.count(None) < len(rooms):
        more["out"] = operator.gradients(*map(_seen, rooms))
    seen = [_seen(_stand_in(array, grad_y) if isinstance(array, (tuple, list)) else array) for array in arrays]
    grads = operator.run_backward(_seen(grad_y), seen, list(map(_seen, residuals)), options, wanted, **more)
    return tuple(_tensor(grad) if room is None else room for grad, room in zip(grads, rooms))


def _stand_in(shape: Sequence[int], grad_y: Tensor) -> Tensor:
    """A tensor that needs no memory, in the place of one of which only the shape is read."""
    return grad_y.new_empty(()).expand(tuple(shape))


def _seen(tensor: Tensor | None) -> Any:
    """What numdcn is given: a NumPy array of the same memory, or a tensor on a GPU."""
    if tensor is None:
        return None
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.numpy() if tensor.is_cpu else tensor


def _tensor(result: Any) -> Tensor | None:
    """A result of numdcn as a tensor."""
    return result if result is None or isinstance(result, Tensor) else torch.from_numpy(result)


def _widened(array: Any) -> Any:
    return array.float() if isinstance(array, Tensor) and array.dtype in HALVES else array


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
        shape = operator.shapes(arrays, options)[0]
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
