"""The contenders of deform_conv: numdcn's own, and the list of all."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from benchmarks.contender import Contender
from benchmarks.deform_conv import Case, Inputs


class Numdcn(Contender):
    """numdcn with plain weights and fresh results."""

    module = "numdcn"
    directions: tuple[str, ...] = ("forward", "backward")

    def start(self) -> None:
        import numdcn

        self.numdcn = numdcn
        numdcn.set_num_threads(self.threads)

    def load(self, case: Case, w: np.ndarray) -> None:
        self.w = w
        self.geometry: dict[str, Any] = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}

    def forward(self, given: Inputs) -> np.ndarray:
        return self.numdcn.deform_conv_forward(given.x, given.offsets, self.w, mask=given.mask, **self.geometry)

    def backward(self, given: Inputs) -> Any:
        assert given.grad_y is not None
        return self.numdcn.deform_conv_backward(
            given.grad_y, given.x, given.offsets, self.w, mask=given.mask, **self.geometry
        )

    def gradients(self, grads: Any) -> dict[str, np.ndarray]:
        return {name: value for name, value in grads._asdict().items() if value is not None}


class NumdcnPrepared(Numdcn):
    """numdcn with weights prepared once and y filled in place, as an inference engine works."""

    directions = ("forward",)
    parts = ("times", "memory")

    def load(self, case: Case, w: np.ndarray) -> None:
        super().load(case, w)
        self.w = self.numdcn.prepare_weights(w, groups=case.groups)
        self.y = np.zeros(case.shapes["y"], w.dtype)
        self.y.fill(0)  # touches the pages

    def forward(self, given: Inputs) -> np.ndarray:
        x, offsets, mask, _ = given
        return self.numdcn.deform_conv_forward(x, offsets, self.w, mask=mask, out=self.y, **self.geometry)

    def y_bytes(self) -> int:
        return self.y.nbytes


class NumdcnFloat64(Numdcn):
    """numdcn in float64."""

    dtype = "float64"
    parts = ("times",)


# name in tables and on the command line -> module of this folder, class
CONTENDERS = {
    "numdcn": ("contenders", "Numdcn"),
    "numdcn-prepared": ("contenders", "NumdcnPrepared"),
    "numdcn-float64": ("contenders", "NumdcnFloat64"),
    "onnxruntime": ("engines", "OnnxRuntime"),
    "openvino": ("engines", "OpenVino"),
    "ncnn": ("engines", "Ncnn"),
    "paddle": ("frameworks", "Paddle"),
    "torchvision": ("frameworks", "Torchvision"),
    "conv2d": ("frameworks", "TorchConv2d"),
}
ENGINES = ("onnxruntime", "openvino", "ncnn")
FLOOR = "conv2d"


def contender_class(name: str) -> type[Contender]:
    """The class of a contender of deform_conv; imports this folder's module only, not the library."""
    module, attribute = CONTENDERS[name]
    return getattr(importlib.import_module(f"benchmarks.{module}"), attribute)
