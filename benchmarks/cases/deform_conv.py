"""Deformable convolution: numdcn's contenders and the list of all of them; layers.py has the cases and the
reference."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cases import layers
from benchmarks.cases.interface import Operator
from benchmarks.rivals.contender import Contender
from benchmarks.rivals.engines import ENGINES
from benchmarks.rivals.frameworks import Paddle, TorchConv2d, Torchvision
from benchmarks.rivals.layer import Case, Inputs

FLOOR = "conv2d"  # the plain convolution of the layer


class Numdcn(Contender):
    """numdcn with plain weights and newly allocated results."""

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
    """numdcn with weights prepared once and y filled in place, as in an inference engine."""

    directions = ("forward",)
    measurements = ("times", "memory")

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
    measurements = ("times",)


class DeformConv(Operator):
    """The layers as they are, with offsets and masks."""

    def make_weights(self, case: Case, dtype: str) -> np.ndarray:
        return layers.make_weights(case, dtype)

    def make_inputs(self, case: Case, seed: int, dtype: str, backward: bool) -> Inputs:
        return layers.make_inputs(case, seed, dtype, backward)

    def forward_error(self, case: Case, inputs: Inputs, w: Any, y: np.ndarray) -> float:
        return layers.forward_error(case, inputs, w, y)

    def backward_errors(
        self, case: Case, inputs: Inputs, w: Any, grads: dict[str, np.ndarray], names: tuple[str, ...]
    ) -> dict[str, float]:
        return layers.backward_errors(case, inputs, w, grads, names)

    def plain(self, case: Case, inputs: Inputs) -> tuple[Case, Inputs, tuple[str, ...]]:
        """A plain convolution is one with zero offsets."""
        case = case._replace(mask=False, offset_groups=1)
        return case, inputs._replace(offsets=np.zeros(case.shapes["offsets"], np.float32), mask=None), ("x", "w")

    def tiny(self, case: Case) -> Case:
        return layers.tiny(case)


OPERATOR = DeformConv(
    "deform_conv",
    "offsets N(0, 2)",
    layers.CASES.values(),
    {
        "numdcn": Numdcn,
        "numdcn-prepared": NumdcnPrepared,
        "numdcn-float64": NumdcnFloat64,
        **ENGINES,
        "paddle": Paddle,
        "torchvision": Torchvision,
        FLOOR: TorchConv2d,
    },
    memory_cases=("S1", "S4", "S5a", "large"),
    start_cases=("S4", "S7", "S8"),
    compared=False,  # rounding may move a sample to another cell, with another slope
)
