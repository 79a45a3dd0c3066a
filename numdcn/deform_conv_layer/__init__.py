"""The layer of Deformable Convolutional Networks: a convolution predicts the offsets (and mask) of a deformable one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, Literal, NamedTuple

import numpy as np

from numdcn._call.arguments import check_grad_y, named, receive
from numdcn._call.arrays import AnyArray, Array, check_dtype, received
from numdcn._call.checks import IntPerAxis, Padding, describe, flag, integer, per_axis, whole
from numdcn._call.door import door, operator_module
from numdcn._call.options import options
from numdcn._call.prepared import PreparedWeights
from numdcn._call.remembered import remembered
from numdcn._call.results import given_back, gradients_back, new_like, output_array, wanted_gradients
from numdcn._run import clear, in_float32, is_half_on_cpu, modulation, rounded
from numdcn.conv import ConvGradients, conv_backward, conv_forward
from numdcn.deform_conv import DeformConvGradients, deform_conv_backward, deform_conv_forward
from numdcn.deform_conv_layer.problem import ARGUMENTS, RESULTS, LayerArrays, Problem, problem

operator_module(__name__)
Name = Literal["x", "w", "offset_w", "offset_b", "bias"]  # what `wrt` may name


class DeformConvLayerResult(NamedTuple, Generic[Array]):
    """Result of `deform_conv_layer_forward`: y, and what the backward can reuse."""

    y: Array
    offsets: Array
    mask: Array | None  # None unless modulated


@door
def deform_conv_layer_forward(
    x: Array,
    w: Array | PreparedWeights,
    offset_w: Array | PreparedWeights,
    offset_b: Array | None,
    bias: Array | None = None,
    *,
    modulated: bool = False,
    mask_scale: int = 1,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    allow_tf32: bool = False,
    out: Array | None = None,
) -> DeformConvLayerResult[Array]:
    """Deformable convolution with offsets, and a mask if `modulated`, predicted by a convolution of the same geometry::

        z       = conv(x, offset_w, offset_b)
        offsets = z[:, :2*offset_groups*kh*kw]
        mask    = mask_scale * sigmoid(z[:, 2*offset_groups*kh*kw:])          (DCNv2, modulated; else no mask: DCNv1)
        y       = deform_conv(x, offsets, w, bias, mask=mask)

    Args:
        x: images `(N, C, H, W)`, float16, bfloat16, float32 or float64, any strides.
        w: weights `(C_out, C/groups, kh, kw)`, or the result of `prepare_weights`.
        offset_w: weights of the predicting convolution, `(2*offset_groups*kh*kw, C, kh, kw)`, or `3*...` if modulated.
        offset_b: its bias, `(2*offset_groups*kh*kw,)`, or `3*...` if modulated; or None.
        bias: `(C_out,)`, or None.
        modulated: whether to predict a mask too.
        mask_scale: 1 (mmcv: a logit of 0 gives a mask of 0.5) or 2 (the authors' code: it gives 1).
        stride: of both convolutions, as in `deform_conv_forward`.
        padding: of both convolutions, as in `deform_conv_forward`.
        dilation: of both convolutions, as in `deform_conv_forward`.
        allow_tf32: allow float32 products to be rounded to tf32 (10 bits) on GPUs that support it.
        out: array to fill with y, `(N, C_out, Ho, Wo)`; must not overlap any input.

    `deform_conv_layer_init` makes parameters for a new layer. In training, `offset_w` and `offset_b` often get a
    learning rate of their own: times 0.1 in the DCNv2 paper and Deformable DETR, times 1 in the DCNv1 code and by
    default in mmengine (`dcn_offset_lr_mult`).

    Returns:
        A `DeformConvLayerResult` of y, offsets and mask. Pass the last two to `deform_conv_layer_backward`.

    Raises:
        TypeError: as in `deform_conv_forward`.
        ValueError: as in `deform_conv_forward`.

    Sources: Dai et al., Deformable Convolutional Networks (2017); Zhu et al., Deformable ConvNets v2 (2019).
    """
    arrays = receive(ARGUMENTS, LayerArrays(x, w, offset_w, offset_b, bias))
    p = remembered(problem, arrays, modulated, mask_scale, stride, padding, dilation)
    y = output_array("out", out, p.out_shape, arrays.x.dtype, named(ARGUMENTS, arrays))
    how = options(allow_tf32=allow_tf32)
    calls: Any = {"stride": stride, "padding": padding, "dilation": dilation, "allow_tf32": how.allow_tf32}
    offsets, mask = _predict(p, arrays, calls)
    deform_conv_forward(arrays.x, offsets, arrays.w, arrays.bias, mask=mask, out=y, **calls)
    return DeformConvLayerResult(given_back(y, out), given_back(offsets), given_back(mask))


class DeformConvLayerGradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `deform_conv_layer_forward`; None where not requested or not given."""

    x: Array | None = None
    w: Array | None = None
    offset_w: Array | None = None
    offset_b: Array | None = None
    bias: Array | None = None


@door
def deform_conv_layer_backward(
    grad_y: Array,
    x: Array,
    w: Array | PreparedWeights,
    offset_w: Array | PreparedWeights,
    offset_b: Array | None,
    bias: Array | None = None,
    *,
    offsets: AnyArray | None = None,
    mask: Array | None = None,
    modulated: bool = False,
    mask_scale: int = 1,
    stride: IntPerAxis = 1,
    padding: Padding = 0,
    dilation: IntPerAxis = 1,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    out: DeformConvLayerGradients[Array] | None = None,
) -> DeformConvLayerGradients[Array]:
    """Gradients of `deform_conv_layer_forward`, given the gradient of its y.

    Args:
        grad_y: gradient of y, `(N, C_out, Ho, Wo)`, with the dtype of x.
        x: as in the forward.
        w: as in the forward.
        offset_w: as in the forward.
        offset_b: as in the forward.
        bias: as in the forward.
        offsets: from the forward's result; recomputed if None.
        mask: from the forward's result; recomputed if None.
        modulated: as in the forward.
        mask_scale: as in the forward.
        stride: as in the forward.
        padding: as in the forward.
        dilation: as in the forward.
        wrt: name or names of the arguments whose gradients to compute; None for all that are given.
        deterministic: on a GPU, accumulate the gradient of x in a fixed order, which is slower.
        allow_tf32: as in the forward.
        out: `DeformConvLayerGradients` of arrays to fill, shaped like the arguments; they must not overlap an input or
            each other. Fields left as None are allocated if requested.

    The gradients of offsets and mask are those of `deform_conv_backward`. That of the logits is the mask's times
    `mask * (1 - mask/mask_scale)`. The predicting convolution passes both on to offset_w and offset_b, and adds to x.

    Returns:
        A `DeformConvLayerGradients`. Reproducible bit for bit: on the CPU for any number of threads and any `wrt`; on a
            GPU from run to run, the gradient of x only if `deterministic`.

    Raises:
        TypeError: as in `deform_conv_layer_forward`.
        ValueError: as in `deform_conv_layer_forward`, or `wrt` names an argument that is unknown or was not given.

    Sources: as in `deform_conv_layer_forward`.
    """
    # length: the docstring has a line for each argument
    table = (*ARGUMENTS, *RESULTS)
    arrays = receive(table, LayerArrays(x, w, offset_w, offset_b, bias, offsets, mask))
    p = remembered(problem, arrays, modulated, mask_scale, stride, padding, dilation)
    grad_y = check_grad_y(grad_y, p.out_shape, "(N, C_out, Ho, Wo)", arrays.x)
    grads = wanted_gradients(table, arrays, grad_y, DeformConvLayerGradients, wrt, out)
    how = options(deterministic, allow_tf32)
    if not grads:
        return DeformConvLayerGradients()
    calls: Any = {"stride": stride, "padding": padding, "dilation": dilation, "allow_tf32": how.allow_tf32}
    given: Any = arrays.offsets
    given_mask: Any = arrays.mask
    if grads.keys() != {"bias"} and (given is None or (p.modulated and given_mask is None)):
        again, mask_again = _predict(p, arrays, calls)
        given, given_mask = again if given is None else given, mask_again if given_mask is None else given_mask
    if is_half_on_cpu(arrays.x):
        _in_float32(p, grad_y, arrays, given, given_mask, grads, calls)
        return gradients_back(DeformConvLayerGradients, grads, out)
    if given is None:  # the gradient of the bias does not depend on offsets
        given = new_like((p.out_shape[0], p.offset_channels, *p.out_shape[2:]), arrays.x.dtype, arrays.x)
        given_mask = None
        clear(given)
    inner: list[Any] = [name for name in ("x", "w", "bias") if name in grads]
    predicted: list[str] = [name for name in ("x", "offset_w", "offset_b") if name in grads]
    inner += [*["offsets"] * bool(predicted), *["mask"] * bool(predicted and p.modulated)]
    room_for = DeformConvGradients(x=grads.get("x"), w=grads.get("w"), bias=grads.get("bias"))
    calls["deterministic"] = how.deterministic
    x_, w_, bias_ = arrays.x, arrays.w, arrays.bias
    g = deform_conv_backward(grad_y, x_, given, w_, bias_, mask=given_mask, wrt=inner, out=room_for, **calls)
    if predicted:
        _through_prediction(p, g, arrays, given_mask, predicted, grads, calls)
    return gradients_back(DeformConvLayerGradients, grads, out)


def _predict(p: Problem, arrays: LayerArrays, calls: Any) -> tuple[Any, Any]:
    """The offsets, and the mask if the layer is modulated, in the type of x."""
    dtype = arrays.x.dtype
    z = received(conv_forward(*map(in_float32, (arrays.x, arrays.offset_w, arrays.offset_b)), **calls))
    offsets, mask = modulation(z).split_prediction(z, p.offset_channels, p.mask_scale) if p.modulated else (z, None)
    return rounded(offsets, dtype), rounded(mask, dtype)


def _in_float32(
    p: Problem, grad_y: Any, arrays: LayerArrays, offsets: Any, mask: Any, grads: dict[str, Any], calls: Any
) -> None:
    """Fill the gradients, of a half type on the CPU: the two convolutions' parts of x's are added in float32."""
    names: Any = tuple(grads)
    g = deform_conv_layer_backward(
        in_float32(grad_y), *map(in_float32, arrays[:5]), offsets=in_float32(offsets), mask=in_float32(mask),
        modulated=p.modulated, mask_scale=p.mask_scale, wrt=names, **calls,
    )  # fmt: skip
    for name, grad in grads.items():
        rounded(getattr(g, name), grad.dtype, grad)


def _through_prediction(
    p: Problem, g: DeformConvGradients, arrays: LayerArrays, mask: Any, names: Iterable[str], grads: Any, calls: Any
) -> None:
    """Fill in the gradients of the predicting convolution, given those of offsets and mask; add its part to x's."""
    grad_z: Any = received(g.offsets)
    if p.modulated:
        grad_z = modulation(grad_z).join_gradients(grad_z, received(g.mask), mask, p.mask_scale)
    inner: dict[str, Any] = {"x": "x", "offset_w": "w", "offset_b": "bias"}
    room_for = ConvGradients(w=grads.get("offset_w"), bias=grads.get("offset_b"))
    wanted = [inner[name] for name in names]
    more = conv_backward(grad_z, arrays.x, arrays.offset_w, arrays.offset_b, wrt=wanted, out=room_for, **calls)
    if more.x is not None:
        modulation(grads["x"]).add_to(grads["x"], received(more.x))


class DeformConvLayerParameters(NamedTuple):
    """Parameters of a layer, in the order its forward takes them."""

    w: np.ndarray
    offset_w: np.ndarray
    offset_b: np.ndarray
    bias: np.ndarray | None


@door
def deform_conv_layer_init(
    in_channels: int,
    out_channels: int,
    kernel_size: IntPerAxis,
    *,
    groups: int = 1,
    offset_groups: int = 1,
    modulated: bool = False,
    bias: bool = True,
    dtype: Any = np.float32,
    seed: int | np.random.Generator | None = None,
) -> DeformConvLayerParameters:
    """Parameters of a new layer: the usual random weights, and offsets that start at 0.

    Args:
        in_channels: C, a multiple of groups and of offset_groups.
        out_channels: C_out, a multiple of groups.
        kernel_size: an int, or one per axis (y, x).
        groups: number of contiguous blocks the channels of the convolution are split into.
        offset_groups: number of contiguous blocks of channels that share their offsets.
        modulated: whether to predict a mask too.
        bias: whether to make one.
        dtype: float16, bfloat16, float32 or float64.
        seed: for the random weights: an int, a NumPy generator, or None for different weights each time.

    w and bias are uniform in `±1/sqrt(fan_in)`, as in torchvision and mmcv; `fan_in = in_channels/groups * kh * kw`.
    offset_w and offset_b are 0: the layer starts as a plain convolution, scaled by mask_scale/2 if modulated.

    Returns:
        A `DeformConvLayerParameters` of w, offset_w, offset_b and bias (None without one).

    Raises:
        TypeError: a size is not an integer, or the dtype is none of these.
        ValueError: a size is below 1, or not a multiple of its groups.

    Sources: He et al., Delving deep into rectifiers (2015), with a = sqrt(5); Dai et al. (2017) for the zeros.
    """
    sizes = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups, "offset_groups": offset_groups}
    c, c_out, groups, offset_groups = (integer(name, value, 1) for name, value in sizes.items())
    kernel = per_axis("kernel_size", kernel_size, 1)
    for name, size, divisor_name, divisor in (
        ("in_channels", c, "groups", groups),
        ("out_channels", c_out, "groups", groups),
        ("in_channels", c, "offset_groups", offset_groups),
    ):
        if size % divisor:
            raise ValueError(f"`{name}` is {size}, expected a multiple of {divisor_name} = {divisor}")
    if seed is not None and not isinstance(seed, np.random.Generator):
        if whole(seed) is None:
            raise TypeError(f"`seed` is {describe(seed)}, expected an int of at least 0, a NumPy Generator or None")
        seed = integer("seed", seed, 0, 2**128)
    kind, rng = check_dtype("dtype", dtype), np.random.default_rng(seed)
    bound = (c // groups * kernel[0] * kernel[1]) ** -0.5
    predicted = (3 if flag("modulated", modulated) else 2) * offset_groups * kernel[0] * kernel[1]
    w = rng.uniform(-bound, bound, (c_out, c // groups, *kernel)).astype(kind)
    biases = rng.uniform(-bound, bound, c_out).astype(kind) if flag("bias", bias) else None
    return DeformConvLayerParameters(w, np.zeros((predicted, c, *kernel), kind), np.zeros(predicted, kind), biases)
