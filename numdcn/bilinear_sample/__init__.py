"""Bilinear sampling of images at arbitrary points: forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple

from numdcn._call.arguments import check_grad_y, receive
from numdcn._call.arrays import Array
from numdcn._call.door import door, operator_module
from numdcn._call.options import options
from numdcn._call.points import PointArrays
from numdcn._run import run_backward, run_forward, samplings
from numdcn.bilinear_sample.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["x", "points"]  # what `wrt` may name


@door
def bilinear_sample_forward(x: Array, points: Array, *, out: Array | None = None) -> Array:
    """Sample images at points by bilinear interpolation, with zeros outside::

        y[n, c, ...] = sum over pixels (i, j) of  max(0, 1 - |py - i|) * max(0, 1 - |px - j|) * x[n, c, i, j]
        (py, px) = points[n, ..., :]

    Args:
        x: images (N, C, H, W), float32 or float64 (on a GPU also float16 or bfloat16), any strides.
        points: coordinates (N, ..., 2) in pixels, y first: (0, 0) is the centre of the first pixel.
        out: an array to fill, (N, C, ...), sharing memory with no input.

    A sample falls to 0 within one pixel of the border, and is exactly 0 beyond, for huge and infinite points too. A NaN
    point gives NaN. A pixel counts only for points whose cell touches it.

    It is `scipy.ndimage.map_coordinates(order=1, mode="grid-constant")`, and torch's `grid_sample` with zeros padding:
    a coordinate g in -1 to 1 of an axis of N pixels is ((g + 1)*N - 1)/2 here, with align_corners (g + 1)*(N - 1)/2.

    Returns:
        y, (N, C, ...): the axes of the points in the place of H and W. The same bits for any number of threads.

    Raises:
        TypeError: an array of another kind or dtype, or dtypes that differ.
        ValueError: shapes that do not fit each other, an `out` that shares memory.

    Source: Jaderberg et al., Spatial Transformer Networks (2015), equation 5.
    """
    arrays = receive(ARGUMENTS, PointArrays(x=x, points=points))
    return run_forward(samplings, ARGUMENTS, problem(arrays), arrays, out)


class BilinearSampleGradients(NamedTuple, Generic[Array]):
    """Gradients by the names of `bilinear_sample_forward`'s arguments; None where not asked for."""

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
        grad_y: gradient of y, (N, C, ...), of the dtype of the other arrays.
        x, points: as given to `bilinear_sample_forward`.
        wrt: "x", "points" or both; None for both.
        deterministic: on a GPU, whether to add up the gradient of x in a fixed order, which takes longer.
        out: a `BilinearSampleGradients` of arrays to fill, shaped like the arguments and sharing memory with none of
            them; what is wanted but None there is allocated.

    A pixel receives grad_y in the weights with which it was sampled; a coordinate the sum over channels of grad_y times
    the slope along its axis. At an integer coordinate the slope is the one to its right, also at -1 exactly. Outside the
    image both are 0; the slope times a NaN in grad_y is NaN. A NaN point has NaN gradients and adds nothing to that of x.

    Returns:
        A `BilinearSampleGradients`. On the CPU the same bits for any number of threads and whatever else is asked for;
        on a GPU the gradient of x if `deterministic`, the others always.

    Raises:
        TypeError, ValueError: as `bilinear_sample_forward`; a name in `wrt` that is unknown.

    Source: as `bilinear_sample_forward`, equations 6 and 7.
    """
    arrays = receive(ARGUMENTS, PointArrays(x=x, points=points))
    p = problem(arrays)
    grad_y = check_grad_y(grad_y, p.out_shape, "(N, C, ...), with the axes of points between N and 2", arrays.x)
    return run_backward(
        samplings, ARGUMENTS, p, grad_y, arrays, BilinearSampleGradients, wrt, out, options(deterministic)
    )
