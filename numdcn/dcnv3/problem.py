"""DCNv3: its arguments, its sizes, and every error of shape, type or parameter.

Source: Wang et al. 2023 (InternImage).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numdcn._call.arguments import Argument, check_arguments
from numdcn._call.attention import Attention, AttentionArrays
from numdcn._call.window import Window, check_pixels, problem_of, result_shape, way_out, window

ARGUMENTS = (
    Argument("x", "(N, H, W, groups*D)", 4, field="value"),
    Argument("offsets", "(N, Ho, Wo, groups*P*2)", 4, field="points", coordinates=True),
    Argument("mask", "(N, Ho, Wo, groups*P)", 4, field="weights"),
)


def problem(
    arrays: AttentionArrays,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    offset_scale: Any,
    remove_center: Any,
) -> Attention:
    """Read off and check all sizes."""
    check_arguments(ARGUMENTS, arrays)
    x, offsets, mask = arrays
    made = window(x, kernel_size, stride, padding, dilation, remove_center)
    try:
        groups = _groups(made, x, offsets, mask)
        check_pixels(made, x, "offsets", offsets)
        check_pixels(made, x, "mask", mask)
    except ValueError as error:
        swapped = offsets.shape[:3] == mask.shape[:3] and mask.shape[3] == 2 * offsets.shape[3] > 0
        order = "; `offsets` and `mask` look swapped: the order is x, offsets, mask" if swapped else ""
        raise ValueError(f"{error}{order or way_out(made, x, offsets)}") from None
    return problem_of(x, made, groups, offset_scale)


def _groups(made: Window, x: Any, offsets: Any, mask: Any) -> int:
    """The number of groups, inferred from the channels of the mask."""
    weights = mask.shape[3]
    groups, rest = divmod(weights, made.points)
    if rest or not groups:
        raise ValueError(
            f"`mask` has {weights} channels (shape {mask.shape}), expected a multiple of the {made.describe()}: "
            f"groups*P{made.other_center(weights, x.shape[3])}"
        )
    if x.shape[3] % groups:
        raise ValueError(
            f"`mask` has {weights} channels, so groups = {weights}/{made.points} = {groups}, expected a divisor of "
            f"{x.shape[3]}, the channels of `x` with shape {x.shape}"
        )
    if offsets.shape[3] != 2 * weights:
        raise ValueError(
            f"`offsets` has {offsets.shape[3]} channels (shape {offsets.shape}), expected {2 * weights}, two for each of the "
            f"{weights} channels of `mask`: groups*P*2"
        )
    return groups


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    names = ("kernel_size", "stride", "padding", "dilation")
    return (result_shape(arrays.x, *(options[name] for name in names)),)
