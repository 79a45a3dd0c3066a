"""A call from Python: the short way for plain tensors, the long one where anything watches, torch's operator in a trace.

torch's operators alone are not differentiable under torch.func, so a call from Python goes through an autograd.Function.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from numdcn.adapters.torch import _kernels
from numdcn.adapters.torch._registered import REGISTERED, Registered, full_precision
from numdcn.adapters.torch._vmap import backward_rule, forward_rule

PLAIN = (Tensor, torch.nn.Parameter)
COMPUTED = (torch.float32, torch.float64)


def call(name: str, arrays: Sequence[Tensor | None], flat: Sequence[Any]) -> Tensor:
    """y of an operator, of its arrays and its options as torch's operators take them."""
    registered = REGISTERED[name]
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _first(registered.forward(*arrays, *flat))
    if is_plain(arrays):
        options = registered.short_options(flat)
        if torch.is_grad_enabled() and any([array is not None and array.requires_grad for array in arrays]):
            return Short.apply(registered, flat, options, *arrays)
        return _kernels.run(registered.operator, arrays, options)[0]
    x = arrays[0]
    device = x.device.type if isinstance(x, Tensor) else "cpu"
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return call(name, list(map(full_precision, arrays)), flat).to(x.dtype)  # type: ignore[union-attr]
    return _first(Long.apply(registered, *arrays, *flat))


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


def _first(results: Any) -> Tensor:
    return results if isinstance(results, Tensor) else results[0]


class Short(torch.autograd.Function):
    """An operator on plain tensors."""

    @staticmethod
    def forward(ctx: Any, registered: Registered, flat: Any, options: Any, *arrays: Any) -> Tensor:  # type: ignore[override]
        y, *residuals = _kernels.run(registered.operator, arrays, options)
        registered.keep(ctx, arrays, residuals)
        ctx.registered, ctx.flat, ctx.options = registered, flat, options
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        registered, needed = ctx.registered, ctx.needs_input_grad[3:]
        watched = grad_y is None or torch.is_grad_enabled() or not is_plain([grad_y])
        if watched or torch._C._functorch.is_legacy_batchedtensor(grad_y):
            return None, None, None, *_watched(ctx, registered, grad_y, needed)[: registered.arrays]
        wanted = [needed[place] for place in registered.places]
        arrays, residuals = registered.kept(ctx)
        grads = _kernels.run_backward(
            registered.operator, grad_y, arrays, residuals, ctx.options, wanted, ctx.channels_last
        )
        return None, None, None, *registered.spread(grads, wanted, registered.arrays)


class Long(torch.autograd.Function):
    """An operator on any tensors, under any transform."""

    @staticmethod
    def forward(registered: Registered, *args: Any) -> Any:  # type: ignore[override]
        return registered.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.registered, *args = inputs
        ctx.registered.save(ctx, args, output)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        return None, *_watched(ctx, ctx.registered, grad_y, ctx.needs_input_grad[1:])

    @staticmethod
    def vmap(info: Any, dims: Any, registered: Registered, *args: Any) -> Any:  # type: ignore[override]
        return forward_rule(registered, lambda *parts: Long.apply(registered, *parts))(info, dims[1:], *args)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        ctx.registered.refuse_forward_mode()


class LongBackward(torch.autograd.Function):
    """The gradients of an operator, which have no gradients of their own."""

    @staticmethod
    def forward(registered: Registered, *args: Any) -> Any:  # type: ignore[override]
        return registered.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.registered = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:  # type: ignore[override]
        ctx.registered.refuse_second()

    @staticmethod
    def vmap(info: Any, dims: Any, registered: Registered, *args: Any) -> Any:  # type: ignore[override]
        return backward_rule(registered, lambda *parts: LongBackward.apply(registered, *parts))(info, dims[1:], *args)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        ctx.registered.refuse_forward_mode()


def _watched(ctx: Any, registered: Registered, grad_y: Tensor | None, needed: Any) -> tuple[Any, ...]:
    """The gradients of all arguments, through `LongBackward`."""
    return registered.gradients(ctx, grad_y, needed, lambda *args: LongBackward.apply(registered, *args))
