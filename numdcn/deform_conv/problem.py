"""Deformable convolution: its arguments, its sizes, and every error of shape, type or parameter.

Sources: Dai et al. 2017 (DCNv1), Zhu et al. 2019 (DCNv2, with a mask).
"""

from __future__ import annotations

from typing import Any

from numdcn._host.convolution import Sizes, convolution
from numdcn._host.door import Argument, check_arguments, check_shapes

ARGUMENTS = (
    Argument("x", "(N, C, H, W)", 4, False, True, True),
    Argument("offsets", "(N, 2*offset_groups*kh*kw, Ho, Wo)", 4, False, True, True, coordinates=True),
    Argument("w", "(C_out, C/groups, kh, kw)", 4, False, True, True),
    Argument("bias", "(C_out,)", None, True, True, False),
    Argument("mask", "(N, offset_groups*kh*kw, Ho, Wo)", None, True, True, True),
)

Problem = Sizes


def problem(arrays: dict[str, Any], stride: Any, padding: Any, dilation: Any) -> Problem:
    """Measure and check everything once. `arrays` holds the arguments by name, None where an optional one is absent."""
    check_arguments(ARGUMENTS, arrays, weights=("w",))
    x, offsets, w, bias, mask = (arrays[a.name] for a in ARGUMENTS)
    made = convolution(x, w, bias, stride, padding, dilation)
    made = made._replace(offset_groups=_offset_groups(x, offsets, made.taps), masked=int(mask is not None))
    channels = made.offset_groups * made.taps
    expected = {
        "offsets": (offsets, (made.batch, 2 * channels, *made.out_size)),
        "bias": (bias, (made.out_channels,)),
        "mask": (mask, (made.batch, channels, *made.out_size)),
    }
    check_shapes(expected, ARGUMENTS, made.describe_shapes())
    return made


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
