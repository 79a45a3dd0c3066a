"""DCNv4: its arguments, its sizes, and every error of shape, type or parameter.

Source: Xiong et al. 2024 (Efficient Deformable ConvNets).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numdcn._call.arguments import Argument, check_arguments
from numdcn._call.attention import Attention, AttentionArrays
from numdcn._call.checks import integer
from numdcn._call.window import Window, check_pixels, problem_of, result_shape, way_out, window

ARGUMENTS = (
    Argument("x", "(N, H, W, groups*D)", 4, field="value"),
    Argument("offset_mask", "(N, Ho, Wo, 3*groups*P), or more channels, up to a multiple of 8", 4, field="points"),
)


def problem(
    arrays: AttentionArrays, groups: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, offset_scale: Any,
    remove_center: Any,
) -> Attention:  # fmt: skip
    """Read off and check all sizes."""
    check_arguments(ARGUMENTS, arrays)
    x, packed, _ = arrays
    groups = integer("groups", groups, 1)
    made = window(x, kernel_size, stride, padding, dilation, remove_center)
    try:
        _check_channels(made, x, packed, groups)
        check_pixels(made, x, "offset_mask", packed)
    except ValueError as error:
        raise ValueError(f"{error}{way_out(made, x, packed)}") from None
    return problem_of(x, made, groups, offset_scale)


def _check_channels(made: Window, x: Any, packed: Any, groups: int) -> None:
    """Raise unless the channels of both arrays go with the groups."""
    if x.shape[3] % groups:
        raise ValueError(
            f"`groups` is {groups}, expected a divisor of {x.shape[3]}, the channels of `x` with shape {x.shape}"
        )
    least, rounded = _channels(made.points, groups)
    if packed.shape[3] not in (least, rounded):
        raise ValueError(
            f"`offset_mask` has {packed.shape[3]} channels (shape {packed.shape}), expected {least} = 3*groups*P with "
            f"groups={groups} and the {made.describe()}"
            + f", or that rounded up to a multiple of 8, {rounded}" * (rounded != least)
            + _other_groups(made, x, packed)
        )


def _channels(points: int, groups: int) -> tuple[int, int]:
    """The numbers of channels that offsets and masks may have: without padding, and with it."""
    used = 3 * points * groups
    return used, -(-used // 8) * 8


def _other_groups(made: Window, x: Any, packed: Any) -> str:
    """Which numbers of groups would fit."""
    channels = packed.shape[3]
    most = min(x.shape[3], channels // (3 * made.points))
    fits = [str(g) for g in range(1, most + 1) if x.shape[3] % g == 0 and channels in _channels(made.points, g)]
    return f"; groups={' or '.join(fits)} would fit" if fits else ""


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    names = ("kernel_size", "stride", "padding", "dilation")
    return (result_shape(arrays.x, *(options[name] for name in names)),)
