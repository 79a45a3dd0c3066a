"""Position-sensitive RoI align: forward and backward."""

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
from numdcn.ps_roi_align.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["x"]  # what `wrt` may name


@door
def ps_roi_align_forward(
    x: Array,
    rois: AnyArray,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    *,
    check: bool = False,
    out: Array | None = None,
) -> Array:
    """Pool boxes of any size to Ph x Pw bins, each the mean of interpolated samples from channels of its own::

        top, left, bottom, right = (y1, x1, y2, x2) * spatial_scale - 0.5
        bin_h = (bottom - top) / Ph,  qh = sampling_ratio if above 0, else ceil(bin_h)
        y[r,c,i,j] = mean over u < qh, v < qw of  S(x[n, (c*Ph + i)*Pw + j];  top  + i*bin_h + (u + 0.5)*bin_h/qh,
                                                                             left + j*bin_w + (v + 0.5)*bin_w/qw)

    Args:
        x: images `(N, C, H, W)`, float16, bfloat16, float32 or float64, any strides; C a multiple of
            `Ph*Pw`.
        rois: boxes `(R, 5)`: batch index, x1, y1, x2, y2, in coordinates of the original image.
        output_size: bins of a box, Ph and Pw; an int, or one per axis (y, x).
        spatial_scale: factor from box coordinates to pixels of x, such as 1/8 for features of stride 8.
        sampling_ratio: samples of a bin along each axis; if 0 or less, about one per pixel: `ceil(h / Ph)` and
            `ceil(w / Pw)`.
        check: on a GPU, wait and raise if a row of `rois` has an invalid batch index or a non-finite corner; without it
            the bins of such a row are NaN. The CPU always checks.
        out: array to fill, `(R, C/(Ph*Pw), Ph, Pw)`; must not overlap any input.

    S is bilinear interpolation with the outermost pixels extended by one pixel beyond the image; samples farther out
    are 0 and count in the mean. A bin without samples is 0.

    Returns:
        y, `(R, C/(Ph*Pw), Ph, Pw)`. Bit-identical for any number of threads.

    Raises:
        TypeError: an argument is not an array or has an unsupported dtype, dtypes differ, or a parameter has the wrong
            type.
        ValueError: shapes do not match, a parameter is out of range, `out` overlaps an input, or a box has an invalid
            batch index or a non-finite corner.

    Sources: Dai et al., R-FCN (2016), for the channels; Li et al., Light-Head R-CNN (2017), for the samples; names as
    in torchvision's `ps_roi_align`, which gives NaN for a bin without samples.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    return run_forward(
        poolings, ARGUMENTS, pooling(problem, arrays, output_size, spatial_scale, sampling_ratio, check), arrays, out
    )


class PSRoIAlignGradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `ps_roi_align_forward`."""

    x: Array | None = None


@door
def ps_roi_align_backward(
    grad_y: Array,
    x: Array,
    rois: AnyArray,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    *,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    check: bool = False,
    out: PSRoIAlignGradients[Array] | None = None,
) -> PSRoIAlignGradients[Array]:
    """Gradients of `ps_roi_align_forward`, given the gradient of its result.

    Args:
        grad_y: gradient of y, `(R, C/(Ph*Pw), Ph, Pw)`, with the dtype of x.
        x: as in the forward; its values are not used.
        rois: as in the forward.
        output_size: as in the forward.
        spatial_scale: as in the forward.
        sampling_ratio: as in the forward.
        wrt: "x" or None, which mean the same: there is no other gradient.
        deterministic: on a GPU, accumulate the gradient of x in a fixed order, which is slower.
        check: as in the forward; without it an invalid row of `rois` adds nothing to the gradient of x.
        out: `PSRoIAlignGradients` with an array to fill, shaped like x; must not overlap any input.

    A pixel receives grad_y times the weights with which the samples of a bin read it, divided by their number.

    Returns:
        A `PSRoIAlignGradients`. Reproducible bit for bit: on the CPU for any number of threads; on a GPU from run to
            run if `deterministic`.

    Raises:
        TypeError: as in `ps_roi_align_forward`.
        ValueError: as in `ps_roi_align_forward`, or `wrt` has an unknown name.

    Sources: as in `ps_roi_align_forward`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    p = pooling(problem, arrays, output_size, spatial_scale, sampling_ratio, check)
    grad_y = check_grad_y(grad_y, p.out_shape, "(R, C/(Ph*Pw), Ph, Pw)", arrays.x)
    return run_backward(poolings, ARGUMENTS, p, grad_y, arrays, PSRoIAlignGradients, wrt, out, options(deterministic))
