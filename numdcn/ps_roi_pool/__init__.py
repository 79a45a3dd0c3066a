"""Position-sensitive RoI pooling: forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple

from numdcn._call.arguments import check_grad_y, receive
from numdcn._call.arrays import AnyArray, Array
from numdcn._call.checks import IntPerAxis
from numdcn._call.door import door, operator_module
from numdcn._call.options import options
from numdcn._call.roi import RoIArrays, pooling
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
    """Pool boxes of any size to Ph x Pw bins, each the mean of whole pixels from channels of its own::

        top, left, bottom, right = round((y1, x1, y2, x2) * spatial_scale)
        h = max(bottom - top, 1),  rows of bin i: from floor(i*h/Ph) + top up to ceil((i + 1)*h/Ph) + top
        y[r,c,i,j] = mean over the rows and columns of the bin that lie in the image, of x[n, (c*Ph + i)*Pw + j]

    Args:
        x: images `(N, C, H, W)`, float16, bfloat16, float32 or float64, any strides; C a multiple of
            `Ph*Pw`.
        rois: boxes `(R, 5)`: batch index, x1, y1, x2, y2, in coordinates of the original image.
        output_size: bins of a box, Ph and Pw; an int, or one per axis (y, x).
        spatial_scale: factor from box coordinates to pixels of x, such as 1/8 for features of stride 8.
        check: on a GPU, wait and raise if a row of `rois` has an invalid batch index or a non-finite corner; without it
            the bins of such a row are NaN. The CPU always checks.
        out: array to fill, `(R, C/(Ph*Pw), Ph, Pw)`; must not overlap any input.

    Corners are rounded to the nearest pixel, halves away from zero. Neighbouring bins may share pixels. A bin without
    pixels is 0.

    Returns:
        y, `(R, C/(Ph*Pw), Ph, Pw)`. Bit-identical for any number of threads.

    Raises:
        TypeError: an argument is not an array or has an unsupported dtype, dtypes differ, or a parameter has the wrong
            type.
        ValueError: shapes do not match, a parameter is out of range, `out` overlaps an input, or a box has an invalid
            batch index or a non-finite corner.

    Source: Dai et al., R-FCN (2016), section 2; names as in torchvision's `ps_roi_pool`, whose forward leaves out the
    last row and column of the image.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    return run_forward(poolings, ARGUMENTS, pooling(problem, arrays, output_size, spatial_scale, check), arrays, out)


class PSRoIPoolGradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `ps_roi_pool_forward`."""

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
        grad_y: gradient of y, `(R, C/(Ph*Pw), Ph, Pw)`, with the dtype of x.
        x: as in the forward; its values are not used.
        rois: as in the forward.
        output_size: as in the forward.
        spatial_scale: as in the forward.
        wrt: "x" or None, which mean the same: there is no other gradient.
        deterministic: on a GPU, accumulate the gradient of x in a fixed order, which is slower.
        check: as in the forward; without it an invalid row of `rois` adds nothing to the gradient of x.
        out: `PSRoIPoolGradients` with an array to fill, shaped like x; must not overlap any input.

    From each bin that contains it, a pixel receives grad_y divided by the number of pixels of the bin.

    Returns:
        A `PSRoIPoolGradients`. Reproducible bit for bit: on the CPU for any number of threads; on a GPU from run to run
            if `deterministic`.

    Raises:
        TypeError: as in `ps_roi_pool_forward`.
        ValueError: as in `ps_roi_pool_forward`, or `wrt` has an unknown name.

    Source: as in `ps_roi_pool_forward`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    p = pooling(problem, arrays, output_size, spatial_scale, check)
    grad_y = check_grad_y(grad_y, p.out_shape, "(R, C/(Ph*Pw), Ph, Pw)", arrays.x)
    return run_backward(poolings, ARGUMENTS, p, grad_y, arrays, PSRoIPoolGradients, wrt, out, options(deterministic))
