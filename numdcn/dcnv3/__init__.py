"""DCNv3: forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple

from numdcn._call.arguments import check_grad_y, receive
from numdcn._call.arrays import AnyArray, Array
from numdcn._call.attention import AttentionArrays
from numdcn._call.checks import IntPerAxis, Padding
from numdcn._call.door import door, operator_module
from numdcn._call.options import options
from numdcn._call.remembered import remembered
from numdcn._run import attentions, run_backward, run_forward
from numdcn.dcnv3.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["x", "offsets", "mask"]  # what `wrt` may name


@door
def dcnv3_forward(
    x: Array,
    offsets: AnyArray,
    mask: Array,
    *,
    kernel_size: IntPerAxis = 3,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    out: Array | None = None,
) -> Array:
    """DCNv3, the operator of InternImage: each group of channels is sampled at the points of a kernel, each moved by an
    offset, and the samples are summed with the mask as weights. There is no kernel weight.

    With g the group, k the point in row ky, column kx of the kernel, `cy = dilation_y*(kh-1) // 2` and cx likewise its
    middle, and S bilinear interpolation::

        y[n, i, j, g*D + d] = sum over k of mask[n, i, j, g*P + k] * S(x[n, :, :, g*D + d]; py, px)
        py = i*stride_y - padding_y + cy + offset_scale * (ky*dilation_y - cy + offsets[n, i, j, (g*P + k)*2 + 1])
        px = j*stride_x - padding_x + cx + offset_scale * (kx*dilation_x - cx + offsets[n, i, j, (g*P + k)*2])

    Here padding_y, padding_x are the padding before x. Points are numbered column by column: `k = kx*kh + ky`; those
    after a removed one move up.

    Args:
        x: images, channels last, `(N, H, W, groups*D)`, float16, bfloat16, float32 or float64, any strides.
        offsets: displacements in pixels of x, before offset_scale, `(N, Ho, Wo, groups*P*2)`; for each point x, then y.
        mask: weights of the points, `(N, Ho, Wo, groups*P)`, any numbers; no softmax is applied.
        kernel_size: an int, or one per axis (y, x). P is `kh*kw`, one less with remove_center.
        stride: in pixels; an int, or one per axis (y, x).
        padding: zeros around x; an int, one per axis, or a (before, after) pair per axis.
        dilation: spacing of the points in pixels; an int, or one per axis (y, x).
        offset_scale: factor of the offsets and of the kernel's own grid, about its middle; any finite number.
        remove_center: leave out the point in the middle; both kernel sizes must be odd.
        out: array to fill, `(N, Ho, Wo, groups*D)`; must not overlap any input.

    `groups` is inferred: the channels of `mask` over P.

    Outside the image x is zero: S falls to 0 within one pixel of the border and is exactly 0 beyond, for huge and
    infinite offsets too. A NaN offset makes y NaN at its pixel, in all channels of its group. A NaN in x affects only
    the samples that have its pixel as a corner.

    Returns:
        y, `(N, Ho, Wo, groups*D)`, where `Ho = (H + padding before and after - dilation_y*(kh-1) - 1) // stride_y + 1`.
            Bit-identical for any number of threads.

    Raises:
        TypeError: an argument is not an array or has an unsupported dtype, dtypes differ, or a parameter has the wrong
            type.
        ValueError: shapes do not match, a parameter is out of range, or `out` overlaps an input.

    Source: Wang et al., InternImage (2023).
    """
    arrays = receive(ARGUMENTS, AttentionArrays(x, offsets, mask))
    p = remembered(problem, arrays, kernel_size, stride, padding, dilation, offset_scale, remove_center)
    return run_forward(attentions, ARGUMENTS, p, arrays, out)


class DCNv3Gradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `dcnv3_forward`; None where not requested."""

    x: Array | None = None
    offsets: Array | None = None
    mask: Array | None = None


@door
def dcnv3_backward(
    grad_y: Array,
    x: Array,
    offsets: AnyArray,
    mask: Array,
    *,
    kernel_size: IntPerAxis = 3,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    out: DCNv3Gradients[Array] | None = None,
) -> DCNv3Gradients[Array]:
    """Gradients of `dcnv3_forward`, given the gradient of its result.

    For each point::

        x        mask * grad_y, spread over the four corners with their interpolation weights
        offsets  offset_scale * mask * sum over d of grad_y * (slope of S)
        mask     sum over d of grad_y * S

    Args:
        grad_y: gradient of y, `(N, Ho, Wo, groups*D)`, with the dtype of x.
        x: as in the forward.
        offsets: as in the forward.
        mask: as in the forward.
        kernel_size: as in the forward.
        stride: as in the forward.
        padding: as in the forward.
        dilation: as in the forward.
        offset_scale: as in the forward.
        remove_center: as in the forward.
        wrt: name or names of the arguments whose gradients to compute; None for all.
        deterministic: on a GPU, accumulate the gradient of x in a fixed order, which is slower.
        out: `DCNv3Gradients` of arrays to fill, shaped like the arguments; they must not overlap an input or each
            other. Fields left as None are allocated if requested.

    At an integer coordinate the slope is the one to its right, at -1 too. Outside the image S and its slopes are 0, and
    so are all gradients; a NaN in grad_y or mask times that 0 is NaN. A NaN offset makes the gradients of both its
    coordinates and of its mask NaN, and adds nothing to that of x.

    Returns:
        A `DCNv3Gradients`. Reproducible bit for bit: on the CPU for any number of threads and any `wrt`; on a GPU from
            run to run, the gradient of x only if `deterministic`.

    Raises:
        TypeError: as in `dcnv3_forward`.
        ValueError: as in `dcnv3_forward`, or `wrt` names an argument that is unknown.

    Source: as in `dcnv3_forward`.
    """
    arrays = receive(ARGUMENTS, AttentionArrays(x, offsets, mask))
    p = remembered(problem, arrays, kernel_size, stride, padding, dilation, offset_scale, remove_center)
    grad_y = check_grad_y(grad_y, p.out_shape, "(N, Ho, Wo, groups*D)", arrays.value)
    return run_backward(attentions, ARGUMENTS, p, grad_y, arrays, DCNv3Gradients, wrt, out, options(deterministic))
