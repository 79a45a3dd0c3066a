"""Convolution: forward and backward. The ordinary one, which predicts the offsets of a deformable one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple

from numdcn._call.arguments import check_grad_y, receive
from numdcn._call.arrays import Array
from numdcn._call.checks import IntPerAxis, Padding
from numdcn._call.convolution import ConvArrays
from numdcn._call.door import door, operator_module
from numdcn._call.options import options
from numdcn._call.prepared import PreparedWeights
from numdcn._run import convolutions, run_backward, run_forward
from numdcn.conv.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["x", "w", "bias"]  # what `wrt` may name


@door
def conv_forward(
    x: Array,
    w: Array | PreparedWeights,
    bias: Array | None = None,
    *,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    allow_tf32: bool = False,
    out: Array | None = None,
) -> Array:
    """Convolution (cross-correlation, as in all deep learning), with zeros around the image::

        y[n,o,i,j] = bias[o] + sum over c in o's group, ky, kx of
                     w[o,c',ky,kx] * x[n, c, i*stride_y - padding_y + ky*dilation_y, j*stride_x - padding_x + kx*dilation_x]

    c' counts the channels of the group from 0, the padding is that before x.

    Args:
        x: images (N, C, H, W), float32 or float64 (on a GPU also float16 or bfloat16), any strides.
        w: weights (C_out, C/groups, kh, kw), or what `prepare_weights` made of them. `groups` is read off the shapes.
        bias: (C_out,), or None.
        stride, dilation: in pixels; an int, or one for each axis (y, x).
        padding: zeros around x; an int, one for each axis, or a (before, after) pair for each axis.
        allow_tf32: whether products of float32 may be rounded to tf32 (10 bits), on a GPU that has it.
        out: an array to fill, (N, C_out, Ho, Wo), sharing memory with no input.

    Returns:
        y, (N, C_out, Ho, Wo), with Ho = (H + padding before and after - dilation_y*(kh-1) - 1) // stride_y + 1. The
        same bits for any number of threads.

    Raises:
        TypeError: an array of another kind or dtype, or dtypes that differ; a stride, dilation or
            padding that is no int.
        ValueError: shapes that do not fit each other, a parameter out of range, an `out` that shares memory.

    Source: `deform_conv_forward` with offsets of 0 (Dai et al., Deformable Convolutional Networks, 2017, equation 1).
    """
    arrays = receive(ARGUMENTS, ConvArrays(x=x, w=w, bias=bias))
    return run_forward(
        convolutions, ARGUMENTS, problem(arrays, stride, padding, dilation), arrays, out, options(allow_tf32=allow_tf32)
    )


class ConvGradients(NamedTuple, Generic[Array]):
    """Gradients by the names of `conv_forward`'s arguments; None where not asked for or without such an input."""

    x: Array | None = None
    w: Array | None = None
    bias: Array | None = None


@door
def conv_backward(
    grad_y: Array,
    x: Array,
    w: Array | PreparedWeights,
    bias: Array | None = None,
    *,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    out: ConvGradients[Array] | None = None,
) -> ConvGradients[Array]:
    """Gradients of `conv_forward`, given the gradient of its result.

    Args:
        grad_y: gradient of y, (N, C_out, Ho, Wo), of the dtype of the other arrays.
        x, w, bias, stride, padding, dilation: as given to `conv_forward`.
        wrt: the name or names of the arguments whose gradients are wanted; None for all that are given.
        deterministic: on a GPU, whether to add up the gradient of x in a fixed order, which takes longer.
        allow_tf32: as given to the forward.
        out: a `ConvGradients` of arrays to fill, shaped like the arguments and sharing memory with none of them; what is
            wanted but None there is allocated.

    The gradient of a pixel of x is the sum of w * grad_y over all taps that read it, that of w the sum over pixels and
    images of grad_y * x, that of the bias the sum of grad_y.

    Returns:
        A `ConvGradients`. On the CPU the same bits for any number of threads and whatever else is asked for;
        on a GPU the gradient of x if `deterministic`, the others always.

    Raises:
        TypeError, ValueError: as `conv_forward`; a name in `wrt` that is unknown, or was not given.

    Source: as `conv_forward`.
    """
    arrays = receive(ARGUMENTS, ConvArrays(x=x, w=w, bias=bias))
    p = problem(arrays, stride, padding, dilation)
    grad_y = check_grad_y(grad_y, p.out_shape, "(N, C_out, Ho, Wo)", arrays.x)
    return run_backward(
        convolutions, ARGUMENTS, p, grad_y, arrays, ConvGradients, wrt, out, options(deterministic, allow_tf32)
    )
