"""Position-sensitive RoI align: each bin samples its own channels."""

from __future__ import annotations

from typing import Any

from benchmarks.cases.interface import Target
from benchmarks.cases.roi import INPUTS_TEXT, RoiCase, RoiInputs, RoiOperator, TorchvisionRoi
from benchmarks.rivals.contender import NumdcnOperator, Reuse


class Numdcn(NumdcnOperator):
    """numdcn with newly allocated results."""

    operator = "ps_roi_align"

    def arguments(self, inputs: RoiInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (inputs.x, inputs.rois, self.case.bins, self.case.scale, self.case.sampling), {}


class NumdcnOut(Reuse, Numdcn):
    """numdcn with results filled in place."""


class TorchvisionPsAlign(TorchvisionRoi):
    """torchvision's ps_roi_align."""

    def forward(self, given: Any) -> Any:
        return self.ops.ps_roi_align(*given, self.case.scale, *self.size, self.case.sampling)

    def backward(self, given: Any) -> Any:
        grad_y, rois, channels, shape = given
        parameters = (self.case.scale, *self.size, self.case.sampling, *shape)
        return self.ops._ps_roi_align_backward(grad_y, rois, channels, *parameters)


OPERATOR = RoiOperator(
    "ps_roi_align",
    INPUTS_TEXT,
    (
        RoiCase("adaptive", c=490, position_sensitive=True),
        RoiCase("two", c=490, position_sensitive=True, sampling=2),
    ),
    {"numdcn": Numdcn, "numdcn-out": NumdcnOut, "torchvision": TorchvisionPsAlign},
    (Target("forward", "fastest", 1), Target("backward", "torchvision", 3)),
    memory_cases=("adaptive",),
    start_cases=("adaptive",),
)
