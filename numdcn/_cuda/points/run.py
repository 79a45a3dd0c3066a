"""Sampling GPU arrays at points: copies and launches around the kernels."""

from __future__ import annotations

from typing import Any

from numdcn._call.device_array import DeviceArray
from numdcn._call.options import Options
from numdcn._call.points import PointArrays, Sampling
from numdcn._cuda import replay
from numdcn._cuda.coordinates import address_of
from numdcn._cuda.jit import compute_type
from numdcn._cuda.points.kernels import POINTS, Call, backward_tiles, forward_tiles, plan_points
from numdcn._cuda.workspace import Images, Workspace, stored, summed


@replay.forward
def forward(p: Sampling, arrays: PointArrays, y: DeviceArray, options: Options) -> None:
    """Fill y."""
    with Workspace(y) as work, work.output(y) as target:
        images, points = work.pack_images(arrays.x), work.contiguous(arrays.points)
        call = _call(p, images, points, target)
        blocks = p.batch * -(-p.points // POINTS)
        work.launch(forward_tiles(*_types(y)), call, blocks)


def _types(x: DeviceArray) -> tuple[Any, Any]:
    """The first constants of every kernel."""
    return stored(x.dtype), compute_type(stored(x.dtype))


def _call(p: Sampling, images: Images, points: DeviceArray, y: DeviceArray) -> Call:
    return Call(
        images.array.address, address_of(points), y.address, 0, 0, p.batch, p.channels, p.points, p.size, images.pitch,
        images.pixels, 0,
    )  # fmt: skip


@replay.backward
def backward(p: Sampling, grad_y: DeviceArray, arrays: PointArrays, grads: PointArrays, options: Options) -> None:
    """Fill the gradients in `grads`."""
    with Workspace(grad_y) as work, work.outputs(grads) as targets:
        _backward(work, p, grad_y, arrays, targets, options)


def _backward(
    work: Workspace, p: Sampling, grad_y: DeviceArray, arrays: PointArrays, grads: PointArrays, options: Options
) -> None:
    """The same, for contiguous gradients."""
    x = arrays.x
    points, grad_y = work.contiguous(arrays.points), work.contiguous(grad_y)
    types = _types(x)
    grad_images = work.zero_images(x.shape, x.dtype) if grads.x is not None else None
    scattered = grad_images is not None and options.deterministic
    if grads.points is not None or not scattered:
        # without a gradient of the points the images are not read, only their sizes
        images = work.pack_images(x) if grads.points is not None else work.image_sizes(x)
        call = _call(p, images, points, grad_y)._replace(grad_points=address_of(grads.points))
        if grad_images is not None and not scattered:
            call = call._replace(grad_images=grad_images.array.address, grad_pitch=grad_images.pitch)
        work.launch(backward_tiles(*types, work.vectors(x.dtype)), call, p.batch * -(-p.points // POINTS))
    if grad_images is None:
        return
    if scattered:
        plans = work.plans(p.batch, p.points, x.dtype)
        call = _call(p, grad_images, points, grad_y)._replace(
            images=plans.weights.address, grad_points=plans.places.address
        )
        work.spread(plan_points(*types), call, p.batch * p.points)
        values = work.channels_last(grad_y.reshaped(p.batch, p.channels, p.points), summed(x.dtype))
        work.scatter(plans, values, grad_images, x.shape)
    work.unpack_images(grad_images, grads.x)
