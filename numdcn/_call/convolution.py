"""Sizes and arrays of convolutions, deformable or not: read off x and w, and checked against each other."""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._call import hints
from numdcn._call.checks import check_countable, padding_per_axis, per_axis
from numdcn._call.prepared import PreparedWeights


class ConvArrays(NamedTuple):
    """The arrays of a convolution, or their gradients; None if absent or not requested."""

    x: Any  # (N, C, H, W)
    w: Any  # (C_out, C/groups, kh, kw), or `PreparedWeights`
    offsets: Any = None  # (N, 2*offset_groups*kh*kw, Ho, Wo); None: an ordinary convolution
    bias: Any = None  # (C_out,)
    mask: Any = None  # (N, offset_groups*kh*kw, Ho, Wo)


class Convolution(NamedTuple):
    """The sizes of one convolution. Tuples have one entry per axis, y first."""

    batch: int
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]  # padding above and to the left
    dilation: tuple[int, int]
    groups: int
    offset_groups: int  # 0: no offsets, an ordinary convolution
    taps: int
    masked: int  # 1 or 0

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        return self.batch, self.out_channels, *self.out_size

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        """The shape of w."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    def describe_shapes(self) -> str:
        """The sizes behind the shapes, for error messages."""
        return (
            f"N={self.batch}, C={self.in_channels}, Ho={self.out_size[0]}, Wo={self.out_size[1]}, "
            f"C_out={self.out_channels}, kh={self.kernel[0]}, kw={self.kernel[1]}"
        ) + f", offset_groups={self.offset_groups}" * (self.offset_groups > 0)


def convolution(arrays: ConvArrays, stride: Any, padding: Any, dilation: Any) -> Convolution:
    """Read off and check the sizes common to all convolutions; the caller adds the offset groups."""
    x, w = arrays.x, arrays.w
    groups, kernel = _groups(x, w), (w.shape[2], w.shape[3])
    stride, dilation = per_axis("stride", stride, 1), per_axis("dilation", dilation, 1)
    before, after = padding_per_axis(padding)
    out_size = _out_size(x.shape[2:], kernel, stride, before, after, dilation, x.dtype)
    return Convolution(
        x.shape[0], x.shape[1], w.shape[0], x.shape[2:], out_size, kernel, stride, before, dilation,
        groups, 0, kernel[0] * kernel[1], int(arrays.mask is not None),
    )  # fmt: skip


def _groups(x: Any, w: Any) -> int:
    """The number of groups, inferred from the channels of x and w."""
    channels, per_group = x.shape[1], w.shape[1]
    for name, size, axis in (("x", channels, "C"), ("w", w.shape[0], "C_out"), ("w", per_group, "C/groups")):
        if size < 1:
            raise ValueError(f"`{name}` has {axis} = 0 (x {x.shape}, w {w.shape}), expected at least 1")
    for name, array in (("x", x), ("w", w)):
        if min(array.shape[2:]) < 1:
            raise ValueError(f"`{name}` has shape {array.shape}, expected no empty axis except the batch")
    if channels % per_group:
        raise ValueError(
            f"`w` has shape {w.shape}: its second axis is C/groups = {per_group}, expected a divisor of C = {channels} of `x`"
            + (hints.turned(x) if x.shape[3] == per_group else "")
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


def _out_size(
    size: Any, kernel: Any, stride: Any, before: Any, after: Any, dilation: Any, dtype: Any
) -> tuple[int, int]:
    out = []
    for i, axis in enumerate(("H", "W")):
        padded, reach = size[i] + before[i] + after[i], dilation[i] * (kernel[i] - 1) + 1
        check_countable("x", padded, dtype)
        if padded < reach:
            raise ValueError(
                f"with `padding` of ({before[i]}, {after[i]}) `x` is {padded} pixels long along {axis}, expected at least {reach}, "
                f"which `w` spans (kernel size {kernel[i]}, dilation {dilation[i]})"
            )
        out.append(steps(padded, reach, stride[i]))
    return out[0], out[1]


def steps(padded: Any, reach: Any, stride: Any) -> Any:
    """How many positions a kernel takes along an axis."""
    return (padded - reach) // stride + 1


def result_shape(arrays: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Any, ...]:
    """The shape of y, of which nothing is checked: sizes may be symbols. Options per axis, padding in pairs."""
    x, w = arrays.x.shape, arrays.w.shape
    size = (
        steps(x[2 + i] + sum(padding[i]), dilation[i] * (w[2 + i] - 1) + 1, stride[i]) for i in range(2)
    )  # fmt: skip
    return x[0], w[0], *size
