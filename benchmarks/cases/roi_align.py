"""RoI align: each bin is the mean of bilinear samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cases.interface import Target
from benchmarks.cases.roi import INPUTS_TEXT, RoiCase, RoiInputs, RoiOperator, TorchvisionRoi
from benchmarks.rivals.contender import NumdcnOperator, Reuse
from benchmarks.rivals.engines import OnnxRuntime, OpenVino


class Numdcn(NumdcnOperator):
    """numdcn with newly allocated results."""

    operator = "roi_align"

    def arguments(self, inputs: RoiInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        case = self.case
        return (inputs.x, inputs.rois, case.bins, case.scale, case.sampling, case.aligned), {}


class NumdcnOut(Reuse, Numdcn):
    """numdcn with results filled in place."""


class TorchvisionAlign(TorchvisionRoi):
    """torchvision's roi_align."""

    def forward(self, given: Any) -> Any:
        return self.ops.roi_align(*given, self.case.scale, *self.size, self.case.sampling, self.case.aligned)

    def backward(self, given: Any) -> Any:
        grad_y, rois, _, shape = given
        parameters = (self.case.scale, *self.size, *shape, self.case.sampling, self.case.aligned)
        return self.ops._roi_align_backward(grad_y, rois, *parameters)


class OnnxAlign(OnnxRuntime):
    """onnxruntime's RoiAlign."""

    def load(self, case: RoiCase, w: Any) -> None:
        node = self.onnx.helper.make_node(
            "RoiAlign",
            ["x", "boxes", "images"],
            ["y"],
            coordinate_transformation_mode="half_pixel" if case.aligned else "output_half_pixel",
            output_height=case.bins,
            output_width=case.bins,
            sampling_ratio=max(0, case.sampling),
            spatial_scale=case.scale,
        )
        self.images = np.zeros(case.boxes, np.int64)
        self.build(
            node, {"x": case.shapes["x"], "boxes": (case.boxes, 4)}, case.shapes["y"], 16, {"images": self.images}
        )

    def arrays(self, inputs: RoiInputs) -> dict[str, np.ndarray]:
        return {"x": inputs.x, "boxes": np.ascontiguousarray(inputs.rois[:, 1:])}


class OpenVinoAlign(OpenVino):
    """OpenVINO's ROIAlign."""

    def load(self, case: RoiCase, w: Any) -> None:
        x, boxes = (self.ops.parameter(shape, np.float32) for shape in (case.shapes["x"], (case.boxes, 4)))
        images = self.ops.constant(np.zeros(case.boxes, np.int32))
        mode = "half_pixel_for_nn" if case.aligned else "asymmetric"
        sampling = max(0, case.sampling)
        node = self.ops.roi_align(x, boxes, images, case.bins, case.bins, sampling, case.scale, "avg", mode)
        self.build(node, [x, boxes], case.shapes["y"])

    def arrays(self, inputs: RoiInputs) -> list[np.ndarray]:
        return [inputs.x, np.ascontiguousarray(inputs.rois[:, 1:])]


OPERATOR = RoiOperator(
    "roi_align",
    INPUTS_TEXT,
    (RoiCase("adaptive"), RoiCase("two", sampling=2, aligned=False)),
    {
        "numdcn": Numdcn,
        "numdcn-out": NumdcnOut,
        "torchvision": TorchvisionAlign,
        "onnxruntime": OnnxAlign,
        "openvino": OpenVinoAlign,
    },
    (Target("forward", "fastest", 1), Target("backward", "torchvision", 3)),
    memory_cases=("adaptive",),
    start_cases=("adaptive",),
)
