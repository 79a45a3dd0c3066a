"""Position-sensitive RoI pooling: each bin is the mean of the pixels of its own channel.

torchvision's forward omits the last row and column of the image; its backward does not, nor does numdcn.
So no box comes near them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cases.interface import Target
from benchmarks.cases.roi import INPUTS_TEXT, Bins, RoiCase, RoiInputs, RoiOperator, TorchvisionRoi
from benchmarks.rivals.contender import NumdcnOperator, Reuse


def round_away(a: np.ndarray) -> np.ndarray:
    """Round to the nearest integer, halves away from zero."""
    return np.trunc(a + np.copysign(np.asarray(0.5, a.dtype), a)).astype(int)


def bin_edges(start: np.ndarray, size: np.ndarray, bins: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel and end of each bin, (boxes, bins) each, clipped to the image."""
    index, size = np.arange(bins), size[:, None]
    low, high = index * size // bins, -(-(index + 1) * size // bins)
    return np.clip(low + start[:, None], 0, end), np.clip(high + start[:, None], 0, end)


def ambiguous(size: np.ndarray, bins: int) -> np.ndarray:
    """Whether some bin's edge, computed in float32 as index * (size / bins), differs from the exact one."""
    step, index = size[:, None].astype(np.float32) / np.float32(bins), np.arange(bins + 1)
    rounded = index.astype(np.float32) * step
    low, high = (
        np.floor(rounded) != index * size[:, None] // bins,
        np.ceil(rounded) != -(-index * size[:, None] // bins),
    )
    return (low[:, :-1] | high[:, 1:]).any(1)


class PixelBins(RoiOperator):
    """An operator whose bins consist of whole pixels.

    For boxes of 57, 114 or 121 pixels of x, torchvision's rounding adds a pixel to a bin; here they are one pixel
    smaller.
    """

    extra = 0  # pixels of a box in addition to the difference of its rounded corners

    def sizes(self, case: RoiCase, rois: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First pixel and number of pixels of each box, (boxes, 2) each, along y and x."""
        corners = round_away(rois[:, 1:] * np.asarray(case.scale, rois.dtype))[:, [1, 0, 3, 2]]
        return corners[:, :2], np.maximum(corners[:, 2:] - corners[:, :2] + self.extra, 1)

    def edges(self, case: RoiCase, rois: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """First pixel and end of each bin, (boxes, bins) each: along y, along x."""
        start, size = self.sizes(case, rois)
        return [bin_edges(start[:, a], size[:, a], case.bins, end) for a, end in enumerate((case.h, case.w))]

    def make_inputs(self, case: RoiCase, seed: int, dtype: str, backward: bool) -> RoiInputs:
        inputs = super().make_inputs(case, seed, dtype, backward)
        size = self.sizes(case, inputs.rois)[1]
        for axis, end in ((0, 4), (1, 3)):
            inputs.rois[ambiguous(size[:, axis], case.bins), end] -= 1 / case.scale
        return inputs


class Numdcn(NumdcnOperator):
    """numdcn with newly allocated results."""

    operator = "ps_roi_pool"

    def arguments(self, inputs: RoiInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (inputs.x, inputs.rois, self.case.bins, self.case.scale), {}


class NumdcnOut(Reuse, Numdcn):
    """numdcn with results filled in place."""


class TorchvisionPsPool(TorchvisionRoi):
    """torchvision's ps_roi_pool."""

    def forward(self, given: Any) -> Any:
        return self.ops.ps_roi_pool(*given, self.case.scale, *self.size)

    def backward(self, given: Any) -> Any:
        grad_y, rois, channels, shape = given
        return self.ops._ps_roi_pool_backward(grad_y, rois, channels, self.case.scale, *self.size, *shape)


class PsRoiPool(PixelBins):
    """Bins that are means."""

    def bins(self, case: RoiCase, inputs: RoiInputs) -> Bins:
        weights = []
        for (low, high), size in zip(self.edges(case, inputs.rois), (case.h, case.w), strict=True):
            pixel = np.arange(size)
            inside = (pixel >= low[..., None]) & (pixel < high[..., None])
            weights.append(inside / np.maximum(high - low, 1)[..., None])
        shape = (case.boxes, case.bins, case.bins)
        rows = np.broadcast_to(weights[0][:, :, None], (*shape, case.h))
        columns = np.broadcast_to(weights[1][:, None], (*shape, case.w))
        return Bins(rows, columns, rows, columns, np.ones(shape, bool))


OPERATOR = PsRoiPool(
    "ps_roi_pool",
    INPUTS_TEXT + "; no box within 16 pixels of the right and lower rims",
    (RoiCase("boxes", c=490, position_sensitive=True, margin=16),),
    {"numdcn": Numdcn, "numdcn-out": NumdcnOut, "torchvision": TorchvisionPsPool},
    (Target("forward", "fastest", 1), Target("backward", "torchvision", 3)),
    memory_cases=("boxes",),
    start_cases=("boxes",),
)
