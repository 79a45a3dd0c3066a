"""Deformable RoI pooling: forward and backward."""

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
    """RoI align with bins shifted by learned offsets and weighted by a learned mask::

        top, left, bottom, right = (y1, x1, y2, x2) * spatial_scale - 0.5,   h = bottom - top,   w = right - left
        top_ij  = top  + gamma * h * offsets[r, 1, i, j]
        left_ij = left + gamma * w * offsets[r, 0, i, j]
        y[r,c,i,j] = mask[r,0,i,j] * mean over u < qh, v < qw of  S(x[n,c];  top_ij + i*h/Ph + (u + 0.5)*h/Ph/qh,
                                                                         left_ij + j*w/Pw + (v + 0.5)*w/Pw/qw)

    Args:
        x: images `(N, C, H, W)`, float16, bfloat16, float32 or float64, any strides.
        rois: boxes `(R, 5)`: batch index, x1, y1, x2, y2, in coordinates of the original image.
        offsets: `(R, 2, Ph, Pw)`, x first, then y, in units of gamma times the size of the box; None for zeros.
        mask: modulation `(R, 1, Ph, Pw)`, or None for ones.
        output_size: bins of a box, Ph and Pw; an int, or one per axis (y, x).
        spatial_scale: factor from box coordinates to pixels of x, such as 1/8 for features of stride 8.
        sampling_ratio: samples of a bin along each axis; if 0 or less, about one per pixel: `ceil(h / Ph)` and
            `ceil(w / Pw)`.
        gamma: shift of a bin by an offset of 1, as a fraction of the size of the box.
        check: on a GPU, wait and raise if a row of `rois` has an invalid batch index or a non-finite corner; without it
            the bins of such a row are NaN. The CPU always checks.
        out: array to fill, `(R, C, Ph, Pw)`; must not overlap any input.

    S is bilinear interpolation with the outermost pixels extended by one pixel beyond the image; samples farther out,
    even infinitely far, are 0 and count in the mean. A NaN offset makes its bin NaN, and so does an infinite one times
    a gamma or size of 0. A bin without samples is 0.

    Returns:
        y, `(R, C, Ph, Pw)`. Bit-identical for any number of threads.

    Raises:
        TypeError: an argument is not an array or has an unsupported dtype, dtypes differ, or a parameter has the wrong
            type.
        ValueError: shapes do not match, a parameter is out of range, `out` overlaps an input, or a box has an invalid
            batch index or a non-finite corner.

    Sources: Dai et al., Deformable Convolutional Networks (2017), section 2.2; Zhu et al., Deformable ConvNets v2
    (2019), for the mask; the sampling grid is mmcv's.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois, shifts=offsets, mask=mask))
    return run_forward(
        poolings,
        ARGUMENTS,
        pooling(problem, arrays, output_size, spatial_scale, sampling_ratio, gamma, check),
        arrays,
        out,
    )


class DeformRoIPoolGradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `deform_roi_pool_forward`; None where not requested or not given."""

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
        grad_y: gradient of y, `(R, C, Ph, Pw)`, with the dtype of x.
        x: as in the forward.
        rois: as in the forward.
        offsets: as in the forward.
        mask: as in the forward.
        output_size: as in the forward.
        spatial_scale: as in the forward.
        sampling_ratio: as in the forward.
        gamma: as in the forward.
        wrt: name or names of the arguments whose gradients to compute; None for all that are given.
        deterministic: on a GPU, accumulate the gradient of x in a fixed order, which is slower.
        check: as in the forward; without it an invalid row of `rois` adds nothing to the gradient of x, and the
            gradients of its offsets and mask are NaN.
        out: `DeformRoIPoolGradients` of arrays to fill, shaped like the arguments; they must not overlap an input or
            each other. Fields left as None are allocated if requested.

    A pixel receives `grad_y * mask` times the weights with which the samples of a bin read it, divided by their number.
    An offset receives the sum over channels and samples of that gradient times the slope along its axis, times gamma
    and the size of the box; the mask receives the sum over channels of grad_y times the bin. The slope at an integer
    coordinate is the one to its right, and 0 where the outermost pixels are extended. A NaN offset has NaN gradients,
    as has its mask, and adds nothing to that of x. Where all samples lie outside, or there are none, the bin and its
    slopes are 0; times a NaN in grad_y that is NaN.

    Returns:
        A `DeformRoIPoolGradients`. Reproducible bit for bit: on the CPU for any number of threads and any `wrt`; on a
            GPU from run to run, the gradient of x only if `deterministic`.

    Raises:
        TypeError: as in `deform_roi_pool_forward`.
        ValueError: as in `deform_roi_pool_forward`, or `wrt` names an argument that is unknown or was not given.

    Sources: as in `deform_roi_pool_forward`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois, shifts=offsets, mask=mask))
    p = pooling(problem, arrays, output_size, spatial_scale, sampling_ratio, gamma, check)
    grad_y = check_grad_y(grad_y, p.out_shape, "(R, C, Ph, Pw)", arrays.x)
    return run_backward(
        poolings, ARGUMENTS, p, grad_y, arrays, DeformRoIPoolGradients, wrt, out, options(deterministic)
    )
