"""Weights that are packed once and used many times."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.arrays import addressable, check_array
from numdcn._host.checks import integer
from numdcn._host.threads import plan_threads, run


class PreparedWeights:
    """A snapshot of weights, packed for the kernels; accepted wherever `w` is. Made by `prepare_weights`.

    It has the `shape` and `dtype` of the weights, and `groups`. It pickles as the plain weights.
    """

    __slots__ = ("_storage", "array", "groups", "packed")

    def __init__(self, array: np.ndarray, groups: int) -> None:
        self.array = np.array(array, order="C")
        self.array.flags.writeable = False
        self.groups = groups
        self._storage, self.packed = _pack(self.array, groups)  # the memory, and the aligned address in it

    @property
    def shape(self) -> tuple[int, ...]:
        """(C_out, C/groups, kh, kw)."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64."""
        return self.array.dtype

    @property
    def ndim(self) -> int:
        """4."""
        return self.array.ndim

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedWeights, (self.array, self.groups)

    def __repr__(self) -> str:
        return f"PreparedWeights(shape={self.shape}, dtype={self.dtype}, groups={self.groups})"


def _pack(array: np.ndarray, groups: int) -> tuple[np.ndarray, int]:
    from numdcn._kernels.weights_cpu import pack, packing

    how = packing(array.shape, groups, array.dtype)
    storage = np.empty(how.size * array.itemsize + 64, np.uint8)
    address = -(-storage.ctypes.data // 64) * 64
    run(lambda counter, slot: pack(array, how, address, counter), plan_threads(how.groups * how.panels, how.size))
    return storage, address


def prepare_weights(w: np.ndarray, *, groups: int = 1) -> PreparedWeights:
    """Pack weights once, for calls that repeat with them.

    w: array (C_out, C/groups, kh, kw) of float32 or float64. groups: the number of convolution groups, which w alone
    does not tell. Returns an object that `deform_conv_forward` and `deform_conv_backward` accept as `w`. It is a
    snapshot: later changes of `w` are not seen.

    Raises `TypeError` or `ValueError` if w is no such array, or its outputs are no multiple of groups.
    """
    check_array("w", w, 4, "(C_out, C/groups, kh, kw)")
    groups = integer("groups", groups, 1)
    if min(w.shape) < 1:
        raise ValueError(f"`w` has shape {w.shape}, expected no empty axis")
    if w.shape[0] % groups:
        raise ValueError(f"`w` has shape {w.shape}: C_out = {w.shape[0]}, expected a multiple of groups = {groups}")
    return PreparedWeights(addressable(w), groups)
