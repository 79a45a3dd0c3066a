"""Copies of images to and from the channels-last layout of the kernels."""

from __future__ import annotations

import numpy as np

from numdcn._host.arrays import place
from numdcn._host.threads import launch
from numdcn._kernels.images_cpu import ClearCall, ImagesCall, clear, pack_images, unpack_images
from numdcn._kernels.layout_cpu import BLOCK


class RimmedImages:
    """Where rimmed images lie: blocks of channels begin at `bounds`, which ends with their number."""

    def __init__(self, address: int, image_size: int, bounds: np.ndarray, slots: int, slot_bytes: int, threads: int):
        self.address, self.image_size, self.bounds = address, image_size, bounds
        self.slots, self.slot_bytes, self.threads = slots, slot_bytes, threads

    def _call(self, plain: np.ndarray) -> ImagesCall:
        batch, _, height, width = plain.shape
        blocks = len(self.bounds) - 1
        return ImagesCall(
            batch, (height, width), self.image_size, place(plain), self.address, self.bounds.ctypes.data, blocks,
            self.slots, self.slot_bytes,
        )  # fmt: skip

    def _threads(self, plain: np.ndarray) -> int:
        return min(self.threads, plain.shape[0] * -(-plain.shape[2] * plain.shape[3] // BLOCK))

    def pack(self, x: np.ndarray) -> None:
        """Copy x (N, C, H, W) here."""
        launch(pack_images, x.dtype.type(1), self._call(x), self._threads(x))

    def unpack(self, x: np.ndarray) -> None:
        """Copy what is here to x."""
        launch(unpack_images, x.dtype.type(1), self._call(x), self._threads(x))

    def clear(self, batch: int, dtype: np.dtype) -> None:
        """Fill the images with zeros."""
        launch(clear, dtype.type(1), ClearCall(self.address, batch * self.image_size), self.threads)
