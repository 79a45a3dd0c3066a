"""A call from Python: straight to numdcn for plain tensors, and by torch's operator where anything watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from numdcn.adapters.torch import _kernels
from numdcn.adapters.torch._registered import REGISTERED, Registered

PLAIN = (Tensor, torch.nn.Parameter)
COMPUTED = (torch.float32, torch.float64)


def call(name: str, arrays: Sequence[Tensor | None], flat: Sequence[Any]) -> Tensor:
    """y of an operator, of its arrays and its options as torch's operator takes them."""
    registered = REGISTERED[name]
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not is_plain(arrays):
        results = registered.forward(*arrays, *flat)
        return results[0] if registered.residuals else results
    options = registered.short_options(flat)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arrays):
        return Short.apply(registered, flat, options, *arrays)
    return _kernels.run(registered.operator, arrays, options)[0]


def is_plain(arrays: Iterable[Tensor | None]) -> bool:
    """Whether these are ordinary tensors in host memory, and nothing watches: no transform, mode, tangent or autocast."""
    for array in arrays:
        if array is not None and not (
            type(array) in PLAIN and array.dtype in COMPUTED and array.is_cpu and array.layout is torch.strided
        ):
            return False
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


class Short(torch.autograd.Function):
    """An operator on plain tensors, without torch's dispatcher, which takes longer than all of this."""

    @staticmethod
    def forward(ctx: Any, registered: Registered, flat: Any, options: Any, *arrays: Any) -> Tensor:  # type: ignore[override]
        y, *residuals = _kernels.run(registered.operator, arrays, options)
        registered.keep(ctx, arrays, residuals)
        ctx.flat, ctx.call = flat, (registered, options)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if "torch._dynamo" in sys.modules:  # a compiled program may run it; it must not be traced then
            return _untraced()(ctx, grad_y)
        return _backward(ctx, grad_y)


def _untraced() -> Callable[..., Any]:
    """`_backward`, into which torch.compile does not trace."""
    if not _made:
        reason = "the gradients of a call that was not compiled"
        _made.append(sys.modules["torch._dynamo"].disable(_backward, reason=reason))
    return _made[0]


_made: list[Callable[..., Any]] = []  # what `_untraced` returns; torch.compile warns of functools.cache


def _backward(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
    """The gradients of a `Short`; by torch's operator if anything watches by now."""
    (registered, options), needed = ctx.call, ctx.needs_input_grad[3:]
    watched = grad_y is None or torch.is_grad_enabled() or not is_plain([grad_y])
    if watched or torch._C._functorch.is_legacy_batchedtensor(grad_y):
        return None, None, None, *registered.gradients(ctx, grad_y, needed)[: registered.arrays]
    wanted = [needed[place] for place in registered.places]
    arrays, residuals = registered.kept(ctx)
    grads = _kernels.run_backward(
        registered.operator, grad_y, arrays, residuals, options, wanted, ctx.channels_last
    )  # fmt: skip
    return None, None, None, *registered.spread(grads, wanted, registered.arrays)
