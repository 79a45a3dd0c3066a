"""Deformable convolution: its arguments, its sizes, and every error of shape, type or parameter.

Sources: Dai et al. 2017 (DCNv1), Zhu et al. 2019 (DCNv2, with a mask).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._host.arrays import check_array
from numdcn._host.checks import padding_per_axis, per_axis
from numdcn._host.weights import PreparedWeights


class Argument(NamedTuple):
    """An array argument of the operator."""

    name: str
    axes: str
    ndim: int | None  # None: known only from the other arguments
    optional: bool
    differentiable: bool
    saved: bool  # whether the backward needs it


ARGUMENTS = (
    Argument("x", "(N, C, H, W)", 4, False, True, True),
    Argument("offsets", "(N, 2*offset_groups*kh*kw, Ho, Wo)", 4, False, True, True),
    Argument("w", "(C_out, C/groups, kh, kw)", 4, False, True, True),
    Argument("bias", "(C_out,)", None, True, True, False),
    Argument("mask", "(N, offset_groups*kh*kw, Ho, Wo)", None, True, True, True),
)
NAMES = tuple(a.name for a in ARGUMENTS)


class Problem(NamedTuple):
    """The sizes of one deformable convolution. Tuples have an entry for each axis, y first."""

    batch: int
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]  # padding
    after: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_groups: int
    taps: int
    masked: int  # 1 or 0
    biased: int

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        return self.batch, self.out_channels, *self.out_size

    def describe_shapes(self) -> str:
        """What the shapes are made of, for error messages."""
        return f"N={self.batch}, C={self.in_channels}, Ho={self.out_size[0]}, Wo={self.out_size[1]}"


def problem(arrays: dict[str, Any], stride: Any, padding: Any, dilation: Any) -> Problem:
    """Measure and check everything once. `arrays` holds the arguments by name, None where an optional one is absent."""
    for argument in ARGUMENTS:
        value = arrays[argument.name]
        if value is None and argument.optional:
            continue
        if argument.name == "w" and type(value) is PreparedWeights:
            continue
        check_array(argument.name, value, argument.ndim, argument.axes)
    x, offsets, w, bias, mask = (arrays[name] for name in NAMES)
    _same_dtype(arrays)
    groups, kernel = _groups(x, w), (w.shape[2], w.shape[3])
    stride, dilation = per_axis("stride", stride, 1), per_axis("dilation", dilation, 1)
    before, after = padding_per_axis(padding)
    out_size = _out_size(x.shape[2:], kernel, stride, before, after, dilation)
    taps = kernel[0] * kernel[1]
    made = Problem(
        x.shape[0], x.shape[1], w.shape[0], x.shape[2:], out_size, kernel, stride, before, after, dilation,
        groups, _offset_groups(x, offsets, taps), taps, int(mask is not None), int(bias is not None),
    )  # fmt: skip
    _check_shapes(made, offsets, bias, mask)
    return made


def check_grad_y(grad_y: Any, made: Problem, dtype: np.dtype) -> None:
    """Raise unless `grad_y` is shaped like y, with the dtype of the other arguments."""
    check_array("grad_y", grad_y, None, "(N, C_out, Ho, Wo)")
    if grad_y.dtype != dtype:
        raise TypeError(f"`grad_y` has dtype {grad_y.dtype} but `x` has {dtype}; expected one dtype for all")
    if grad_y.shape != made.out_shape:
        raise ValueError(f"`grad_y` has shape {grad_y.shape}, expected {made.out_shape} = (N, C_out, Ho, Wo)")


def _same_dtype(arrays: dict[str, Any]) -> None:
    dtype = arrays["x"].dtype
    for name, array in arrays.items():
        if array is not None and array.dtype != dtype:
            raise TypeError(f"`{name}` has dtype {array.dtype} but `x` has {dtype}; expected one dtype for all")


def _groups(x: Any, w: Any) -> int:
    """groups, read off the channels of x and w."""
    channels, per_group = x.shape[1], w.shape[1]
    for name, size, axis in (("x", channels, "C"), ("w", w.shape[0], "C_out"), ("w", per_group, "C/groups")):
        if size < 1:
            raise ValueError(f"`{name}` has {axis} = 0 (x {x.shape}, w {w.shape}), expected at least 1")
    for name, array in (("x", x), ("w", w)):
        if min(array.shape[2:]) < 1:
            raise ValueError(f"`{name}` has shape {array.shape}, expected no empty axis but the batch")
    if channels % per_group:
        raise ValueError(
            f"`w` has shape {w.shape}: its second axis, C/groups = {per_group}, expected to divide C = {channels} of `x`"
        )
    groups = channels // per_group
    if w.shape[0] % groups:
        raise ValueError(
            f"`w` has shape {w.shape}: C_out = {w.shape[0]}, expected a multiple of groups = C / (C/groups) = "
            f"{channels}/{per_group} = {groups}"
        )
    if type(w) is PreparedWeights and w.groups != groups:
        raise ValueError(
            f"`w` was prepared for groups={w.groups}, but `x` with C = {channels} and `w` with shape {w.shape} "
            f"make groups = {groups}; expected prepare_weights(w, groups={groups})"
        )
    return groups


def _out_size(size: Any, kernel: Any, stride: Any, before: Any, after: Any, dilation: Any) -> tuple[int, int]:
    out = []
    for i, axis in enumerate(("H", "W")):
        padded, reach = size[i] + before[i] + after[i], dilation[i] * (kernel[i] - 1) + 1
        if padded < reach:
            raise ValueError(
                f"`padding` of ({before[i]}, {after[i]}) makes `x` {padded} long along {axis}, expected at least {reach}, "
                f"the reach of `w` (kernel size {kernel[i]}, dilation {dilation[i]})"
            )
        out.append((padded - reach) // stride[i] + 1)
    return out[0], out[1]


def _offset_groups(x: Any, offsets: Any, taps: int) -> int:
    """offset_groups, read off the channels of the offsets."""
    channels = offsets.shape[1]
    if channels < 1 or channels % (2 * taps):
        raise ValueError(
            f"`offsets` has {channels} channels (shape {offsets.shape}), expected a multiple of 2*kh*kw = {2 * taps}: "
            "2*offset_groups*kh*kw"
        )
    offset_groups = channels // (2 * taps)
    if x.shape[1] % offset_groups:
        raise ValueError(
            f"`offsets` has {channels} channels, so offset_groups = {channels}/{2 * taps} = {offset_groups}, "
            f"expected to divide C = {x.shape[1]} of `x`"
        )
    return offset_groups


def _check_shapes(made: Problem, offsets: Any, bias: Any, mask: Any) -> None:
    channels = made.offset_groups * made.taps
    expected = {
        "offsets": (offsets, (made.batch, 2 * channels, *made.out_size)),
        "bias": (bias, (made.out_channels,)),
        "mask": (mask, (made.batch, channels, *made.out_size)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            layout = next(a.axes for a in ARGUMENTS if a.name == name)
            raise ValueError(
                f"`{name}` has shape {array.shape}, expected {shape} = {layout} with {made.describe_shapes()}"
            )
