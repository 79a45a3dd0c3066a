"""The deformable layer: its arguments, its sizes, and every error of shape, type or parameter.

Sources: Dai et al. 2017 (DCNv1), Zhu et al. 2019 (DCNv2, modulated).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from numdcn._call import hints
from numdcn._call.arguments import Argument, check_arguments, check_shapes
from numdcn._call.checks import describe, flag, is_real
from numdcn._call.convolution import ConvArrays, convolution, result_shape

ARGUMENTS = (
    Argument("x", "(N, C, H, W)", 4),
    Argument("w", "(C_out, C/groups, kh, kw)", 4),
    Argument("offset_w", "(2*offset_groups*kh*kw, or 3* if modulated, C, kh, kw)", 4),
    Argument("offset_b", "(2*offset_groups*kh*kw, or 3* if modulated,)", None, optional=True, saved=False),
    Argument("bias", "(C_out,)", None, optional=True, saved=False),
)
RESULTS = (
    Argument("offsets", "(N, 2*offset_groups*kh*kw, Ho, Wo)", None, optional=True, coordinates=True),
    Argument("mask", "(N, offset_groups*kh*kw, Ho, Wo)", None, optional=True),
)


class LayerArrays(NamedTuple):
    """The arrays of a layer; None if not given."""

    x: Any
    w: Any
    offset_w: Any
    offset_b: Any = None
    bias: Any = None
    offsets: Any = None  # predicted by a forward, given to the backward
    mask: Any = None


class Problem(NamedTuple):
    """The sizes of one layer."""

    out_shape: tuple[int, int, int, int]
    offset_channels: int  # the predicted channels that are offsets
    modulated: bool
    mask_scale: int  # 1 or 2


def problem(arrays: LayerArrays, modulated: Any, mask_scale: Any, stride: Any, padding: Any, dilation: Any) -> Problem:
    """Read off and check all sizes."""
    table = (*ARGUMENTS, *RESULTS)
    check_arguments(table, arrays, weights=("w", "offset_w"))
    modulated = flag("modulated", modulated)
    offset_w = arrays.offset_w
    made = convolution(ConvArrays(arrays.x, arrays.w, bias=arrays.bias), stride, padding, dilation)
    if not is_real(mask_scale):
        raise TypeError(f"`mask_scale` is {describe(mask_scale)}, expected 1 or 2")
    if not isinstance(mask_scale, (int, np.integer)) or mask_scale not in (1, 2):
        raise ValueError(f"`mask_scale` is {describe(mask_scale)}, expected 1 or 2")
    predicted = (3 if modulated else 2) * made.taps
    channels = offset_w.shape[0]
    if channels < 1 or channels % predicted:
        other = (2 if modulated else 3) * made.taps
        raise ValueError(
            f"`offset_w` has {channels} outputs (shape {offset_w.shape}), expected a multiple of "
            f"{3 if modulated else 2}*kh*kw = {predicted}, with modulated={modulated}"
            + f"; modulated={not modulated} would fit"
            * (channels > 0 and channels % other == 0)
        )
    offset_groups = channels // predicted
    if made.in_channels % offset_groups:
        raise ValueError(
            f"`offset_w` has {channels} outputs, so offset_groups = {channels}/{predicted} = {offset_groups}, "
            f"expected a divisor of C = {made.in_channels} of `x`"
        )
    if getattr(offset_w, "groups", 1) != 1:
        raise ValueError(f"`offset_w` was prepared for groups={offset_w.groups}, expected groups=1")
    moved = 2 * offset_groups * made.taps
    expected = {
        "offset_w": (channels, made.in_channels, *made.kernel),
        "offset_b": (channels,),
        "bias": (made.out_channels,),
        "offsets": (made.batch, moved, *made.out_size),
        "mask": (made.batch, moved // 2, *made.out_size),
    }
    made = made._replace(offset_groups=offset_groups)
    try:
        check_shapes(table, arrays, expected, made.describe_shapes)
    except ValueError as error:
        raise ValueError(f"{error}{hints.fitting_padding(made, arrays.offsets, moved)}") from None
    if arrays.mask is not None and not modulated:
        raise ValueError("`mask` was given with modulated=False, expected None")
    return Problem(made.out_shape, moved, modulated, int(mask_scale))


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    y = result_shape(arrays, options["stride"], options["padding"], options["dilation"])
    predicted = arrays.offset_w.shape[0]
    moved = predicted // 3 * 2 if options["modulated"] else predicted
    mask = (y[0], moved // 2, *y[2:]) if options["modulated"] else None
    return y, (y[0], moved, *y[2:]), mask
