"""Deformable convolution, v1 and (with a mask) v2: forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple

from numdcn._call.arguments import check_grad_y, receive
from numdcn._call.arrays import AnyArray, Array
from numdcn._call.checks import IntPerAxis, Padding
from numdcn._call.convolution import ConvArrays
from numdcn._call.door import door, operator_module
from numdcn._call.options import options
from numdcn._call.prepared import PreparedWeights
from numdcn._call.remembered import remembered
from numdcn._run import convolutions, run_backward, run_forward
from numdcn.deform_conv.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["x", "offsets", "w", "bias", "mask"]  # what `wrt` may name


@door
def deform_conv_forward(
    x: Array,
    offsets: AnyArray,
    w: Array | PreparedWeights,
    bias: Array | None = None,
    *,
    mask: Array | None = None,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    allow_tf32: bool = False,
    out: Array | None = None,
) -> Array:
    """Deformable convolution: each kernel tap samples x at an offset from its regular position.

    With tap `k = ky*kw + kx`, g the offset group of channel c, c' the index of c in its convolution group, and S
    bilinear interpolation::

        y[n,o,i,j] = bias[o] + sum over c in o's group, k of
                     w[o,c',ky,kx] * mask[n, g*kh*kw + k, i, j] * S(x[n,c]; py, px)
        py = i*stride_y - padding_y + ky*dilation_y + offsets[n, (g*kh*kw + k)*2,     i, j]
        px = j*stride_x - padding_x + kx*dilation_x + offsets[n, (g*kh*kw + k)*2 + 1, i, j]

    Here padding_y, padding_x are the padding before x.

    Args:
        x: images `(N, C, H, W)`, float16, bfloat16, float32 or float64, any strides.
        offsets: displacements in pixels of x, `(N, 2*offset_groups*kh*kw, Ho, Wo)`; for each tap y, then x.
        w: weights `(C_out, C/groups, kh, kw)`, or the result of `prepare_weights`.
        bias: `(C_out,)`, or None.
        mask: modulation `(N, offset_groups*kh*kw, Ho, Wo)`, or None for ones (DCNv1).
        stride: in pixels; an int, or one per axis (y, x).
        padding: zeros around x; an int, one per axis, or a (before, after) pair per axis.
        dilation: spacing of the taps in pixels; an int, or one per axis (y, x).
        allow_tf32: allow float32 products to be rounded to tf32 (10 bits) on GPUs that support it.
        out: array to fill, `(N, C_out, Ho, Wo)`; must not overlap any input.

    `groups` and `offset_groups` are inferred from the shapes: C over the second axis of w, and the channels of
    `offsets` over `2*kh*kw`. Each splits the channels into contiguous blocks; neither has to divide the other.

    Outside the image x is zero: S falls to 0 within one pixel of the border and is exactly 0 beyond, for huge and
    infinite offsets too. A NaN offset makes y NaN at its pixel, in every output whose group contains a channel of that
    offset group. A NaN in x affects only the samples that have its pixel as a corner.

    Returns:
        y, `(N, C_out, Ho, Wo)`, where `Ho = (H + padding before and after - dilation_y*(kh-1) - 1) // stride_y + 1`.
            Bit-identical for any number of threads.

    Raises:
        TypeError: an argument is not an array or has an unsupported dtype, dtypes differ, or stride, dilation or
            padding is not an integer.
        ValueError: shapes do not match, a parameter is out of range, or `out` overlaps an input.

    Sources: Dai et al., Deformable Convolutional Networks (2017); Zhu et al., Deformable ConvNets v2 (2019).
    """
    arrays = receive(ARGUMENTS, ConvArrays(x=x, offsets=offsets, w=w, bias=bias, mask=mask))
    p = remembered(problem, arrays, stride, padding, dilation)
    return run_forward(convolutions, ARGUMENTS, p, arrays, out, options(allow_tf32=allow_tf32))


class DeformConvGradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `deform_conv_forward`; None where not requested or not given."""

    x: Array | None = None
    offsets: Array | None = None
    w: Array | None = None
    bias: Array | None = None
    mask: Array | None = None


@door
def deform_conv_backward(
    grad_y: Array,
    x: Array,
    offsets: AnyArray,
    w: Array | PreparedWeights,
    bias: Array | None = None,
    *,
    mask: Array | None = None,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    out: DeformConvGradients[Array] | None = None,
) -> DeformConvGradients[Array]:
    """Gradients of `deform_conv_forward`, given the gradient of its result.

    With `A[c,k] = sum over o in c's group of w[o,c',k] * grad_y[o]` at each output pixel::

        x        A * mask, spread over the four corners with their interpolation weights
        offsets  mask * sum over channels of A * (slope of S)
        mask     sum over channels of A * S
        w        sum over images and pixels of grad_y * mask * S
        bias     sum over images and pixels of grad_y

    Args:
        grad_y: gradient of y, `(N, C_out, Ho, Wo)`, with the dtype of x.
        x: as in the forward.
        offsets: as in the forward.
        w: as in the forward.
        bias: as in the forward.
        mask: as in the forward.
        stride: as in the forward.
        padding: as in the forward.
        dilation: as in the forward.
        wrt: name or names of the arguments whose gradients to compute; None for all that are given.
        deterministic: on a GPU, accumulate the gradient of x in a fixed order, which is slower.
        allow_tf32: as in the forward.
        out: `DeformConvGradients` of arrays to fill, shaped like the arguments; they must not overlap an input or each
            other. Fields left as None are allocated if requested.

    At an integer coordinate the slope is the one to its right, at -1 too. Outside the image S and its slopes are 0, and
    so are all gradients; a NaN in grad_y, w or mask times that 0 is NaN. A NaN offset makes the gradients of both its
    coordinates, of its mask and of the weights of its tap NaN, and adds nothing to that of x.

    Returns:
        A `DeformConvGradients`. Reproducible bit for bit: on the CPU for any number of threads and any `wrt`; on a GPU
            from run to run, the gradient of x only if `deterministic`.

    Raises:
        TypeError: as in `deform_conv_forward`.
        ValueError: as in `deform_conv_forward`, or `wrt` names an argument that is unknown or was not given.

    Sources: as in `deform_conv_forward`.
    """
    arrays = receive(ARGUMENTS, ConvArrays(x=x, offsets=offsets, w=w, bias=bias, mask=mask))
    p = remembered(problem, arrays, stride, padding, dilation)
    grad_y = check_grad_y(grad_y, p.out_shape, "(N, C_out, Ho, Wo)", arrays.x)
    return run_backward(
        convolutions, ARGUMENTS, p, grad_y, arrays, DeformConvGradients, wrt, out, options(deterministic, allow_tf32)
    )
