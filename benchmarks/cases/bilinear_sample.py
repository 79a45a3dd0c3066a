"""Bilinear samples at arbitrary points, zero outside: against grid_sample with align_corners and precomputed grids."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases.interface import Operator, Target, generator, normal, relative_error
from benchmarks.cases.roi import cell_indices
from benchmarks.rivals.contender import NumdcnOperator, Reuse
from benchmarks.rivals.engines import OnnxRuntime, OpenVino
from benchmarks.rivals.frameworks import Torch


class SampleCase(NamedTuple):
    """x (n, c, h, w), with one point for every pixel of each image -> y (n, c, h, w)."""

    name: str
    n: int
    c: int
    h: int
    w: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        image = self.n, self.c, self.h, self.w
        return {"x": image, "points": (self.n, self.h, self.w, 2), "y": image}

    @property
    def differentiable(self) -> tuple[str, ...]:
        return "x", "points"

    @property
    def text(self) -> str:
        return f"{self.n},{self.c},{self.h},{self.w}, a point a pixel"

    @property
    def grid_unit(self) -> np.ndarray:
        """One pixel in units of a grid, along x and y."""
        return 2 / (np.array([self.w, self.h]) - 1.0)


class SampleInputs(NamedTuple):
    """The arrays of a call; grad_y only for a backward."""

    x: np.ndarray  # (n, c, h, w)
    points: np.ndarray  # (n, h, w, 2): y, x in pixels
    grad_y: np.ndarray | None  # (n, c, h, w)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self if a is not None)


def grid_of(case: SampleCase, inputs: SampleInputs) -> np.ndarray:
    """The points in the form grid_sample with align_corners expects: x, y in -1 to 1."""
    grid = inputs.points[..., ::-1].astype(np.float64) * case.grid_unit - 1
    return grid.astype(inputs.points.dtype)


class Numdcn(NumdcnOperator):
    """numdcn with newly allocated results."""

    operator = "bilinear_sample"

    def arguments(self, inputs: SampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (inputs.x, inputs.points), {}


class NumdcnOut(Reuse, Numdcn):
    """numdcn with results filled in place."""


class TorchGridSample(Torch):
    """torch's grid_sample, called without autograd."""

    module = "torch"

    def load(self, case: SampleCase, w: Any) -> None:
        self.case = case
        self.parameters = (0, 0, True)  # bilinear, zeros, align_corners

    def convert(self, inputs: SampleInputs) -> Any:
        arrays = [inputs.x, grid_of(self.case, inputs)]
        arrays = arrays if inputs.grad_y is None else [inputs.grad_y, *arrays]
        return [self.torch.from_numpy(a) for a in arrays]

    def forward(self, given: Any) -> Any:
        return self.torch.grid_sampler_2d(*given, *self.parameters)

    def backward(self, given: Any) -> Any:
        return self.torch.ops.aten.grid_sampler_2d_backward(*given, *self.parameters, [True, True])

    def gradients(self, grads: Any) -> dict[str, np.ndarray]:
        x, grid = (a.numpy() for a in grads)
        return {"x": x, "points": (grid * self.case.grid_unit)[..., ::-1]}


class OnnxGridSample(OnnxRuntime):
    """onnxruntime's GridSample."""

    def load(self, case: SampleCase, w: Any) -> None:
        self.case = case
        parameters = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": 1}
        node = self.onnx.helper.make_node("GridSample", ["x", "grid"], ["y"], **parameters)
        self.build(node, {"x": case.shapes["x"], "grid": case.shapes["points"]}, case.shapes["y"], 16)

    def arrays(self, inputs: SampleInputs) -> dict[str, np.ndarray]:
        return {"x": inputs.x, "grid": grid_of(self.case, inputs)}


class OpenVinoGridSample(OpenVino):
    """OpenVINO's GridSample."""

    def load(self, case: SampleCase, w: Any) -> None:
        self.case = case
        x, grid = (self.ops.parameter(case.shapes[name], np.float32) for name in ("x", "points"))
        parameters = {"align_corners": True, "mode": "bilinear", "padding_mode": "zeros"}
        self.build(self.ops.grid_sample(x, grid, parameters), [x, grid], case.shapes["y"])

    def arrays(self, inputs: SampleInputs) -> list[np.ndarray]:
        return [inputs.x, grid_of(self.case, inputs)]


class BilinearSample(Operator):
    """One point for every pixel, somewhere near it."""

    def make_inputs(self, case: SampleCase, seed: int, dtype: str, backward: bool) -> SampleInputs:
        """Points lie on odd multiples of 1/512 of a pixel, so that rounding a grid moves none to another cell."""
        rng, shapes = generator(case, seed), case.shapes
        moves = np.round(rng.normal(0, 2 * 256, shapes["points"])) / 256 + 1 / 512
        points = cell_indices(case.h, case.w) + moves
        grad_y = normal(rng, shapes["y"], dtype) if backward else None
        return SampleInputs(normal(rng, shapes["x"], dtype), points.astype(dtype), grad_y)

    def corners(self, case: SampleCase, points: np.ndarray) -> Any:
        """For each of four corners: whether it is inside, its row and column, weights and their signs along y and x."""
        y, x = points[..., 0].astype(np.float64), points[..., 1].astype(np.float64)
        low_y, low_x = np.floor(y).astype(int), np.floor(x).astype(int)
        for a, b in np.ndindex(2, 2):
            row, column = low_y + a, low_x + b
            inside = (row >= 0) & (row < case.h) & (column >= 0) & (column < case.w)
            weight_y, weight_x = np.abs(1 - a - (y - low_y)), np.abs(1 - b - (x - low_x))
            yield (
                inside,
                np.where(inside, row, 0),
                np.where(inside, column, 0),
                weight_y,
                weight_x,
                2 * a - 1,
                2 * b - 1,
            )

    def checked(self, case: SampleCase) -> list[tuple[int, int]]:
        """Some channels of the first and the last image."""
        return [(n, c) for n in sorted({0, case.n - 1}) for c in sorted({0, case.c // 3, case.c - 1})]

    def forward_error(self, case: SampleCase, inputs: SampleInputs, w: Any, y: np.ndarray) -> float:
        if tuple(y.shape) != case.shapes["y"]:
            return float("inf")
        want = np.zeros((len(self.checked(case)), case.h, case.w))
        for k, (n, c) in enumerate(self.checked(case)):
            for inside, row, column, weight_y, weight_x, _, _ in self.corners(case, inputs.points[n]):
                want[k] += inside * weight_y * weight_x * inputs.x[n, c, row, column]
        return relative_error(np.array([y[n, c] for n, c in self.checked(case)]), want)

    def backward_errors(
        self, case: SampleCase, inputs: SampleInputs, w: Any, grads: dict[str, np.ndarray], names: tuple[str, ...]
    ) -> dict[str, float]:
        bad = [name for name in names if name not in grads or tuple(grads[name].shape) != case.shapes[name]]
        if bad:
            return dict.fromkeys(bad, float("inf"))
        assert inputs.grad_y is not None
        want = np.zeros((len(self.checked(case)), case.h * case.w))
        for k, (n, c) in enumerate(self.checked(case)):
            for inside, row, column, weight_y, weight_x, _, _ in self.corners(case, inputs.points[n]):
                shares = inside * weight_y * weight_x * inputs.grad_y[n, c]
                want[k] += np.bincount((row * case.w + column).ravel(), shares.ravel(), case.h * case.w)
        got = np.array([grads["x"][n, c].ravel() for n, c in self.checked(case)])
        return {"x": relative_error(got, want), "points": self.points_error(case, inputs, grads["points"])}

    def points_error(self, case: SampleCase, inputs: SampleInputs, grad: np.ndarray, count: int = 500) -> float:
        """Relative error of the gradient of some points."""
        assert inputs.grad_y is not None
        rng = np.random.default_rng(1)
        n, i, j = (rng.integers(size, size=count) for size in (case.n, case.h, case.w))
        grad_y, want = inputs.grad_y[n, :, i, j].astype(np.float64), np.zeros((count, 2))
        for inside, row, column, weight_y, weight_x, sign_y, sign_x in self.corners(case, inputs.points[n, i, j]):
            product = inside * np.sum(grad_y * inputs.x[n, :, row, column], axis=1)
            want += np.stack([sign_y * weight_x * product, sign_x * weight_y * product], axis=1)
        return relative_error(grad[n, i, j], want)

    def tiny(self, case: SampleCase) -> SampleCase:
        return case._replace(n=1, c=16, h=9, w=9)


OPERATOR = BilinearSample(
    "bilinear_sample",
    "points displaced by N(0, 2) pixels, x N(0, 1)",
    (SampleCase("N1", 1, 64, 256, 256), SampleCase("N8", 8, 256, 64, 64)),
    {
        "numdcn": Numdcn,
        "numdcn-out": NumdcnOut,
        "grid_sample": TorchGridSample,
        "onnxruntime": OnnxGridSample,
        "openvino": OpenVinoGridSample,
    },
    (Target("forward", "fastest", 1), Target("backward", "grid_sample", 1)),
    memory_cases=("N1", "N8"),
    start_cases=("N1",),
)
