"""Multi-scale deformable attention: its arguments, its sizes, and every error of shape, type or parameter.

Source: Zhu et al. 2021 (Deformable DETR).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numdcn._call import hints
from numdcn._call.arguments import Argument, check_arguments, check_shapes
from numdcn._call.attention import Attention, AttentionArrays, Grid, Level
from numdcn._call.checks import check_countable

ARGUMENTS = (
    Argument("value", "(N, S, M, D)", 4, field="value"),
    Argument("sampling_locations", "(N, Q, M, L, P, 2)", None, field="points", coordinates=True),
    Argument("attention_weights", "(N, Q, M, L, P)", None, field="weights"),
)


def problem(
    arrays: AttentionArrays, spatial_shapes: tuple[tuple[int, int], ...], points_per_level: tuple[int, ...] | None
) -> Attention:
    """Read off and check all sizes: those of the levels, and their numbers of points if they are unequal."""
    check_arguments(ARGUMENTS, arrays)
    sizes = spatial_shapes
    value, locations = arrays.value, arrays.points
    if min(value.shape[1:]) < 1:
        raise ValueError(f"`value` has shape {value.shape}, expected no empty axis except the batch")
    pixels = sum(height * width for height, width in sizes)
    if value.shape[1] != pixels:
        raise ValueError(
            f"`value` has shape {value.shape}: S = {value.shape[1]} pixels, expected {pixels}, the sum of height*width over "
            f"`spatial_shapes` {sizes}{_other_layout(value, pixels)}"
        )
    for size in sizes:
        check_countable("value", max(size), value.dtype)
    counts = _points(arrays, sizes, points_per_level)
    batch, queries, heads = value.shape[0], locations.shape[1], value.shape[2]
    expected = {
        "sampling_locations": (batch, queries, heads, *locations.shape[3:-1], 2),
        "attention_weights": (batch, queries, heads, *locations.shape[3:-1]),
    }
    check_shapes(ARGUMENTS, arrays, expected, lambda: f"N={batch}, Q={queries}, M={heads}, points {counts}")
    return _attention(value.shape, queries, sizes, counts)


def _points(
    arrays: AttentionArrays, sizes: tuple[tuple[int, int], ...], counts: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The number of points of each level."""
    shape, levels = arrays.points.shape, len(sizes)
    if len(shape) != (6 if counts is None else 5) or shape[-1] != 2:
        wanted = (
            "6 axes: (N, Q, M, L, P, 2), or 5 axes: (N, Q, M, T, 2) with `points_per_level`"
            if counts is None
            else "5 axes: (N, Q, M, T, 2), as `points_per_level` is given"
        )
        raise ValueError(
            f"`sampling_locations` has shape {shape}, expected {wanted}; x and y last{_other_axes(arrays, counts)}"
        )
    if counts is None:
        if shape[3] != levels or shape[4] < 1:
            raise ValueError(
                f"`sampling_locations` has shape {shape}: L = {shape[3]} levels of P = {shape[4]} points, expected L = {levels}, "
                "the number of pairs in `spatial_shapes`, and P of at least 1"
            )
        return (shape[4],) * levels
    if len(counts) != levels:
        raise ValueError(
            f"`points_per_level` is {counts}, expected {levels} numbers, one for each pair in `spatial_shapes`"
        )
    if sum(counts) != shape[3]:
        raise ValueError(
            f"`sampling_locations` has shape {shape}: T = {shape[3]} points, expected {sum(counts)}, the sum of "
            f"`points_per_level` {counts}"
        )
    return counts


def _other_layout(value: Any, pixels: int) -> str:
    """How value gets its axes in order, where another of them is as long as it has pixels."""
    if value.shape[3] == pixels:
        return hints.turned(value, (0, 3, 1, 2), "(N, M, D, S)", "value")
    if value.shape[2] == pixels:
        return hints.turned(value, (0, 2, 1, 3), "(N, M, S, D)", "value")
    return ""


def _other_axes(arrays: AttentionArrays, counts: Any) -> str:
    """What another number of axes of the locations may come from."""
    locations, weights = arrays.points.shape, arrays.weights.shape
    if weights[:-1] == locations and weights[-1:] == (2,):
        return "; `sampling_locations` and `attention_weights` look swapped"
    if counts is not None and len(locations) == 6:
        return "; leave out `points_per_level`, which the shape tells"
    return ""


def _attention(
    shape: tuple[int, ...], queries: int, sizes: tuple[tuple[int, int], ...], counts: tuple[int, ...]
) -> Attention:
    batch, _, heads, channels = shape
    levels, scales, start = [], [], 0
    for (height, width), count in zip(sizes, counts, strict=True):
        levels.append(Level(height, width, start, count))
        scales += [(float(height), float(width))] * count
        start += height * width
    grid = Grid(queries, (0, 0), (-0.5, -0.5), ((0.0, 0.0),) * len(scales), tuple(scales))
    return Attention(batch, queries, heads, channels, tuple(levels), grid, (batch, queries, heads * channels))


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    value = arrays.value.shape
    return ((value[0], arrays.sampling_locations.shape[1], value[2] * value[3]),)
