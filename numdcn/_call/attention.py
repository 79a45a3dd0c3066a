"""Sizes and arrays of the operators that sum weighted samples of channels-last images: deformable attention, DCNv3,
DCNv4."""

from __future__ import annotations

from typing import Any, NamedTuple


class AttentionArrays(NamedTuple):
    """The arrays of one call, or their gradients; None if not requested. Each operator brings its own to this form by
    views."""

    value: Any  # (B, S, M, D): the pixels of all levels, one level after the other, row by row
    points: Any  # (B, Q, M, T, 2): x, then y
    weights: Any  # (B, Q, M, T)


class Level(NamedTuple):
    """One level: an image."""

    height: int
    width: int
    start: int  # pixels before it
    points: int  # of the T points of a query and head, which are in the order of the levels


class Grid(NamedTuple):
    """Where points lie: along each axis `base + scale * (tap + point)`, with the tap and the scale of the point's number.

    The base of query q is `(q // columns) * stride + origin` along y, `(q % columns) * stride + origin` along x. Tuples
    have one entry per axis, y first.
    """

    columns: int  # queries in a row
    stride: tuple[int, int]
    origin: tuple[float, float]
    taps: tuple[tuple[float, float], ...]  # of each of the T points
    scales: tuple[tuple[float, float], ...]


class Attention(NamedTuple):
    """The sizes of one call::

    y[b, q, m, d] = sum over t of weights[b, q, m, t] * S(value of t's level [b, :, m, d]; point t of b, q, m)
    """

    batch: int
    queries: int
    heads: int  # M; the groups of DCNv3
    channels: int  # D, of a head
    levels: tuple[Level, ...]
    grid: Grid
    out_shape: tuple[int, ...]  # of y as the caller sees it

    @property
    def points(self) -> int:
        """T, the number of points of a query and head."""
        return sum(level.points for level in self.levels)

    @property
    def pixels(self) -> int:
        """S, the number of pixels of all levels."""
        return sum(level.height * level.width for level in self.levels)
