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
    """Deformable convolution: each tap of the kernel looks where its offset points.

    With k = ky*kw + kx the number of a tap, g the offset group of channel c, c' its number in its convolution group, and
    S bilinear interpolation::

        y[n,o,i,j] = bias[o] + sum over c in o's group, k of
                     w[o,c',ky,kx] * mask[n, g*kh*kw + k, i, j] * S(x[n,c]; py, px)
        py = i*stride_y - padding_y + ky*dilation_y + offsets[n, (g*kh*kw + k)*2,     i, j]
        px = j*stride_x - padding_x + kx*dilation_x + offsets[n, (g*kh*kw + k)*2 + 1, i, j]

    Args:
        x: images (N, C, H, W), float32 or float64 (on a GPU also float16 or bfloat16), any strides.
        offsets: displacements in pixels of x, (N, 2*offset_groups*kh*kw, Ho, Wo): for each tap y, then x.
        w: weights (C_out, C/groups, kh, kw), or what `prepare_weights` made of them.
        bias: (C_out,), or None.
        mask: modulation (N, offset_groups*kh*kw, Ho, Wo), or None for ones (DCNv1).
        stride, dilation: in pixels; an int, or one for each axis (y, x).
        padding: zeros around x; an int, one for each axis, or a (before, after) pair for each axis.
        allow_tf32: whether products of float32 may be rounded to tf32 (10 bits), on a GPU that has it.
        out: an array to fill, (N, C_out, Ho, Wo), sharing memory with no input.

    `groups` and `offset_groups` are read off the shapes: C over the second axis of w, and the channels of offsets over
    2*kh*kw. Channels are dealt to both in contiguous blocks; neither has to divide the other.

    Outside the image x is zero: S falls to 0 within one pixel of the border, and is exactly 0 beyond, for huge and
    infinite offsets too. A NaN offset makes y NaN at its pixel, in the outputs whose group has a channel of its offset group. A NaN in
    x reaches only the samples that have its pixel as a corner.

    Returns:
        y, (N, C_out, Ho, Wo), with Ho = (H + padding before and after - dilation_y*(kh-1) - 1) // stride_y + 1. The
        same bits for any number of threads.

    Raises:
        TypeError: an array of another kind or dtype, or dtypes that differ; a stride, dilation or
            padding that is no int.
        ValueError: shapes that do not fit each other, a parameter out of range, an `out` that shares memory.

    Sources: Dai et al., Deformable Convolutional Networks (2017); Zhu et al., Deformable ConvNets v2 (2019).
    """
    arrays = receive(ARGUMENTS, ConvArrays(x=x, offsets=offsets, w=w, bias=bias, mask=mask))
    p = problem(arrays, stride, padding, dilation)
    return run_forward(convolutions, ARGUMENTS, p, arrays, out, options(allow_tf32=allow_tf32))


class DeformConvGradients(NamedTuple, Generic[Array]):
    """Gradients by the names of `deform_conv_forward`'s arguments; None where not asked for or without such an input."""

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

    Args:
        grad_y: gradient of y, (N, C_out, Ho, Wo), of the dtype of the other arrays.
        x, offsets, w, bias, mask, stride, padding, dilation: as given to `deform_conv_forward`.
        wrt: the name or names of the arguments whose gradients are wanted; None for all that are given.
        deterministic: on a GPU, whether to add up the gradient of x in a fixed order, which takes longer.
        allow_tf32: as given to the forward.
        out: a `DeformConvGradients` of arrays to fill, shaped like the arguments and sharing memory with none of them;
            what is wanted but None there is allocated.

    With A[c,k] = sum over o in c's group of w[o,c',k] * grad_y[o], at each output pixel: the gradient of x receives A*mask in the
    weights of the four corners, that of an offset is mask * sum of A * (slope of S), that of the mask is the sum of
    A * S, that of w is the sum over pixels and images of grad_y * mask * S, that of the bias the sum of grad_y.

    At an integer coordinate the slope is the one to its right, also at -1 exactly. Outside the image S and its slopes are
    0, and so are all gradients; a NaN in grad_y, w or mask times that 0 is NaN. A NaN offset makes NaN of the gradients of
    both its coordinates, of its mask and of the weights of its tap, and adds nothing to that of x.

    Returns:
        A `DeformConvGradients`. On the CPU the same bits for any number of threads and whatever else is asked for;
        on a GPU the gradient of x if `deterministic`, the others always.

    Raises:
        TypeError, ValueError: as `deform_conv_forward`; a name in `wrt` that is unknown, or was not given.

    Sources: as `deform_conv_forward`.
    """
    arrays = receive(ARGUMENTS, ConvArrays(x=x, offsets=offsets, w=w, bias=bias, mask=mask))
    p = problem(arrays, stride, padding, dilation)
    grad_y = check_grad_y(grad_y, p.out_shape, "(N, C_out, Ho, Wo)", arrays.x)
    return run_backward(
        convolutions, ARGUMENTS, p, grad_y, arrays, DeformConvGradients, wrt, out, options(deterministic, allow_tf32)
    )
