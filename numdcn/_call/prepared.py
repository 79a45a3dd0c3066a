"""Weights packed once and used many times."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._call.device_array import DeviceArray


class PreparedWeights:
    """A snapshot of weights, packed for the kernels and accepted wherever `w` is; made by `prepare_weights`.

    It has the `shape` and `dtype` of the weights, and `groups`. It pickles as the plain weights.
    """

    __slots__ = ("_array", "_groups", "layouts")

    def __init__(self, array: Any, groups: int) -> None:
        self._array: Any = array
        self._groups = groups
        self.layouts: dict[Any, Any] = {}  # packed for the kernels, each when first needed: see `pack` in both wings
        if isinstance(array, np.ndarray):
            array.flags.writeable = False

    @property
    def array(self) -> Any:
        """The original weights, read-only; on a GPU a `DeviceArray`."""
        return self._array

    @property
    def groups(self) -> int:
        """The number of convolution groups."""
        return self._groups

    @property
    def shape(self) -> tuple[int, ...]:
        """(C_out, C/groups, kh, kw)."""
        return self._array.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weights."""
        return self._array.dtype

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self._array, DeviceArray):
            raise TypeError("weights prepared on a GPU cannot be pickled; pickle the array that they were made of")
        return PreparedWeights, (self._array, self._groups)

    def __repr__(self) -> str:
        return f"PreparedWeights(shape={self.shape}, dtype={self.dtype}, groups={self.groups})"
