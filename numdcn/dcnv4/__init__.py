"""DCNv4: forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple

from numdcn._call.arguments import check_grad_y, receive
from numdcn._call.arrays import Array
from numdcn._call.attention import AttentionArrays
from numdcn._call.checks import IntPerAxis, Padding
from numdcn._call.door import door, operator_module
from numdcn._call.options import options
from numdcn._call.remembered import remembered
from numdcn._run import attentions, run_backward, run_forward
from numdcn.dcnv4.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["x", "offset_mask"]  # what `wrt` may name


@door
def dcnv4_forward(
    x: Array,
    offset_mask: Array,
    *,
    groups: int,
    kernel_size: IntPerAxis = 3,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    out: Array | None = None,
) -> Array:
    """DCNv4, the operator of FlashInternImage: `dcnv3_forward` with offsets and mask packed into one array.

    Of `offset_mask`, group g has the channels from `3*P*g` up to `3*P*(g+1)`: x, y of each of its P points, then the
    weights of the points. Points are numbered as in `dcnv3_forward`::

        offsets[n, i, j, (g*P + k)*2 + e] = offset_mask[n, i, j, 3*P*g + 2*k + e]        e = 0: x, 1: y
        mask[n, i, j, g*P + k]            = offset_mask[n, i, j, 3*P*g + 2*P + k]

    Args:
        x: images, channels last, `(N, H, W, groups*D)`, float16, bfloat16, float32 or float64, any strides.
        offset_mask: `(N, Ho, Wo, 3*groups*P)`, or that many channels rounded up to a multiple of 8; further channels are
            not read.
        groups: number of groups, each of which has offsets and weights of its own.
        kernel_size: an int, or one per axis (y, x). P is `kh*kw`, one less with remove_center.
        stride: in pixels; an int, or one per axis (y, x).
        padding: zeros around x; an int, one per axis, or a (before, after) pair per axis.
        dilation: spacing of the points in pixels; an int, or one per axis (y, x).
        offset_scale: factor of the offsets and of the kernel's own grid, about its middle; any finite number.
        remove_center: leave out the point in the middle; both kernel sizes must be odd.
        out: array to fill, `(N, Ho, Wo, groups*D)`; must not overlap any input.

    Borders and numbers that are not finite are treated as in `dcnv3_forward`.

    Returns:
        y, `(N, Ho, Wo, groups*D)`, where `Ho = (H + padding before and after - dilation_y*(kh-1) - 1) // stride_y + 1`.
            Bit-identical for any number of threads.

    Raises:
        TypeError: an argument is not an array or has an unsupported dtype, dtypes differ, or a parameter has the wrong
            type.
        ValueError: shapes do not match, a parameter is out of range, or `out` overlaps an input.

    Source: Xiong et al., Efficient Deformable ConvNets (2024).
    """
    arrays = receive(ARGUMENTS, AttentionArrays(x, offset_mask, None))
    p = remembered(problem, arrays, groups, kernel_size, stride, padding, dilation, offset_scale, remove_center)
    return run_forward(attentions, ARGUMENTS, p, arrays, out)


class DCNv4Gradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `dcnv4_forward`; None where not requested."""

    x: Array | None = None
    offset_mask: Array | None = None


@door
def dcnv4_backward(
    grad_y: Array,
    x: Array,
    offset_mask: Array,
    *,
    groups: int,
    kernel_size: IntPerAxis = 3,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    out: DCNv4Gradients[Array] | None = None,
) -> DCNv4Gradients[Array]:
    """Gradients of `dcnv4_forward`, given the gradient of its result: those of `dcnv3_backward`, packed like the inputs.

    Args:
        grad_y: gradient of y, `(N, Ho, Wo, groups*D)`, with the dtype of x.
        x: as in the forward.
        offset_mask: as in the forward.
        groups: as in the forward.
        kernel_size: as in the forward.
        stride: as in the forward.
        padding: as in the forward.
        dilation: as in the forward.
        offset_scale: as in the forward.
        remove_center: as in the forward.
        wrt: name or names of the arguments whose gradients to compute; None for both.
        deterministic: on a GPU, accumulate the gradient of x in a fixed order, which is slower.
        out: `DCNv4Gradients` of arrays to fill, shaped like the arguments; they must not overlap an input or each
            other. Fields left as None are allocated if requested.

    The gradient of channels of `offset_mask` that are not read is 0.

    Returns:
        A `DCNv4Gradients`. Reproducible bit for bit: on the CPU for any number of threads and any `wrt`; on a GPU from
            run to run, the gradient of x only if `deterministic`.

    Raises:
        TypeError: as in `dcnv4_forward`.
        ValueError: as in `dcnv4_forward`, or `wrt` names an argument that is unknown.

    Source: as in `dcnv4_forward`.
    """
    arrays = receive(ARGUMENTS, AttentionArrays(x, offset_mask, None))
    p = remembered(problem, arrays, groups, kernel_size, stride, padding, dilation, offset_scale, remove_center)
    grad_y = check_grad_y(grad_y, p.out_shape, "(N, Ho, Wo, groups*D)", arrays.value)
    return run_backward(attentions, ARGUMENTS, p, grad_y, arrays, DCNv4Gradients, wrt, out, options(deterministic))
