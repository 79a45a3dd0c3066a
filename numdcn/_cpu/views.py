"""NumPy arrays in other shapes: views where strides allow it, otherwise copies."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._call.results import Output
from numdcn._cpu.arrays import output_as


class Views:
    """Other shapes of the arrays of one call, for the duration of a `with` block."""

    def __init__(self, like: np.ndarray) -> None:
        pass

    def __enter__(self) -> Views:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def seen(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """An input in another shape."""
        return array.reshape(shape)

    def output_as(self, array: Any, shape: tuple[int, ...]) -> Output[Any]:
        """A target in another shape for a kernel to fill; None stays None."""
        return Output(None, None, np.copyto) if array is None else output_as(array, *shape)

    def unpacked(self, rows: np.ndarray, heads: int, points: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of rows (B, Q, C) of points and weights, packed by heads: (B, Q, M, T, 2) and (B, Q, M, T)."""
        blocks = rows[..., : 3 * points * heads].reshape(*rows.shape[:2], heads, 3 * points)
        return blocks[..., : 2 * points].reshape(*blocks.shape[:3], points, 2), blocks[..., 2 * points :]

    def clear_columns(self, rows: np.ndarray, first: int) -> None:
        """Fill the columns from `first` on with zeros."""
        rows[..., first:] = 0
