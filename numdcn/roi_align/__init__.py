"""RoI align: forward and backward."""

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
from numdcn.roi_align.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["x"]  # what `wrt` may name


@door
def roi_align_forward(
    x: Array,
    rois: AnyArray,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    check: bool = False,
    out: Array | None = None,
) -> Array:
    """Pool boxes of any size to Ph x Pw bins, each the mean of samples interpolated on a regular grid::

        top, left, bottom, right = (y1, x1, y2, x2) * spatial_scale - (0.5 if aligned else 0)
        h = bottom - top  (at least 1 unless aligned),  bin_h = h / Ph,  qh = sampling_ratio if above 0, else ceil(h / Ph)
        y[r,c,i,j] = mean over u < qh, v < qw of  S(x[n,c];  top  + i*bin_h + (u + 0.5)*bin_h/qh,
                                                            left + j*bin_w + (v + 0.5)*bin_w/qw)

    Args:
        x: images (N, C, H, W), float32 or float64 (on a GPU also float16 or bfloat16), any strides.
        rois: boxes (R, 5): batch index, x1, y1, x2, y2, in coordinates of the original image.
        output_size: bins of a box, Ph and Pw; an int, or one for each axis (y, x).
        spatial_scale: from the boxes' coordinates to pixels of x, such as 1/8 for features of stride 8.
        sampling_ratio: samples of a bin along each axis; not above 0: about one a pixel, ceil(h / Ph) and ceil(w / Pw).
        aligned: whether to shift by half a pixel, as the centre of pixel i is at i here; False is the operator's first
            version, without the shift.
        check: on a GPU, whether to wait for it and raise if a row of `rois` is not a valid box (its batch index is none of x,
            or a corner is not finite); without this its bins are NaN. On the CPU boxes are always checked.
        out: an array to fill, (R, C, Ph, Pw), sharing memory with no input.

    S is bilinear interpolation with the outermost pixels continued for one pixel beyond the image; samples farther out are
    0, and count in the mean. A bin without samples is 0.

    Returns:
        y, (R, C, Ph, Pw). The same bits for any number of threads.

    Raises:
        TypeError: an array of another kind or dtype, or dtypes that differ; a parameter of a wrong type.
        ValueError: shapes that do not fit each other, a parameter out of range, an `out` that shares memory, a box whose
            batch index is none of x or whose corners are not finite.

    Source: He et al., Mask R-CNN (2017), section 3; names and rules as torchvision's `roi_align`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    return run_forward(
        poolings, ARGUMENTS, problem(arrays, output_size, spatial_scale, sampling_ratio, aligned, check), arrays, out
    )


class RoIAlignGradients(NamedTuple, Generic[Array]):
    """Gradients by the names of `roi_align_forward`'s arguments."""

    x: Array | None = None


@door
def roi_align_backward(
    grad_y: Array,
    x: Array,
    rois: AnyArray,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    check: bool = False,
    out: RoIAlignGradients[Array] | None = None,
) -> RoIAlignGradients[Array]:
    """Gradients of `roi_align_forward`, given the gradient of its result.

    Args:
        grad_y: gradient of y, (R, C, Ph, Pw), of the dtype of the other arrays.
        x, rois, output_size, spatial_scale, sampling_ratio, aligned: as given to `roi_align_forward`. The values of x
            are not used.
        wrt: "x" or None, which is the same: there is no other gradient.
        deterministic: on a GPU, whether to add up the gradient of x in a fixed order, which takes longer.
        check: as in the forward; without it a row of `rois` that is not a valid box adds nothing to the gradient of x.
        out: a `RoIAlignGradients` with an array to fill, shaped like x and sharing memory with no input.

    A pixel receives grad_y in the weights with which the samples of a bin read it, over their number.

    Returns:
        A `RoIAlignGradients`. On the CPU the same bits for any number of threads; on a GPU from run to run if
        `deterministic`.

    Raises:
        TypeError, ValueError: as `roi_align_forward`; a name in `wrt` that is unknown.

    Source: as `roi_align_forward`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois))
    p = problem(arrays, output_size, spatial_scale, sampling_ratio, aligned, check)
    grad_y = check_grad_y(grad_y, p.out_shape, "(R, C, Ph, Pw)", arrays.x)
    return run_backward(poolings, ARGUMENTS, p, grad_y, arrays, RoIAlignGradients, wrt, out, options(deterministic))
