"""Arrays on a GPU in other shapes: views if they are contiguous, otherwise copies."""

from __future__ import annotations

from typing import Any

from numdcn._call.device_array import DeviceArray
from numdcn._call.results import Output
from numdcn._cuda.workspace import Workspace


class Views(Workspace):
    """Other shapes of the arrays of one call, for the duration of a `with` block."""

    def seen(self, array: DeviceArray, shape: tuple[int, ...]) -> DeviceArray:
        """An input in another shape."""
        return array if _fits(array, shape) else self.contiguous(array).reshaped(*shape)

    def output_as(self, array: Any, shape: tuple[int, ...]) -> Output[Any]:
        """A target in another shape for a kernel to fill; None stays None."""
        if array is None or _fits(array, shape):
            return Output(array, None, self.copy)
        if array.contiguous:
            return Output(array.reshaped(*shape), None, self.copy)
        made = self.empty(shape, array.dtype)
        return Output(array, made, lambda source, target: self.copy(source.reshaped(*target.shape), target))

    def unpacked(self, rows: DeviceArray, heads: int, points: int) -> tuple[DeviceArray, DeviceArray]:
        """Views of rows (B, Q, C) of points and weights, packed by heads: (B, Q, M, T, 2) and (B, Q, M, T)."""
        batch, queries, columns = rows.shape
        shape, strides = (batch, queries, heads, points), (queries * columns, columns, 3 * points)
        return rows.view((*shape, 2), (*strides, 2, 1)), rows.view(shape, (*strides, 1), 2 * points)

    def clear_columns(self, rows: DeviceArray, first: int) -> None:
        """Fill the columns from `first` on with zeros."""
        batch, queries, columns = rows.shape
        if first < columns:
            self.clear(rows.view((batch, queries, columns - first), (queries * columns, columns, 1), first))


def _fits(array: DeviceArray, shape: tuple[int, ...]) -> bool:
    """Whether an array has this shape already, whatever its strides."""
    return array.shape == shape and array.address % array.dtype.itemsize == 0
