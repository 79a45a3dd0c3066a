"""Sizes and arrays of sampling at points."""

from __future__ import annotations

from typing import Any, NamedTuple


class PointArrays(NamedTuple):
    """The arrays of a sampling, or their gradients; None if not requested."""

    x: Any  # (N, C, H, W)
    points: Any  # (N, ..., 2): y, x


class Sampling(NamedTuple):
    """The sizes of one sampling."""

    batch: int
    channels: int
    size: tuple[int, int]  # y first
    points: int  # of an image
    out_shape: tuple[int, ...]
