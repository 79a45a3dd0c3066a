"""Bilinear sampling of images at arbitrary points: forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple

from numdcn._call.arguments import check_grad_y, receive
from numdcn._call.arrays import Array
from numdcn._call.door import door, operator_module
from numdcn._call.options import options
from numdcn._call.points import PointArrays
from numdcn._call.remembered import remembered
from numdcn._run import run_backward, run_forward, samplings
from numdcn.bilinear_sample.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["x", "points"]  # what `wrt` may name


@door
def bilinear_sample_forward(x: Array, points: Array, *, out: Array | None = None) -> Array:
    """Sample images at arbitrary points by bilinear interpolation, with zeros outside::

        y[n, c, ...] = sum over pixels (i, j) of  max(0, 1 - |py - i|) * max(0, 1 - |px - j|) * x[n, c, i, j]
        (py, px) = points[n, ..., :]

    Args:
        x: images `(N, C, H, W)`, float16, bfloat16, float32 or float64, any strides.
        points: coordinates `(N, ..., 2)` in pixels, y first: (0, 0) is the centre of the first pixel.
        out: array to fill, `(N, C, ...)`; must not overlap any input.

    A sample falls to 0 within one pixel of the border and is exactly 0 beyond, for huge and infinite points too. A NaN
    point gives NaN. A pixel affects only points whose cell touches it.

    This is `scipy.ndimage.map_coordinates(order=1, mode="grid-constant")`, and torch's `grid_sample` with zero padding:
    its coordinate g, from -1 to 1 along an axis of N pixels, is `((g + 1)*N - 1)/2` here, or `(g + 1)*(N - 1)/2` with
    align_corners.

    Returns:
        y, `(N, C, ...)`, with the axes of the points in place of H and W. Bit-identical for any number of threads.

    Raises:
        TypeError: an argument is not an array or has an unsupported dtype, or dtypes differ.
        ValueError: shapes do not match, or `out` overlaps an input.

    Source: Jaderberg et al., Spatial Transformer Networks (2015), equation 5.
    """
    arrays = receive(ARGUMENTS, PointArrays(x=x, points=points))
    return run_forward(samplings, ARGUMENTS, remembered(problem, arrays), arrays, out)


class BilinearSampleGradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `bilinear_sample_forward`; None where not requested."""

    x: Array | None = None
    points: Array | None = None


@door
def bilinear_sample_backward(
    grad_y: Array,
    x: Array,
    points: Array,
    *,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    out: BilinearSampleGradients[Array] | None = None,
) -> BilinearSampleGradients[Array]:
    """Gradients of `bilinear_sample_forward`, given the gradient of its result.

    Args:
        grad_y: gradient of y, `(N, C, ...)`, with the dtype of x.
        x: as in the forward.
        points: as in the forward.
        wrt: "x", "points" or both; None for both.
        deterministic: on a GPU, accumulate the gradient of x in a fixed order, which is slower.
        out: `BilinearSampleGradients` of arrays to fill, shaped like the arguments; they must not overlap an input or
            each other. Fields left as None are allocated if requested.

    A pixel receives grad_y times the weights with which it was sampled; a coordinate receives the sum over channels of
    grad_y times the slope along its axis. At an integer coordinate the slope is the one to its right, at -1 too.
    Outside the image both are 0; the slope times a NaN in grad_y is NaN. A NaN point has NaN gradients and adds nothing
    to that of x.

    Returns:
        A `BilinearSampleGradients`. Reproducible bit for bit: on the CPU for any number of threads and any `wrt`; on a
            GPU from run to run, the gradient of x only if `deterministic`.

    Raises:
        TypeError: as in `bilinear_sample_forward`.
        ValueError: as in `bilinear_sample_forward`, or `wrt` has an unknown name.

    Source: as in `bilinear_sample_forward`, equations 6 and 7.
    """
    arrays = receive(ARGUMENTS, PointArrays(x=x, points=points))
    p = remembered(problem, arrays)
    grad_y = check_grad_y(grad_y, p.out_shape, "(N, C, ...), with the axes of points between N and 2", arrays.x)
    return run_backward(
        samplings, ARGUMENTS, p, grad_y, arrays, BilinearSampleGradients, wrt, out, options(deterministic)
    )
