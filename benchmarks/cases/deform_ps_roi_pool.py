"""Deformable position-sensitive RoI pooling: bins with channels of their own, moved by trans."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cases.interface import Target
from benchmarks.cases.ps_roi_pool import round_away
from benchmarks.cases.roi import INPUTS_TEXT, Bins, RoiCase, RoiInputs, RoiOperator, cell_indices, sampled_bins
from benchmarks.rivals.contender import NumdcnOperator, Reuse
from benchmarks.rivals.engines import OpenVino

SAMPLES = 4  # along a bin's side
TRANS_STD = 0.1


class Numdcn(NumdcnOperator):
    """numdcn with newly allocated results."""

    operator = "deform_ps_roi_pool"

    def arguments(self, inputs: RoiInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        case = self.case
        keywords = {
            "output_size": case.bins,
            "group_size": case.bins,
            "sample_per_part": SAMPLES,
            "trans_std": TRANS_STD,
            "spatial_scale": case.scale,
        }
        return (inputs.x, inputs.rois, inputs.moves), keywords


class NumdcnOut(Reuse, Numdcn):
    """numdcn with results filled in place."""


class OpenVinoDeformable(OpenVino):
    """OpenVINO's DeformablePSROIPooling."""

    def load(self, case: RoiCase, w: Any) -> None:
        x, rois, trans = (self.ops.parameter(case.shapes[name], np.float32) for name in ("x", "rois", "moves"))
        node = self.ops.deformable_psroi_pooling(
            x,
            rois,
            case.c_out,
            case.scale,
            case.bins,
            "bilinear_deformable",
            SAMPLES,
            SAMPLES,
            TRANS_STD,
            case.bins,
            trans,
        )
        self.build(node, [x, rois, trans], case.shapes["y"])

    def arrays(self, inputs: RoiInputs) -> list[np.ndarray]:
        assert inputs.moves is not None
        return [inputs.x, inputs.rois, inputs.moves]


class DeformPsRoiPool(RoiOperator):
    """Bins whose samples start at their corner, moved."""

    def geometry(self, case: RoiCase, rois: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First corner and size of each box in pixels of x, (boxes, 2) each, along y and x."""
        corners = round_away(rois[:, 1:])
        start = corners[:, [1, 0]] * case.scale - 0.5
        return start, np.maximum((corners[:, [3, 2]] + 1) * case.scale - 0.5 - start, 0.1)

    def unit(self, case: RoiCase, inputs: RoiInputs) -> np.ndarray:
        return TRANS_STD * self.geometry(case, inputs.rois)[1]

    def bins(self, case: RoiCase, inputs: RoiInputs) -> Bins:
        assert inputs.moves is not None
        start, size = self.geometry(case, inputs.rois)
        moves = np.moveaxis(inputs.moves[:, ::-1].astype(np.float64), 1, -1)  # (boxes, bins, bins, 2) along y and x
        cells = cell_indices(case.bins, case.bins)
        first = start[:, None, None] + cells * (size / case.bins)[:, None, None]
        first = first + moves * self.unit(case, inputs)[:, None, None]
        count = np.full(size.shape, SAMPLES)
        return sampled_bins(case, first, size / case.bins / SAMPLES, count, 0.5, True)


OPERATOR = DeformPsRoiPool(
    "deform_ps_roi_pool",
    INPUTS_TEXT + f"; trans N(0, 1), trans_std {TRANS_STD}",
    (RoiCase("boxes", c=490, position_sensitive=True, deformed="trans"),),
    {"numdcn": Numdcn, "numdcn-out": NumdcnOut, "openvino": OpenVinoDeformable},
    (Target("forward", "fastest", 1),),
    memory_cases=("boxes",),
    start_cases=("boxes",),
)
