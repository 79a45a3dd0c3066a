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
from numdcn._call.roi import RoIArrays
from numdcn._run import poolings, run_backward, run_forward
from numdcn.roi_pool.problem import ARGMAX, ARGUMENTS, check_argmax, problem

operator_module(__name__)
Name = Literal["x"]  # what `wrt` may name


class RoIPoolResult(NamedTuple, Generic[Array]):
    """What `roi_pool_forward` returns with `return_argmax=True`."""

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
    """Pool boxes of any size to Ph x Pw bins, each the largest of its pixels::

        top, left, bottom, right = round((y1, x1, y2, x2) * spatial_scale)
        h = max(bottom - top + 1, 1),  rows of bin i: from floor(i*h/Ph) + top up to ceil((i + 1)*h/Ph) + top
        y[r,c,i,j] = max over the rows and columns of the bin that lie in the image, of x[n,c]

    Args:
        x: images (N, C, H, W), float32 or float64 (on a GPU also float16 or bfloat16), any strides.
        rois: boxes (R, 5): batch index, x1, y1, x2, y2, in coordinates of the original image.
        output_size: bins of a box, Ph and Pw; an int, or one for each axis (y, x).
        spatial_scale: from the boxes' coordinates to pixels of x, such as 1/8 for features of stride 8.
        return_argmax: whether to return the positions of the maxima too.
        check: on a GPU, whether to wait for it and raise if a row of `rois` is not a valid box (its batch index is none of x,
            or a corner is not finite); without this its bins are NaN. On the CPU boxes are always checked.
        out: an array to fill with y, (R, C, Ph, Pw), sharing memory with no input.

    Corners are rounded to the nearest pixel, halves away from zero. Bins of neighbours may share pixels. The first of equal
    pixels, row by row, counts as the largest, and a NaN as larger than all. A bin without pixels is 0.

    Returns:
        y, (R, C, Ph, Pw), or a `RoIPoolResult` of y and argmax, of the same shape, int32: row * W + column of the largest
        pixel, -1 for a bin without pixels. The same bits for any number of threads.

    Raises:
        TypeError: an array of another kind or dtype, or dtypes that differ; a parameter of a wrong type.
        ValueError: shapes that do not fit each other, a parameter out of range, an `out` that shares memory, a box whose
            batch index is none of x or whose corners are not finite.

    Source: Girshick, Fast R-CNN (2015), section 2.1; names and rules as torchvision's `roi_pool`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    p = problem(arrays, output_size, spatial_scale, check)
    if not flag("return_argmax", return_argmax):
        return run_forward(poolings, ARGUMENTS, p, arrays, out)
    argmax = new_like(p.out_shape, np.int32, arrays.x)
    y = run_forward(poolings, ARGUMENTS, p, arrays._replace(argmax=argmax), out)
    return RoIPoolResult(y, given_back(argmax))


class RoIPoolGradients(NamedTuple, Generic[Array]):
    """Gradients by the names of `roi_pool_forward`'s arguments."""

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
        grad_y: gradient of y, (R, C, Ph, Pw), of the dtype of the other arrays.
        x, rois, output_size, spatial_scale: as given to `roi_pool_forward`.
        argmax: what the forward returned with `return_argmax=True`, int32; found again if not given.
        wrt: "x" or None, which is the same: there is no other gradient.
        deterministic: on a GPU, whether to add up the gradient of x in a fixed order, which takes longer.
        check: as in the forward; without it a row of `rois` that is not a valid box adds nothing to the gradient of x.
        out: a `RoIPoolGradients` with an array to fill, shaped like x and sharing memory with no input.

    A pixel receives grad_y of each bin whose maximum it is.

    Returns:
        A `RoIPoolGradients`. On the CPU the same bits for any number of threads; on a GPU from run to run if
        `deterministic`.

    Raises:
        TypeError, ValueError: as `roi_pool_forward`; a name in `wrt` that is unknown; an argmax of another shape or type, or
            with a position that is in no image (found on the way: `out.x` is then left unfinished; on a GPU such a position
            adds nothing).

    Source: as `roi_pool_forward`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    p = problem(arrays, output_size, spatial_scale, check)
    grad_y = check_grad_y(grad_y, p.out_shape, "(R, C, Ph, Pw)", arrays.x)
    if argmax is not None:
        arrays = arrays._replace(argmax=check_argmax(argmax, p, arrays.x))
    table = (*ARGUMENTS, ARGMAX)
    return run_backward(poolings, table, p, grad_y, arrays, RoIPoolGradients, wrt, out, options(deterministic))
