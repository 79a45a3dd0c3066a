"""The sizes of convolutions, deformable or not: read off x and w, checked against each other."""

from __future__ import annotations

from typing import Any

from numdcn._host.checks import countable, padding_per_axis, per_axis
from numdcn._host.weights import PreparedWeights
from numdcn._kernels.convolution import Convolution

Sizes = Convolution


def convolution(x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any) -> Convolution:
    """Measure and check the arguments that every convolution has; offsets and masks are for the caller to add."""
    groups, kernel = _groups(x, w), (w.shape[2], w.shape[3])
    stride, dilation = per_axis("stride", stride, 1), per_axis("dilation", dilation, 1)
    before, after = padding_per_axis(padding)
    out_size = _out_size(x.shape[2:], kernel, stride, before, after, dilation, x.dtype)
    return Convolution(
        x.shape[0], x.shape[1], w.shape[0], x.shape[2:], out_size, kernel, stride, before, after, dilation,
        groups, 0, kernel[0] * kernel[1], 0, int(bias is not None),
    )  # fmt: skip


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


def _out_size(
    size: Any, kernel: Any, stride: Any, before: Any, after: Any, dilation: Any, dtype: Any
) -> tuple[int, int]:
    out = []
    for i, axis in enumerate(("H", "W")):
        padded, reach = size[i] + before[i] + after[i], dilation[i] * (kernel[i] - 1) + 1
        countable("x", padded, dtype)
        if padded < reach:
            raise ValueError(
                f"`padding` of ({before[i]}, {after[i]}) makes `x` {padded} long along {axis}, expected at least {reach}, "
                f"the reach of `w` (kernel size {kernel[i]}, dilation {dilation[i]})"
            )
        out.append((padded - reach) // stride[i] + 1)
    return out[0], out[1]
