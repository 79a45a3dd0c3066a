"""Every operator as two of torch's, `numdcn::<name>` and `numdcn::<name>_backward`, made from its tables.

The forward takes the arrays, then the options; it returns y and the residuals. The backward takes the gradient of y, the
arrays (of those that it does not read, the shapes), the residuals and the options, then whether gradients of arrays that
it does not read have their channels last, and which gradients are wanted; it returns a tensor for each differentiable
argument. What is absent, or not wanted, is an empty tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from numdcn.adapters import _operators
from numdcn.adapters._operators import INTEGERS, Operator
from numdcn.adapters._tensors import has_tangent
from numdcn.adapters.torch import _kernels
from numdcn.adapters.torch._vmap import backward_rule, forward_rule

LIBRARY = torch.library.Library("numdcn", "FRAGMENT")
TYPES = {  # of options by their kinds
    "axes": "SymInt[2]", "padding": "SymInt[4]", "shapes": "SymInt[]", "ints": "SymInt[]?", "int": "int", "float": "float",
    "bool": "bool",
}  # fmt: skip


class Registered:
    """An operator that torch knows. `forward` and `backward` are torch's two operators."""

    def __init__(self, operator: Operator) -> None:
        # beneath the door, which is for callers: what comes from here fits
        forward, backward = inspect.unwrap(operator.forward), inspect.unwrap(operator.backward)
        self.operator, self.name = operator._replace(forward=forward, backward=backward), operator.name
        self.arrays, self.residuals = len(operator.arrays), len(operator.residuals)
        self.read = [i for i, argument in enumerate(operator.arrays) if argument.saved]  # by the backward
        self.unread = [i for i, argument in enumerate(operator.arrays) if not argument.saved]
        self.places = tuple(map(operator.names.index, operator.differentiable))  # of the arrays that have gradients
        options = [f"{TYPES[option.kind]} {option.name}" for option in operator.options]
        given = [_declared(argument.name, "Tensor", argument.optional) for argument in operator.arrays]
        read = [
            _declared(argument.name, "Tensor" if argument.saved else "SymInt[]", argument.optional)
            for argument in operator.arrays
        ]
        kept = [f"Tensor {argument.name}" for argument in operator.residuals]
        more = ["bool channels_last", f"bool[{len(self.places)}] wanted"]
        self.forward = self._define("", [*given, *options], 1 + self.residuals)
        self.backward = self._define("_backward", ["Tensor grad_y", *read, *kept, *options, *more], len(self.places))
        self._implement("", self._forward, self._fake, forward_rule(self))
        self._implement("_backward", self._backward, self._fake_backward, backward_rule(self))
        self._differentiate("", self.forward, self.save, self._gradients)
        self._differentiate("_backward", self.backward, None, self._refuse_second)
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(self.name, self._autocast(device), f"Autocast{device}")

    # what torch is told

    def _define(self, suffix: str, arguments: list[str], results: int) -> Any:
        """Declare an operator."""
        returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
        name = self.name + suffix
        LIBRARY.define(f"{name}({', '.join(arguments)}) -> {returned}", tags=(torch.Tag.pt2_compliant_tag,))
        return getattr(torch.ops.numdcn, name).default

    def _implement(self, suffix: str, kernel: Callable, fake: Callable, rule: Callable) -> None:
        name = self.name + suffix
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, kernel, device)
        torch.library.register_fake(f"numdcn::{name}", fake, lib=LIBRARY)
        torch.library.register_vmap(f"numdcn::{name}", rule, lib=LIBRARY)

    def _differentiate(self, suffix: str, call: Any, save: Callable | None, gradients: Callable) -> None:
        """Register how an operator is differentiated: in reverse mode, once.

        What `torch.library.register_autograd` makes gives zeros in forward mode, and fails under torch.func.
        """
        below = torch._C._after_autograd_keyset

        class Reverse(_SingleLevelFunction):
            @staticmethod
            def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
                with torch.enable_grad(), _set_fwd_grad_enabled(True):  # for the transforms around this one
                    output = beneath(keyset, args)
                if save is not None:
                    save(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return None, *gradients(ctx, *grads)

        def beneath(keyset: Any, args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return call.redispatch(keyset & below, *args)

        def kernel(keyset: Any, *args: Any) -> Any:
            if has_tangent(args):
                raise NotImplementedError(f"numdcn: forward-mode differentiation of {self.name} is not implemented")
            if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
                return beneath(keyset, args)
            with enable_single_level_autograd_function():
                return Reverse.apply(keyset, *args)

        LIBRARY.impl(self.name + suffix, kernel, "Autograd", with_keyset=True)

    # the parts of a call

    def flat(self, options: Any) -> list[Any]:
        """The options, given in full by name, as torch's operators take them."""
        return [_flat(option.kind, options[option.name]) for option in self.operator.options]

    def options(self, flat: Sequence[Any]) -> dict[str, Any]:
        """The options by name, in full."""
        return {option.name: _whole(option.kind, value) for option, value in zip(self.operator.options, flat)}

    def short_options(self, flat: Sequence[Any]) -> dict[str, Any]:
        """The options by name, an int instead of equal ones per axis, which numdcn checks faster."""
        options = {}
        for (name, kind, _), value in zip(self.operator.options, flat):
            if kind in ("axes", "padding") and all(other == value[0] for other in value):
                options[name] = value[0]
            else:
                options[name] = _whole(kind, value)
        return options

    def split_backward(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Arrays, residuals, flat options, `wanted` and `channels_last` of a backward's arguments after grad_y."""
        arrays, rest = args[: self.arrays], args[self.arrays :]
        return arrays, rest[: self.residuals], rest[self.residuals : -2], args[-1], args[-2]

    # kernels

    def _forward(self, *args: Any) -> Any:
        results = _kernels.run(self.operator, args[: self.arrays], self.short_options(args[self.arrays :]))
        residuals = [args[0].new_empty(0) if result is None else result.contiguous() for result in results[1:]]
        return _packed([results[0], *residuals])

    def _backward(self, grad_y: Tensor, *args: Any) -> Any:
        arrays, residuals, flat, wanted, last = self.split_backward(args)
        given = [tuple(array) if isinstance(array, list) else array for array in arrays]
        kept = [residual if residual.dim() > 1 else None for residual in residuals]
        grads = _kernels.run_backward(self.operator, grad_y, given, kept, self.short_options(flat), wanted, last)
        return _packed([grad_y.new_empty(0) if grad is None else grad for grad in grads])

    def _fake(self, *args: Any) -> Any:
        x, arrays = args[0], args[: self.arrays]
        y, *residuals = self.operator.shapes(arrays, self.options(args[self.arrays :]))
        results = [_kernels.new(y, x.dtype, x.device, _kernels.is_channels_last(x))]
        for argument, shape in zip(self.operator.residuals, residuals):
            dtype = torch.float32 if _kernels.needs_float32(x) else x.dtype
            dtype = torch.int32 if argument.name in INTEGERS else dtype
            results.append(x.new_empty(0) if shape is None else _kernels.new(shape, dtype, x.device, False))
        return _packed(results)

    def _fake_backward(self, grad_y: Tensor, *args: Any) -> Any:
        *_, wanted, last = self.split_backward(args)
        grads = []
        for place, want in zip(self.places, wanted):
            if want and args[place] is not None:
                shape, dtype, own = _kernels.gradient_kind(args[place], grad_y, last)
                grads.append(_kernels.new(shape, dtype, grad_y.device, own))
            else:
                grads.append(grad_y.new_empty(0))
        return _packed(grads)

    def _autocast(self, device: str) -> Callable:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

        def kernel(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                results = self.forward(*map(full_precision, args))
            if not self.residuals:
                return results.to(args[0].dtype)
            return (results[0].to(args[0].dtype), *results[1:])

        return kernel

    # autograd

    def save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        """Keep what the backward reads, after a forward with these arguments."""
        arrays = inputs[: self.arrays]
        residuals = output[1:] if self.residuals else ()
        self.keep(ctx, arrays, residuals)
        ctx.flat = inputs[self.arrays :]
        ctx.mark_non_differentiable(*residuals)

    def keep(self, ctx: Any, arrays: _kernels.Arrays, residuals: _kernels.Arrays) -> None:
        """Keep the arrays that the backward reads, and the shapes of the others."""
        ctx.save_for_backward(*[arrays[i] for i in self.read], *residuals)
        ctx.shapes, ctx.channels_last = [], False
        for i in self.unread:
            array = arrays[i]
            if array is not None:
                ctx.shapes.append((i, array.shape))
                ctx.channels_last = ctx.channels_last or _kernels.is_channels_last(array)
        ctx.set_materialize_grads(False)

    def kept(self, ctx: Any) -> tuple[list[Any], list[Any]]:
        """The arrays, or their shapes, and the residuals."""
        tensors, arrays = ctx.saved_tensors, [None] * self.arrays
        for i, tensor in zip(self.read, tensors):
            arrays[i] = tensor
        for i, shape in ctx.shapes:
            arrays[i] = shape
        return arrays, tensors[len(self.read) :]

    def spread(self, grads: Sequence[Any], wanted: Sequence[bool], count: int) -> list[Any]:
        """Gradients at the places of their arrays among `count` arguments."""
        placed: list[Any] = [None] * count
        for place, grad, want in zip(self.places, grads, wanted):
            if want:
                placed[place] = grad
        return placed

    def gradients(self, ctx: Any, grad_y: Tensor | None, needed: Sequence[bool]) -> tuple[Any, ...]:
        """The gradients of the arguments of a forward, by torch's operator."""
        wanted = [needed[place] for place in self.places]
        count = self.arrays + len(self.operator.options)
        if grad_y is None:
            return (None,) * count
        arrays, residuals = self.kept(ctx)
        grads = self.backward(grad_y, *arrays, *residuals, *ctx.flat, ctx.channels_last, wanted)
        return tuple(self.spread([grads] if isinstance(grads, Tensor) else grads, wanted, count))

    def _gradients(self, ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return self.gradients(ctx, grad_y, ctx.needs_input_grad[1:])

    def _refuse_second(self, *_: Any) -> NoReturn:
        raise NotImplementedError(
            f"numdcn: the gradient of {self.name}'s gradient (double backward) is not implemented"
        )


def full_precision(value: Any) -> Any:
    """A value as autocast passes it to an operator that is to be computed in float32; float64 stays."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.float()
    return value


def _flat(kind: str, value: Any) -> Any:
    """An option in full, as torch's operators take it."""
    if kind in ("padding", "shapes"):
        return [number for pair in value for number in pair]
    return list(value) if kind == "axes" or (kind == "ints" and value is not None) else value


def _whole(kind: str, value: Any) -> Any:
    """An option in full, of what torch's operators take."""
    if kind in ("padding", "shapes"):
        return tuple(zip(value[::2], value[1::2]))
    return tuple(value) if kind == "axes" or (kind == "ints" and value is not None) else value


def _declared(name: str, kind: str, optional: bool) -> str:
    return f"{kind}{'?' * optional} {name}"


def _packed(results: list[Tensor]) -> Any:
    """Results as torch's operators return them: a single one on its own."""
    return results[0] if len(results) == 1 else tuple(results)


REGISTERED = {operator.name: Registered(operator) for operator in _operators.operators()}
