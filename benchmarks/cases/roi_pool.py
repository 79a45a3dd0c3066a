"""RoI pooling: each bin is the maximum of its pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cases.interface import Target, relative_error
from benchmarks.cases.ps_roi_pool import PixelBins
from benchmarks.cases.roi import INPUTS_TEXT, RoiCase, RoiInputs, TorchvisionRoi, checked_channels
from benchmarks.rivals.contender import Call, NumdcnOperator, Reuse
from benchmarks.rivals.engines import OnnxRuntime


class Numdcn(NumdcnOperator):
    """numdcn with newly allocated results; the backward gets the positions of the maxima, which the forward can
    return."""

    operator = "roi_pool"

    def arguments(self, inputs: RoiInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (inputs.x, inputs.rois, self.case.bins, self.case.scale), {}

    def convert(self, inputs: RoiInputs) -> Call:
        call = super().convert(inputs._replace(grad_y=None))
        if inputs.grad_y is None:
            return call
        call.keywords.pop("out", None)
        argmax = call.forward(lambda *a, **k: self.functions["forward"](*a, return_argmax=True, **k)).argmax
        call = Call(call.positional, {"argmax": argmax}, inputs.grad_y)
        if self.reuse:
            call.keywords["out"] = self.backward(call)
        return call


class NumdcnOut(Reuse, Numdcn):
    """numdcn with results filled in place."""


class NumdcnArgmax(Numdcn):
    """numdcn's forward that also returns the positions of the maxima, as training needs and torchvision always does."""

    directions = ("forward",)
    measurements = ("times",)

    def forward(self, given: Call) -> Any:
        return self.functions["forward"](*given.positional, return_argmax=True)

    def result(self, y: Any) -> np.ndarray:
        return y.y


class TorchvisionPool(TorchvisionRoi):
    """torchvision's roi_pool."""

    def forward(self, given: Any) -> Any:
        return self.ops.roi_pool(*given, self.case.scale, *self.size)

    def backward(self, given: Any) -> Any:
        grad_y, rois, argmax, shape = given
        return self.ops._roi_pool_backward(grad_y, rois, argmax, self.case.scale, *self.size, *shape)


class OnnxMaxPool(OnnxRuntime):
    """onnxruntime's MaxRoiPool."""

    def load(self, case: RoiCase, w: Any) -> None:
        parameters = {"pooled_shape": [case.bins] * 2, "spatial_scale": case.scale}
        node = self.onnx.helper.make_node("MaxRoiPool", ["x", "rois"], ["y"], **parameters)
        self.build(node, {name: case.shapes[name] for name in ("x", "rois")}, case.shapes["y"], 16)

    def arrays(self, inputs: RoiInputs) -> dict[str, np.ndarray]:
        return {"x": inputs.x, "rois": inputs.rois}


class RoiPool(PixelBins):
    """Bins that are maxima."""

    extra = 1

    def maxima(self, case: RoiCase, inputs: RoiInputs) -> tuple[np.ndarray, np.ndarray]:
        """Maxima and their positions in the image, -1 for an empty bin: (boxes, checked channels, bins, bins) each."""
        (top, bottom), (left, right) = self.edges(case, inputs.rois)
        image = inputs.x[0, checked_channels(case)]
        shape = (case.boxes, len(image), case.bins, case.bins)
        value, place = np.zeros(shape, inputs.x.dtype), np.full(shape, -1)
        for r, i, j in np.ndindex(case.boxes, case.bins, case.bins):
            pixels = image[:, top[r, i] : bottom[r, i], left[r, j] : right[r, j]]
            if pixels.size:
                row, column = np.divmod(pixels.reshape(len(image), -1).argmax(1), pixels.shape[2])
                place[r, :, i, j] = (top[r, i] + row) * case.w + left[r, j] + column
                value[r, :, i, j] = pixels[np.arange(len(image)), row, column]
        return value, place

    def forward_error(self, case: RoiCase, inputs: RoiInputs, w: Any, y: np.ndarray) -> float:
        if tuple(y.shape) != case.shapes["y"]:
            return float("inf")
        return relative_error(y[:, checked_channels(case)], self.maxima(case, inputs)[0])

    def backward_errors(
        self, case: RoiCase, inputs: RoiInputs, w: Any, grads: dict[str, np.ndarray], names: tuple[str, ...]
    ) -> dict[str, float]:
        got = grads.get("x")
        if got is None or tuple(got.shape) != case.shapes["x"]:
            return {"x": float("inf")}
        assert inputs.grad_y is not None
        place, channels = self.maxima(case, inputs)[1], checked_channels(case)
        want = np.zeros((len(channels), case.h * case.w))
        for k, c in enumerate(channels):
            at, grad_y = place[:, k].ravel(), inputs.grad_y[:, c].astype(np.float64).ravel()
            want[k] = np.bincount(at[at >= 0], grad_y[at >= 0], case.h * case.w)
        return {"x": relative_error(got[0, channels], want.reshape(-1, case.h, case.w))}


OPERATOR = RoiPool(
    "roi_pool",
    INPUTS_TEXT,
    (RoiCase("boxes"),),
    {
        "numdcn": Numdcn,
        "numdcn-out": NumdcnOut,
        "numdcn-argmax": NumdcnArgmax,
        "torchvision": TorchvisionPool,
        "onnxruntime": OnnxMaxPool,
    },
    (Target("forward", "fastest", 1), Target("backward", "torchvision", 3)),
    memory_cases=("boxes",),
    start_cases=("boxes",),
)
