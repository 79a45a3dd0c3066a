"""Deformable RoI pooling: forward and backward."""

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
from numdcn.deform_roi_pool.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["x", "offsets", "mask"]  # what `wrt` may name


@door
def deform_roi_pool_forward(
    x: Array,
    rois: AnyArray,
    offsets: AnyArray | None = None,
    mask: Array | None = None,
    *,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    check: bool = False,
    out: Array | None = None,
) -> Array:
    """RoI align whose bins are shifted by learned offsets, and weighted by a learned mask::

        top, left, bottom, right = (y1, x1, y2, x2) * spatial_scale - 0.5,   h = bottom - top,   w = right - left
        top_ij  = top  + gamma * h * offsets[r, 1, i, j]
        left_ij = left + gamma * w * offsets[r, 0, i, j]
        y[r,c,i,j] = mask[r,0,i,j] * mean over u < qh, v < qw of  S(x[n,c];  top_ij + i*h/Ph + (u + 0.5)*h/Ph/qh,
                                                                         left_ij + j*w/Pw + (v + 0.5)*w/Pw/qw)

    Args:
        x: images (N, C, H, W), float32 or float64 (on a GPU also float16 or bfloat16), any strides.
        rois: boxes (R, 5): batch index, x1, y1, x2, y2, in coordinates of the original image.
        offsets: (R, 2, Ph, Pw), x first, then y, as fractions of the box's size over gamma; None for zeros.
        mask: modulation (R, 1, Ph, Pw), or None for ones.
        output_size: bins of a box, Ph and Pw; an int, or one for each axis (y, x).
        spatial_scale: from the boxes' coordinates to pixels of x, such as 1/8 for features of stride 8.
        sampling_ratio: samples of a bin along each axis; not above 0: about one a pixel, ceil(h / Ph) and ceil(w / Pw).
        gamma: how far an offset of 1 shifts a bin, as a fraction of the box's size.
        check: on a GPU, whether to wait for it and raise if a row of `rois` is not a valid box (its batch index is none of x,
            or a corner is not finite); without this its bins are NaN. On the CPU boxes are always checked.
        out: an array to fill, (R, C, Ph, Pw), sharing memory with no input.

    S is bilinear interpolation with the outermost pixels continued for one pixel beyond the image; samples farther out,
    infinitely far too, are 0, and count in the mean. A NaN offset makes its bin NaN, and so does an infinite one times a gamma
    or a size of 0. A bin without samples is 0.

    Returns:
        y, (R, C, Ph, Pw). The same bits for any number of threads.

    Raises:
        TypeError: an array of another kind or dtype, or dtypes that differ; a parameter of a wrong type.
        ValueError: shapes that do not fit each other, a parameter out of range, an `out` that shares memory, a box whose
            batch index is none of x or whose corners are not finite.

    Sources: Dai et al., Deformable Convolutional Networks (2017), section 2.2; Zhu et al., Deformable ConvNets v2 (2019),
    for the mask; the sampling grid is mmcv's.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois, shifts=offsets, mask=mask))
    return run_forward(
        poolings, ARGUMENTS, problem(arrays, output_size, spatial_scale, sampling_ratio, gamma, check), arrays, out
    )


class DeformRoIPoolGradients(NamedTuple, Generic[Array]):
    """Gradients by the names of `deform_roi_pool_forward`'s arguments; None where not asked for or without such an input."""

    x: Array | None = None
    offsets: Array | None = None
    mask: Array | None = None


@door
def deform_roi_pool_backward(
    grad_y: Array,
    x: Array,
    rois: AnyArray,
    offsets: AnyArray | None = None,
    mask: Array | None = None,
    *,
    output_size: IntPerAxis,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    check: bool = False,
    out: DeformRoIPoolGradients[Array] | None = None,
) -> DeformRoIPoolGradients[Array]:
    """Gradients of `deform_roi_pool_forward`, given the gradient of its result.

    Args:
        grad_y: gradient of y, (R, C, Ph, Pw), of the dtype of the other arrays.
        x, rois, offsets, mask, output_size, spatial_scale, sampling_ratio, gamma: as given to the forward.
        wrt: the name or names of the arguments whose gradients are wanted; None for all that are given.
        deterministic: on a GPU, whether to add up the gradient of x in a fixed order, which takes longer.
        check: as in the forward; without it a row of `rois` that is not a valid box adds nothing to the gradient of x, and
            the gradients of its offsets and mask are NaN.
        out: a `DeformRoIPoolGradients` of arrays to fill, shaped like the arguments and sharing memory with none of them;
            what is wanted but None there is allocated.

    A pixel receives grad_y * mask in the weights with which the samples of a bin read it, over their number; an offset the
    sum over channels and samples of that gradient times the slope along its axis, times gamma and the box's size; the mask
    the sum over channels of grad_y times the bin. Slopes at integer coordinates are those to the right, and 0 where the
    outermost pixels are continued. A NaN offset has NaN gradients, as its mask has, and adds nothing to that of x. Where all
    samples lie outside, or there are none, the bin and its slopes are 0; times a NaN in grad_y that is NaN.

    Returns:
        A `DeformRoIPoolGradients`. On the CPU the same bits for any number of threads and whatever else is asked for;
        on a GPU from run to run: the gradient of x if `deterministic`, the others always.

    Raises:
        TypeError, ValueError: as `deform_roi_pool_forward`; a name in `wrt` that is unknown, or was not given.

    Sources: as `deform_roi_pool_forward`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois, shifts=offsets, mask=mask))
    p = problem(arrays, output_size, spatial_scale, sampling_ratio, gamma, check)
    grad_y = check_grad_y(grad_y, p.out_shape, "(R, C, Ph, Pw)", arrays.x)
    return run_backward(
        poolings, ARGUMENTS, p, grad_y, arrays, DeformRoIPoolGradients, wrt, out, options(deterministic)
    )
