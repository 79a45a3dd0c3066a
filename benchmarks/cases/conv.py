"""The plain convolution, against torch's (oneDNN) on channels-last tensors, its preferred layout; numdcn's arrays
are not."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cases import layers
from benchmarks.cases.interface import Operator, Target, generator, normal
from benchmarks.rivals.contender import NumdcnOperator, Reuse
from benchmarks.rivals.frameworks import TorchConv2d
from benchmarks.rivals.layer import Case, Inputs


class Numdcn(NumdcnOperator):
    """numdcn with plain weights and newly allocated results."""

    operator = "conv"

    def arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        case = self.case
        geometry = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
        return (inputs.x, self.w), geometry


class NumdcnPrepared(Reuse, Numdcn):
    """numdcn with weights prepared once and y filled in place, as in an inference engine."""

    directions = ("forward",)

    def load(self, case: Any, w: Any) -> None:
        super().load(case, w)
        self.w = self.numdcn.prepare_weights(w, groups=case.groups)


class TorchConv(TorchConv2d):
    """torch's conv2d, here as the rival."""

    plain = False


class Conv(Operator):
    """The layers of the deformable convolution, without offsets."""

    def make_weights(self, case: Case, dtype: str) -> np.ndarray:
        return layers.make_weights(case, dtype)

    def make_inputs(self, case: Case, seed: int, dtype: str, backward: bool) -> Inputs:
        rng = generator(case, seed)
        grad_y = normal(rng, case.shapes["y"], dtype) if backward else None
        return Inputs(normal(rng, case.shapes["x"], dtype), np.empty(0, dtype), None, grad_y)

    def still(self, case: Case, inputs: Inputs) -> Inputs:
        """The inputs of the equivalent deformable convolution."""
        return inputs._replace(offsets=np.zeros(case.shapes["offsets"], inputs.x.dtype))

    def forward_error(self, case: Case, inputs: Inputs, w: Any, y: np.ndarray) -> float:
        return layers.forward_error(case, self.still(case, inputs), w, y)

    def backward_errors(
        self, case: Case, inputs: Inputs, w: Any, grads: dict[str, np.ndarray], names: tuple[str, ...]
    ) -> dict[str, float]:
        return layers.backward_errors(case, self.still(case, inputs), w, grads, ("x", "w"))

    def tiny(self, case: Case) -> Case:
        return layers.tiny(case)


OPERATOR = Conv(
    "conv",
    "x N(0, 1)",
    [layers.CASES[name] for name in ("S1", "S2", "S3", "S4")],
    {"numdcn": Numdcn, "numdcn-prepared": NumdcnPrepared, "conv2d": TorchConv},
    (Target("forward", "conv2d", 1.3, False), Target("backward", "conv2d", 1.3, False)),
    memory_cases=("S4",),
    start_cases=("S4",),
)
