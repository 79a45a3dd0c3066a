"""Ordinary convolution: forward and backward. It predicts the offsets of the deformable layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple

from numdcn._call import hints
from numdcn._call.arguments import check_grad_y, receive
from numdcn._call.arrays import Array
from numdcn._call.checks import IntPerAxis, Padding
from numdcn._call.convolution import ConvArrays
from numdcn._call.door import door, operator_module
from numdcn._call.options import options
from numdcn._call.prepared import PreparedWeights
from numdcn._call.remembered import remembered
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
    """Convolution (cross-correlation, as is usual in deep learning) with zeros around the image::

        y[n,o,i,j] = bias[o] + sum over c in o's group, ky, kx of  w[o,c',ky,kx] * x[n, c, py, px]
        py = i*stride_y - padding_y + ky*dilation_y
        px = j*stride_x - padding_x + kx*dilation_x

    Here c' is the index of c in its group, and padding_y, padding_x are the padding before x.

    Args:
        x: images `(N, C, H, W)`, float16, bfloat16, float32 or float64, any strides.
        w: weights `(C_out, C/groups, kh, kw)`, or the result of `prepare_weights`. `groups` is inferred from the
            shapes.
        bias: `(C_out,)`, or None.
        stride: in pixels; an int, or one per axis (y, x).
        padding: zeros around x; an int, one per axis, or a (before, after) pair per axis.
        dilation: spacing of the taps in pixels; an int, or one per axis (y, x).
        allow_tf32: allow float32 products to be rounded to tf32 (10 bits) on GPUs that support it.
        out: array to fill, `(N, C_out, Ho, Wo)`; must not overlap any input.

    Returns:
        y, `(N, C_out, Ho, Wo)`, where `Ho = (H + padding before and after - dilation_y*(kh-1) - 1) // stride_y + 1`.
            Bit-identical for any number of threads.

    Raises:
        TypeError: an argument is not an array or has an unsupported dtype, dtypes differ, or stride, dilation or
            padding is not an integer.
        ValueError: shapes do not match, a parameter is out of range, or `out` overlaps an input.

    Source: `deform_conv_forward` with offsets of 0 (Dai et al., Deformable Convolutional Networks, 2017, equation 1).
    """
    arrays = receive(ARGUMENTS, ConvArrays(x=x, w=w, bias=bias))
    return run_forward(
        convolutions,
        ARGUMENTS,
        remembered(problem, arrays, stride, padding, dilation),
        arrays,
        out,
        options(allow_tf32=allow_tf32),
    )


class ConvGradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `conv_forward`; None where not requested or not given."""

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
        grad_y: gradient of y, `(N, C_out, Ho, Wo)`, with the dtype of x.
        x: as in the forward.
        w: as in the forward.
        bias: as in the forward.
        stride: as in the forward.
        padding: as in the forward.
        dilation: as in the forward.
        wrt: name or names of the arguments whose gradients to compute; None for all that are given.
        deterministic: on a GPU, accumulate the gradient of x in a fixed order, which is slower.
        allow_tf32: as in the forward.
        out: `ConvGradients` of arrays to fill, shaped like the arguments; they must not overlap an input or each other.
            Fields left as None are allocated if requested.

    The gradient of a pixel of x is the sum of `w * grad_y` over all taps that read it, that of w the sum of
    `grad_y * x` over images and pixels, that of the bias the sum of grad_y.

    Returns:
        A `ConvGradients`. Reproducible bit for bit: on the CPU for any number of threads and any `wrt`; on a GPU from
            run to run, the gradient of x only if `deterministic`.

    Raises:
        TypeError: as in `conv_forward`.
        ValueError: as in `conv_forward`, or `wrt` names an argument that is unknown or was not given.

    Source: as in `conv_forward`.
    """
    arrays = receive(ARGUMENTS, ConvArrays(x=x, w=w, bias=bias))
    p = remembered(problem, arrays, stride, padding, dilation)
    grad_y = check_grad_y(
        grad_y, p.out_shape, "(N, C_out, Ho, Wo)", arrays.x, hint=lambda seen: hints.fitting_padding(p, seen, p.out_channels)
    )  # fmt: skip
    return run_backward(
        convolutions, ARGUMENTS, p, grad_y, arrays, ConvGradients, wrt, out, options(deterministic, allow_tf32)
    )
