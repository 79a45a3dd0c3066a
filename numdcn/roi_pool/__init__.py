"""RoI pooling: forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple, overload

import numpy as np

from numdcn._call.arguments import check_grad_y, receive
from numdcn._call.arrays import AnyArray, Array
from numdcn._call.checks import IntPerAxis, flag
from numdcn._call.door import door, operator_module
from numdcn._call.options import options
from numdcn._call.results import given_back, new_like
from numdcn._call.roi import ROIS, RoIArrays, X, pooling
from numdcn._run import poolings, run_backward, run_forward
from numdcn.roi_pool.problem import ARGUMENTS, RESULTS, check_argmax, problem

operator_module(__name__)
Name = Literal["x"]  # what `wrt` may name


class RoIPoolResult(NamedTuple, Generic[Array]):
    """Result of `roi_pool_forward` with `return_argmax=True`."""

    y: Array
    argmax: Array  # int32


@overload
def roi_pool_forward(
    x: Array,
    rois: AnyArray,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    *,
    return_argmax: Literal[False] = False,
    check: bool = False,
    out: Array | None = None,
) -> Array: ...
@overload
def roi_pool_forward(
    x: Array,
    rois: AnyArray,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    *,
    return_argmax: Literal[True],
    check: bool = False,
    out: Array | None = None,
) -> RoIPoolResult[Array]: ...
@overload
def roi_pool_forward(
    x: Array,
    rois: AnyArray,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    *,
    return_argmax: bool,
    check: bool = False,
    out: Array | None = None,
) -> Array | RoIPoolResult[Array]: ...
@door
def roi_pool_forward(
    x: Array,
    rois: AnyArray,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    *,
    return_argmax: bool = False,
    check: bool = False,
    out: Array | None = None,
) -> Array | RoIPoolResult[Array]:
    """Pool boxes of any size to Ph x Pw bins, each the maximum of its pixels::

        top, left, bottom, right = round((y1, x1, y2, x2) * spatial_scale)
        h = max(bottom - top + 1, 1),  rows of bin i: from floor(i*h/Ph) + top up to ceil((i + 1)*h/Ph) + top
        y[r,c,i,j] = max over the rows and columns of the bin that lie in the image, of x[n,c]

    Args:
        x: images `(N, C, H, W)`, float16, bfloat16, float32 or float64, any strides.
        rois: boxes `(R, 5)`: batch index, x1, y1, x2, y2, in coordinates of the original image.
        output_size: bins of a box, Ph and Pw; an int, or one per axis (y, x).
        spatial_scale: factor from box coordinates to pixels of x, such as 1/8 for features of stride 8.
        return_argmax: whether to return the positions of the maxima too.
        check: on a GPU, wait and raise if a row of `rois` has an invalid batch index or a non-finite corner; without it
            the bins of such a row are NaN. The CPU always checks.
        out: array to fill with y, `(R, C, Ph, Pw)`; must not overlap any input.

    Corners are rounded to the nearest pixel, halves away from zero. Neighbouring bins may share pixels. Of equal maxima
    the first wins, row by row, and a NaN beats all. A bin without pixels is 0.

    Returns:
        y, `(R, C, Ph, Pw)`, or a `RoIPoolResult` of y and argmax, an int32 array of the same shape: `row*W + column`
            of the maximum, -1 for a bin without pixels. Bit-identical for any number of threads.

    Raises:
        TypeError: an argument is not an array or has an unsupported dtype, dtypes differ, or a parameter has the wrong
            type.
        ValueError: shapes do not match, a parameter is out of range, `out` overlaps an input, or a box has an invalid
            batch index or a non-finite corner.

    Source: Girshick, Fast R-CNN (2015), section 2.1; names and rules as in torchvision's `roi_pool`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    p = pooling(problem, arrays, output_size, spatial_scale, check)
    if not flag("return_argmax", return_argmax):
        return run_forward(poolings, ARGUMENTS, p, arrays, out)
    argmax = new_like(p.out_shape, np.int32, arrays.x)
    y = run_forward(poolings, ARGUMENTS, p, arrays._replace(argmax=argmax), out)
    return RoIPoolResult(y, given_back(argmax))


class RoIPoolGradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `roi_pool_forward`."""

    x: Array | None = None


@door
def roi_pool_backward(
    grad_y: Array,
    x: Array,
    rois: AnyArray,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    *,
    argmax: AnyArray | None = None,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    check: bool = False,
    out: RoIPoolGradients[Array] | None = None,
) -> RoIPoolGradients[Array]:
    """Gradients of `roi_pool_forward`, given the gradient of its result.

    Args:
        grad_y: gradient of y, `(R, C, Ph, Pw)`, with the dtype of x.
        x: as in the forward.
        rois: as in the forward.
        output_size: as in the forward.
        spatial_scale: as in the forward.
        argmax: from the forward with `return_argmax=True`; recomputed if None.
        wrt: "x" or None, which mean the same: there is no other gradient.
        deterministic: on a GPU, accumulate the gradient of x in a fixed order, which is slower.
        check: as in the forward; without it an invalid row of `rois` adds nothing to the gradient of x.
        out: `RoIPoolGradients` with an array to fill, shaped like x; must not overlap any input.

    A pixel receives grad_y of each bin whose maximum it is.

    Returns:
        A `RoIPoolGradients`. Reproducible bit for bit: on the CPU for any number of threads; on a GPU from run to run
            if `deterministic`.

    Raises:
        TypeError: as in `roi_pool_forward`, or `argmax` is not an int32 array.
        ValueError: as in `roi_pool_forward`, or `wrt` has an unknown name, `argmax` the wrong shape or a position
            outside the image. Positions are checked as they are used, so `out.x` may be left incomplete; on a GPU a
            position outside the image adds nothing.

    Source: as in `roi_pool_forward`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    p = pooling(problem, arrays, output_size, spatial_scale, check)
    grad_y = check_grad_y(grad_y, p.out_shape, "(R, C, Ph, Pw)", arrays.x)
    if argmax is not None:
        arrays = arrays._replace(argmax=check_argmax(argmax, p, arrays.x))
    table = (X, ROIS) if argmax is None else (*ARGUMENTS, *RESULTS)  # without the positions x is read again
    return run_backward(poolings, table, p, grad_y, arrays, RoIPoolGradients, wrt, out, options(deterministic))
