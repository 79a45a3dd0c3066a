"""Deformable position-sensitive RoI pooling: forward and backward."""

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
from numdcn.deform_ps_roi_pool.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["x", "trans"]  # what `wrt` may name


@door
def deform_ps_roi_pool_forward(
    x: Array,
    rois: AnyArray,
    trans: AnyArray | None = None,
    *,
    output_size: IntPerAxis,
    group_size: int,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    spatial_scale: float = 1.0,
    check: bool = False,
    out: Array | None = None,
) -> Array:
    """Position-sensitive RoI pooling with bins shifted by learned offsets, separately for each class::

        top  = round(y1)*spatial_scale - 0.5,   h = max((round(y2) + 1)*spatial_scale - 0.5 - top, 0.1)   (x likewise)
        (pi, pj) = (floor(i*part_h/Ph), floor(j*part_w/Pw)),   k = floor(c*classes/C_out): the class of channel c
        top_ij  = top  + i*h/Ph + trans[r, 2*k + 1, pi, pj]*trans_std*h
        left_ij = left + j*w/Pw + trans[r, 2*k,     pi, pj]*trans_std*w
        channel = (c*group_size + floor(i*group_size/Ph))*group_size + floor(j*group_size/Pw)
        y[r,c,i,j] = mean over u, v < sample_per_part of  S(x[n, channel];  top_ij  + u*h/Ph/sample_per_part,
                                                                          left_ij + v*w/Pw/sample_per_part)

    Args:
        x: images `(N, C, H, W)`, float16, bfloat16, float32 or float64, any strides; C a multiple of
            `group_size**2`.
        rois: boxes `(R, 5)`: batch index, x1, y1, x2, y2, in coordinates of the original image; corners are rounded to
            whole pixels, halves away from zero, and both ends count.
        trans: offsets `(R, 2*classes, part_h, part_w)`, for each class x, then y, in units of trans_std times the size
            of the box; None for zeros. `classes` splits the channels of y into contiguous blocks.
        output_size: bins of a box, Ph and Pw; an int, or one per axis (y, x).
        group_size: cells along an axis, each with channels of its own; with 1, all bins read the same channels.
        sample_per_part: samples of a bin along each axis, the first at its upper left corner.
        trans_std: shift of a bin by an offset of 1, as a fraction of the size of the box.
        spatial_scale: factor from box coordinates to pixels of x, such as 1/8 for features of stride 8.
        check: on a GPU, wait and raise if a row of `rois` has an invalid batch index or a non-finite corner; without it
            the bins of such a row are NaN. The CPU always checks.
        out: array to fill, `(R, C/group_size**2, Ph, Pw)`; must not overlap any input.

    S is bilinear interpolation with the outermost pixels extended by half a pixel beyond their centres; samples farther
    out, even infinitely far, do not count in the mean. A NaN offset makes its bins NaN, and so does an infinite one
    times a trans_std of 0. A bin without samples is 0.

    Returns:
        y, `(R, C/group_size**2, Ph, Pw)`. Bit-identical for any number of threads.

    Raises:
        TypeError: an argument is not an array or has an unsupported dtype, dtypes differ, or a parameter has the wrong
            type.
        ValueError: shapes do not match, a parameter is out of range, `out` overlaps an input, or a box has an invalid
            batch index or a non-finite corner.

    Sources: Dai et al., Deformable Convolutional Networks (2017), section 2.2, and R-FCN (2016); samples and names as
    in the authors' operator.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois, shifts=trans))
    p = pooling(problem, arrays, output_size, group_size, sample_per_part, trans_std, spatial_scale, check)
    return run_forward(poolings, ARGUMENTS, p, arrays, out)


class DeformPSRoIPoolGradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `deform_ps_roi_pool_forward`; None where not requested or not given."""

    x: Array | None = None
    trans: Array | None = None


@door
def deform_ps_roi_pool_backward(
    grad_y: Array,
    x: Array,
    rois: AnyArray,
    trans: AnyArray | None = None,
    *,
    output_size: IntPerAxis,
    group_size: int,
    sample_per_part: int = 4,
    trans_std: float = 0.1,
    spatial_scale: float = 1.0,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    check: bool = False,
    out: DeformPSRoIPoolGradients[Array] | None = None,
) -> DeformPSRoIPoolGradients[Array]:
    """Gradients of `deform_ps_roi_pool_forward`, given the gradient of its result.

    Args:
        grad_y: gradient of y, `(R, C/group_size**2, Ph, Pw)`, with the dtype of x.
        x: as in the forward.
        rois: as in the forward.
        trans: as in the forward.
        output_size: as in the forward.
        group_size: as in the forward.
        sample_per_part: as in the forward.
        trans_std: as in the forward.
        spatial_scale: as in the forward.
        wrt: name or names of the arguments whose gradients to compute; None for all that are given.
        deterministic: on a GPU, accumulate the gradient of x in a fixed order, which is slower.
        check: as in the forward; without it an invalid row of `rois` adds nothing to the gradient of x, and the
            gradients of its trans are NaN.
        out: `DeformPSRoIPoolGradients` of arrays to fill, shaped like the arguments; they must not overlap an input or
            each other. Fields left as None are allocated if requested.

    A pixel receives grad_y times the weights with which the counted samples of a bin read it, divided by their number.
    An offset receives the sum over its bins, channels and samples of that gradient times the slope along its axis,
    times trans_std and the size of the box. The slope at an integer coordinate is the one to its right, and 0 where the
    outermost pixels are extended. A NaN offset has NaN gradients and adds nothing to that of x. Where no sample counts,
    the bin and its slopes are 0; times a NaN in grad_y that is NaN.

    Returns:
        A `DeformPSRoIPoolGradients`. Reproducible bit for bit: on the CPU for any number of threads and any `wrt`; on a
            GPU from run to run, the gradient of x only if `deterministic`.

    Raises:
        TypeError: as in `deform_ps_roi_pool_forward`.
        ValueError: as in `deform_ps_roi_pool_forward`, or `wrt` names an argument that is unknown or was not given.

    Sources: as in `deform_ps_roi_pool_forward`.
    """
    arrays = receive(ARGUMENTS, RoIArrays(x=x, rois=rois, shifts=trans))
    p = pooling(problem, arrays, output_size, group_size, sample_per_part, trans_std, spatial_scale, check)
    grad_y = check_grad_y(grad_y, p.out_shape, "(R, C/group_size**2, Ph, Pw)", arrays.x)
    return run_backward(
        poolings, ARGUMENTS, p, grad_y, arrays, DeformPSRoIPoolGradients, wrt, out, options(deterministic)
    )
