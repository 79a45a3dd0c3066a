"""Rules for vmap: calls that differ only in their images are joined into one; others run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., tuple[Any, Any]]


def forward_rule(registered: Any) -> Rule:
    """The rule of a forward."""
    names, known = registered.operator.names, registered.operator.joinable
    joinable = {i for i, name in enumerate(names) if name in known}

    def rule(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        if info.batch_size and _mapped(dims) <= joinable:
            return _joined(registered.forward, info.batch_size, dims, args, joinable)
        return _one_by_one(registered.forward, info.batch_size, dims, args)

    return rule


def backward_rule(registered: Any) -> Rule:
    """The rule of a backward."""
    operator = registered.operator
    joinable = {1 + i for i, name in enumerate(operator.names) if name in operator.joinable}
    if joinable:
        joinable |= {0, *(1 + registered.arrays + i for i in range(registered.residuals))}
    alone = [name not in operator.joinable for name in operator.differentiable]

    def rule(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        sums = any(want and other for want, other in zip(args[-1], alone))  # over images: one for each call
        tensors = all(args[i] is None or isinstance(args[i], Tensor) for i in joinable)
        if info.batch_size and _mapped(dims) <= joinable and tensors and not sums:
            return _joined(registered.backward, info.batch_size, dims, args, joinable)
        return _one_by_one(registered.backward, info.batch_size, dims, args)

    return rule


def _mapped(dims: Sequence[Any]) -> set[int]:
    """The places of the arguments that differ from call to call."""
    return {i for i, dim in enumerate(dims) if isinstance(dim, int)}


def _joined(
    call: Callable, count: int, dims: Sequence[Any], args: Sequence[Any], joinable: set[int]
) -> tuple[Any, Any]:
    """One call for all."""

    def joined(tensor: Any, dim: Any) -> Any:
        if tensor is None or tensor.dim() == 1:  # absent
            return tensor
        tensor = tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.flatten(0, 1)

    results = call(*(joined(a, dims[i]) if i in joinable else a for i, a in enumerate(args)))
    outs = (results,) if isinstance(results, Tensor) else results
    parts = [None if out.dim() == 1 else 0 for out in outs]
    cut = [out if part is None else out.unflatten(0, (count, out.shape[0] // count)) for out, part in zip(outs, parts)]
    return (cut[0], parts[0]) if isinstance(results, Tensor) else (tuple(cut), tuple(parts))


def _one_by_one(call: Callable, count: int, dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """A call for each; for none, one with zeros, whose results are cut off."""

    def picked(value: Any, dim: Any, i: int) -> Any:
        if not isinstance(dim, int) or not isinstance(value, Tensor):
            return value
        return value.select(dim, i) if count else value.movedim(dim, 0).sum(0)

    made = [call(*(picked(a, dim, i) for a, dim in zip(args, dims))) for i in range(max(count, 1))]
    if isinstance(made[0], Tensor):
        return torch.stack(made)[:count], 0
    stacked = tuple(torch.stack(some)[:count] for some in zip(*made))
    return stacked, (0,) * len(stacked)
