"""Position-sensitive RoI pooling: forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple

from numdcn._call.arguments import check_grad_y, receive
from numdcn._call.arrays import AnyArray, Array
from numdcn._call.checks import IntPerAxis
from numdcn._call.door import door, operator_module
from numdcn._call.options import options
from numdcn._call.roi import RoIArrays
from numdcn._run import poolings, run_backward, run_forward
from numdcn.ps_roi_pool.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["x"]  # what `wrt` may name


@door
def ps_roi_pool_forward(
    x: Array,
    rois: AnyArray,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    *,
    check: bool = False,
    out: Array | None = None,
) -> Array:
    """Pool boxes of any size to Ph x Pw bins, each from channels of its own: the mean of whole pixels::

        top, left, bottom, right = round((y1, x1, y2, x2) * spatial_scale)
        h = max(bottom - top, 1),  rows of bin i: from floor(i*h/Ph) + top up to ceil((i + 1)*h/Ph) + top
        y[r,c,i,j] = mean over the rows and columns of the bin that lie in the image, of x[n, (c*Ph + i)*Pw + j]

    Args:
        x: images (N, C, H, W), float32 or float64 (on a GPU also float16 or bfloat16), any strides; C a multiple of Ph*Pw.
        rois: boxes (R, 5): batch index, x1, y1, x2, y2, in coordinates of the original image.
        output_size: bins of a box, Ph and Pw; an int, or one for each axis (y, x).
        spatial_scale: from the boxes' coordinates to pixels of x, such as 1/8 for features of stride 8.
        check: on a GPU, whether to wait for it and raise if a row of `rois` is not a valid box (its batch index is none of x,
            or a corner is not finite); without this its bins are NaN. On the CPU boxes are always checked.
        out: an array to fill, (R, C/(Ph*Pw), Ph, Pw), sharing memory with no input.

    Corners are rounded to the nearest pixel, halves away from zero. Bins of neighbours may share pixels. A bin without
    pixels is 0.

    Returns:
        y, (R, C/(Ph*Pw), Ph, Pw). The same bits for any number of threads.

    Raises:
        TypeError: an array of another kind or dtype, or dtypes that differ; a parameter of a wrong type.
        ValueError: shapes that do not fit each other, a parameter out of range, an `out` that shares memory, a box whose
            batch index is none of x or whose corners are not finite.

    Source: Dai et al., R-FCN (2016), section 2; names as torchvision's `ps_roi_pool`, whose forward leaves out the last row
    and column of the image.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    return run_forward(poolings, ARGUMENTS, problem(arrays, output_size, spatial_scale, check), arrays, out)


class PSRoIPoolGradients(NamedTuple, Generic[Array]):
    """Gradients by the names of `ps_roi_pool_forward`'s arguments."""

    x: Array | None = None


@door
def ps_roi_pool_backward(
    grad_y: Array,
    x: Array,
    rois: AnyArray,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    *,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    check: bool = False,
    out: PSRoIPoolGradients[Array] | None = None,
) -> PSRoIPoolGradients[Array]:
    """Gradients of `ps_roi_pool_forward`, given the gradient of its result.

    Args:
        grad_y: gradient of y, (R, C/(Ph*Pw), Ph, Pw), of the dtype of the other arrays.
        x, rois, output_size, spatial_scale: as given to `ps_roi_pool_forward`. The values of x are not used.
        wrt: "x" or None, which is the same: there is no other gradient.
        deterministic: on a GPU, whether to add up the gradient of x in a fixed order, which takes longer.
        check: as in the forward; without it a row of `rois` that is not a valid box adds nothing to the gradient of x.
        out: a `PSRoIPoolGradients` with an array to fill, shaped like x and sharing memory with no input.

    A pixel receives from each bin that holds it grad_y over the number of the bin's pixels.

    Returns:
        A `PSRoIPoolGradients`. On the CPU the same bits for any number of threads; on a GPU from run to run if
        `deterministic`.

    Raises:
        TypeError, ValueError: as `ps_roi_pool_forward`; a name in `wrt` that is unknown.

    Source: as `ps_roi_pool_forward`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    p = problem(arrays, output_size, spatial_scale, check)
    grad_y = check_grad_y(grad_y, p.out_shape, "(R, C/(Ph*Pw), Ph, Pw)", arrays.x)
    return run_backward(poolings, ARGUMENTS, p, grad_y, arrays, PSRoIPoolGradients, wrt, out, options(deterministic))
