"""The arrays of deformable attention, DCNv3 and DCNv4 in the form of `AttentionArrays`."""

from __future__ import annotations

from typing import Any

from numdcn._call.attention import Attention, AttentionArrays
from numdcn._call.options import Options


class Attentions:
    """The kernels of a wing, for arrays as callers have them. Each has the same elements in the same order as its form
    in `AttentionArrays`, but points and weights may be packed into one: `points`, beside `weights` of None."""

    __slots__ = ("run", "views")

    def __init__(self, run: Any, views: Any) -> None:
        self.run = run  # the `run` of the wing's room
        self.views = views  # the wing's `Views`

    def forward(self, p: Attention, arrays: AttentionArrays, y: Any, options: Options) -> None:
        """Fill y."""
        with self.views(y) as views, views.output_as(y, _result(p)) as target:
            self.run.forward(p, _inputs(views, p, arrays), target, options)

    def backward(
        self, p: Attention, grad_y: Any, arrays: AttentionArrays, grads: AttentionArrays, options: Options
    ) -> None:
        """Fill the gradients in `grads`."""
        packed, shapes = arrays.weights is None, _shapes(p)
        points = _packed(p, arrays) if packed else shapes.points
        with (
            self.views(grad_y) as views,
            views.output_as(grads.value, shapes.value) as grad_value,
            views.output_as(grads.points, points) as grad_points,
            views.output_as(grads.weights, shapes.weights) as grad_weights,
        ):
            if packed and grad_points is not None:
                views.clear_columns(grad_points, 3 * p.points * p.heads)
                grad_points, grad_weights = views.unpacked(grad_points, p.heads, p.points)
            wanted = AttentionArrays(grad_value, grad_points, grad_weights)
            self.run.backward(p, views.seen(grad_y, _result(p)), _inputs(views, p, arrays), wanted, options)


def _shapes(p: Attention) -> AttentionArrays:
    rows = p.batch, p.queries, p.heads, p.points
    return AttentionArrays((p.batch, p.pixels, p.heads, p.channels), (*rows, 2), rows)


def _result(p: Attention) -> tuple[int, ...]:
    return p.batch, p.queries, p.heads, p.channels


def _packed(p: Attention, arrays: AttentionArrays) -> tuple[int, ...]:
    return p.batch, p.queries, arrays.points.shape[-1]


def _inputs(views: Any, p: Attention, arrays: AttentionArrays) -> AttentionArrays:
    shapes = _shapes(p)
    value = views.seen(arrays.value, shapes.value)
    if arrays.weights is None:
        return AttentionArrays(value, *views.unpacked(views.seen(arrays.points, _packed(p, arrays)), p.heads, p.points))
    return AttentionArrays(value, views.seen(arrays.points, shapes.points), views.seen(arrays.weights, shapes.weights))
