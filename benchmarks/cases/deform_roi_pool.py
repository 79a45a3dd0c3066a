"""Deformable RoI pooling: RoI align with bins moved by offsets. No other library has it on a CPU.

The floor is the plain operator: torchvision's roi_align of the same boxes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cases.roi import INPUTS_TEXT, Bins, RoiCase, RoiInputs, RoiOperator, align_bins, align_geometry
from benchmarks.cases.roi_align import TorchvisionAlign
from benchmarks.rivals.contender import NumdcnOperator, Reuse

GAMMA = 0.1


class Numdcn(NumdcnOperator):
    """numdcn with newly allocated results."""

    operator = "deform_roi_pool"

    def arguments(self, inputs: RoiInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        case = self.case
        keywords = {"output_size": case.bins, "spatial_scale": case.scale, "sampling_ratio": 0, "gamma": GAMMA}
        return (inputs.x, inputs.rois, inputs.moves), keywords


class NumdcnOut(Reuse, Numdcn):
    """numdcn with results filled in place."""


class PlainAlign(TorchvisionAlign):
    """The floor: torchvision's roi_align."""

    plain = True


class DeformRoiPool(RoiOperator):
    """RoI align's bins, moved."""

    def unit(self, case: RoiCase, inputs: RoiInputs) -> np.ndarray:
        return GAMMA * align_geometry(case, inputs.rois)[1]

    def bins(self, case: RoiCase, inputs: RoiInputs) -> Bins:
        assert inputs.moves is not None
        moves = np.moveaxis(inputs.moves[:, ::-1].astype(np.float64), 1, -1)  # (boxes, bins, bins, 2) along y and x
        return align_bins(case, inputs.rois, moves * self.unit(case, inputs)[:, None, None])


OPERATOR = DeformRoiPool(
    "deform_roi_pool",
    INPUTS_TEXT + f"; offsets N(0, 1), gamma {GAMMA}",
    (RoiCase("boxes", deformed="offsets"),),
    {"numdcn": Numdcn, "numdcn-out": NumdcnOut, "roi_align": PlainAlign},
    memory_cases=("boxes",),
    start_cases=("boxes",),
)
