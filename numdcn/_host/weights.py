"""Weights that are packed once and used many times."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.arrays import addressable, check_array, place, received
from numdcn._host.checks import integer
from numdcn._host.device_array import DeviceArray
from numdcn._host.threads import launch, plan_threads
from numdcn._kernels.weights_cpu import Packing, PackWeights, pack_weights, packing


class PreparedWeights:
    """A snapshot of weights, packed for the kernels; accepted wherever `w` is. Made by `prepare_weights`.

    It has the `shape` and `dtype` of the weights, and `groups`. It pickles as the plain weights.
    """

    __slots__ = ("_array", "_groups", "_packed", "_storage", "layouts")

    def __init__(self, array: Any, groups: int) -> None:
        self._groups = groups
        self._array: Any
        self._storage: Any = None
        self._packed = 0
        self.layouts: dict[Any, DeviceArray] = {}  # on a GPU: packed when first wanted (see `weights_cuda`)
        if isinstance(array, DeviceArray):
            from numdcn._host.work_cuda import copied

            self._array = copied(array)
            return
        self._array = np.array(array, order="C")
        self._array.flags.writeable = False
        self._storage, self._packed = _pack(self._array, groups)

    @property
    def array(self) -> Any:
        """The weights as they were, read-only; on a GPU a `DeviceArray`."""
        return self._array

    @property
    def groups(self) -> int:
        """The number of convolution groups."""
        return self._groups

    @property
    def packed(self) -> int:
        """The address of the packed weights."""
        return self._packed

    @property
    def shape(self) -> tuple[int, ...]:
        """(C_out, C/groups, kh, kw)."""
        return self._array.shape

    @property
    def dtype(self) -> Any:
        """That of the weights."""
        return self._array.dtype

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self._array, DeviceArray):
            raise TypeError("weights that were prepared on a GPU cannot be pickled; expected plain arrays")
        return PreparedWeights, (self._array, self._groups)

    def __repr__(self) -> str:
        return f"PreparedWeights(shape={self.shape}, dtype={self.dtype}, groups={self.groups})"


def _pack(array: np.ndarray, groups: int) -> tuple[np.ndarray, int]:
    """Memory with the packed weights in it, and their address."""
    how = packing(array.shape, groups, array.dtype)
    storage = np.empty((how.size + 16) * array.itemsize + 64, np.uint8)  # vectors may run over
    address = -(-storage.ctypes.data // 64) * 64
    pack(array, how, address, plan_threads(how.groups * how.panels, how.size))
    return storage, address


def pack(w: np.ndarray, how: Packing, address: int, threads: int) -> None:
    """Pack an addressable array into memory at `address`."""
    values = PackWeights(how, w.shape[3], *place(w), address)
    launch(pack_weights, w.dtype.type(1), values, min(threads, how.groups * how.panels))


def prepare_weights(w: Any, *, groups: int = 1) -> PreparedWeights:
    """Pack weights once, for calls that repeat with them.

    w: array (C_out, C/groups, kh, kw) of float32 or float64, or one on a GPU. groups: the number of convolution groups, which w alone
    does not tell. Returns an object that `deform_conv`, `conv` and `deform_conv_layer` accept as `w`, forward and backward. It is a
    snapshot: later changes of `w` are not seen.

    Raises `TypeError` or `ValueError` if w is no such array, or its outputs are no multiple of groups.
    """
    w = received(w)
    check_array("w", w, 4, "(C_out, C/groups, kh, kw)")
    groups = integer("groups", groups, 1)
    if min(w.shape) < 1:
        raise ValueError(f"`w` has shape {w.shape}, expected no empty axis")
    if w.shape[0] % groups:
        raise ValueError(f"`w` has shape {w.shape}: C_out = {w.shape[0]}, expected a multiple of groups = {groups}")
    return PreparedWeights(w if isinstance(w, DeviceArray) else addressable(w), groups)
