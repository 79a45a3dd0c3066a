"""Deformable convolution: its arguments, its sizes, and every error of shape, type or parameter.

Sources: Dai et al. 2017 (DCNv1), Zhu et al. 2019 (DCNv2, with a mask).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numdcn._call import hints
from numdcn._call.arguments import Argument, check_arguments, check_shapes
from numdcn._call.convolution import ConvArrays, Convolution, convolution, result_shape

ARGUMENTS = (
    Argument("x", "(N, C, H, W)", 4),
    Argument("offsets", "(N, 2*offset_groups*kh*kw, Ho, Wo)", 4, coordinates=True),
    Argument("w", "(C_out, C/groups, kh, kw)", 4),
    Argument("bias", "(C_out,)", None, optional=True, saved=False),
    Argument("mask", "(N, offset_groups*kh*kw, Ho, Wo)", None, optional=True),
)


def problem(arrays: ConvArrays, stride: Any, padding: Any, dilation: Any) -> Convolution:
    """Read off and check all sizes."""
    check_arguments(ARGUMENTS, arrays, weights=("w",))
    made = None
    try:
        made = convolution(arrays, stride, padding, dilation)
        made = made._replace(offset_groups=_offset_groups(arrays.x, arrays.offsets, made.taps))
        channels = made.offset_groups * made.taps
        expected = {
            "offsets": (made.batch, 2 * channels, *made.out_size),
            "bias": (made.out_channels,),
            "mask": (made.batch, channels, *made.out_size),
        }
        check_shapes(ARGUMENTS, arrays, expected, made.describe_shapes)
    except ValueError as error:
        raise ValueError(f"{error}{_way_out(arrays, made)}") from None
    return made


def _way_out(arrays: ConvArrays, made: Convolution | None) -> str:
    """What would fit, as far as the convolution was measured."""
    order = hints.order(arrays.x, arrays.offsets, arrays.w, arrays.bias)
    if order or made is None:
        return order
    channels = made.offset_groups * made.taps
    if arrays.mask is None and getattr(arrays.bias, "shape", ()) == (made.batch, channels, *made.out_size):
        return "; `bias` looks like a mask: pass it as mask="
    return hints.channels_last(made, arrays.x, arrays.offsets, arrays.w) or hints.fitting_padding(
        made, arrays.offsets, 2 * channels
    )


def _offset_groups(x: Any, offsets: Any, taps: int) -> int:
    """offset_groups, inferred from the channels of the offsets."""
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
            f"expected a divisor of C = {x.shape[1]} of `x`"
        )
    return offset_groups


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    return (result_shape(arrays, options["stride"], options["padding"], options["dilation"]),)
