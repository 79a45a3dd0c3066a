"""Shared by the benchmarks of ms_deform_attn, dcnv3 and dcnv4: their arrays as weighted samples of channels-last images,
the float64 reference, and the composition of grid_sample that others compute.

The composition is written once, over a few operations that torch and a graph of ONNX both have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases.interface import Operator, generator, normal, relative_error
from benchmarks.rivals.contender import Contender, NumdcnOperator, Reuse
from benchmarks.rivals.engines import OnnxRuntime, OpenVino, onnx_model
from benchmarks.rivals.frameworks import Torch

OPSET = 16  # the first with GridSample
STEP = 256  # parts of a pixel: points lie halfway between, so that rounding a grid moves none to another cell


class Layout(NamedTuple):
    """The sizes of a case."""

    batch: int
    queries: int
    heads: int
    depth: int  # channels of a head
    levels: tuple[tuple[int, int], ...]
    points: int  # of a level

    @property
    def pixels(self) -> int:
        return sum(height * width for height, width in self.levels)

    @property
    def rows(self) -> tuple[int, int, int, int]:
        """Batch, queries, heads, points of a query and head."""
        return self.batch, self.queries, self.heads, len(self.levels) * self.points

    @property
    def of_points(self) -> Iterator[tuple[int, int, int]]:
        """Of each point of a query and head: the pixels before its level, height and width."""
        start = 0
        for height, width in self.levels:
            yield from [(start, height, width)] * self.points
            start += height * width


class Seen(NamedTuple):
    """The arrays of a case in one form; rows are batch, queries, heads, points."""

    value: np.ndarray  # (batch, pixels, heads, depth)
    positions: np.ndarray  # (*rows, 2), float64, in pixels, y first
    weights: np.ndarray  # rows


class WeightedInputs(NamedTuple):
    """The arrays of a call, in order; grad_y only for a backward."""

    arrays: tuple[np.ndarray, ...]
    grad_y: np.ndarray | None

    @property
    def x(self) -> np.ndarray:
        """The images."""
        return self.arrays[0]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.arrays, self.grad_y) if a is not None)


def jittered(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """N(0, deviation) pixels, rounded to odd multiples of half a step."""
    return np.round(rng.normal(0, deviation * STEP, shape)) / STEP + 0.5 / STEP


# The composition.


class TorchOperations:
    """What the composition needs, computed at once, for one case. Constants are float32 on the CPU, or of the type of
    `like` and where it is."""

    def __init__(self, torch: Any, like: Any = None) -> None:
        self.torch = torch
        self.like = torch.zeros((), dtype=torch.float32) if like is None else like
        self.constants: dict[str, Any] = {}

    def constant(self, name: str, make: Callable[[], np.ndarray]) -> Any:
        """What `make` returns; it is made once."""
        if name not in self.constants:
            self.constants[name] = self.torch.from_numpy(make()).to(self.like)
        return self.constants[name]

    def transpose(self, a: Any, *axes: int) -> Any:
        return a.permute(axes)

    def reshape(self, a: Any, *shape: int) -> Any:
        return a.reshape(shape)

    def slice(self, a: Any, axis: int, start: int, end: int) -> Any:
        return a.narrow(axis, start, end - start)

    def multiply(self, a: Any, b: Any) -> Any:
        return a * b

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def join(self, parts: list[Any], axis: int) -> Any:
        return self.torch.cat(parts, axis)

    def sum_last(self, a: Any) -> Any:
        return a.sum(-1)

    def grid_sample(self, image: Any, grid: Any) -> Any:
        return self.torch.nn.functional.grid_sample(image, grid, align_corners=False)


class GraphOperations:
    """The same as nodes of an ONNX graph; a value is its name."""

    def __init__(self, onnx: Any) -> None:
        self.onnx, self.nodes, self.constants = onnx, [], {}  # type: ignore[var-annotated]

    def constant(self, name: str, make: Callable[[], np.ndarray], dtype: Any = np.float32) -> str:
        self.constants[name] = make().astype(dtype)
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def numbers(self, *values: int) -> str:
        return self.constant(f"c{len(self.constants)}", lambda: np.array(values), np.int64)

    def transpose(self, a: str, *axes: int) -> str:
        return self.node("Transpose", a, perm=axes)

    def reshape(self, a: str, *shape: int) -> str:
        return self.node("Reshape", a, self.numbers(*shape))

    def slice(self, a: str, axis: int, start: int, end: int) -> str:
        return self.node("Slice", a, self.numbers(start), self.numbers(end), self.numbers(axis))

    def multiply(self, a: str, b: str) -> str:
        return self.node("Mul", a, b)

    def add(self, a: str, b: str) -> str:
        return self.node("Add", a, b)

    def join(self, parts: list[str], axis: int) -> str:
        return self.node("Concat", *parts, axis=axis)

    def sum_last(self, a: str) -> str:
        return self.node("ReduceSum", a, self.numbers(-1), keepdims=0)

    def grid_sample(self, image: str, grid: str) -> str:
        return self.node("GridSample", image, grid, mode="bilinear", padding_mode="zeros", align_corners=0)

    def model(self, case: Any, y: str) -> Any:
        """The model of a case, whose result is y."""
        self.nodes.append(self.onnx.helper.make_node("Identity", [y], ["y"]))
        shapes = {name: case.shapes[name] for name in case.differentiable}
        return onnx_model(self.onnx, self.nodes, shapes, case.shapes["y"], OPSET, self.constants)


def composed(ops: Any, layout: Layout, value: Any, grid: Any, weights: Any) -> Any:
    """y (batch, queries, heads*depth) of value (batch, pixels, heads, depth), a grid (*rows, 2) of x and y from -1 to 1
    and weights (rows): a grid_sample for each level, heads in its batch."""
    n, q, m, t = layout.rows
    images, start, samples = ops.transpose(value, 0, 2, 3, 1), 0, []
    grid, weights = ops.transpose(grid, 0, 2, 1, 3, 4), ops.transpose(weights, 0, 2, 1, 3)
    for level, (height, width) in enumerate(layout.levels):
        image = ops.slice(images, 3, start, start + height * width)
        start += height * width
        here = ops.slice(grid, 3, level * layout.points, (level + 1) * layout.points)
        samples.append(
            ops.grid_sample(
                ops.reshape(image, n * m, layout.depth, height, width), ops.reshape(here, n * m, q, layout.points, 2)
            )
        )
    weighted = ops.multiply(ops.join(samples, 3), ops.reshape(weights, n * m, 1, q, t))
    return ops.transpose(ops.reshape(ops.sum_last(weighted), n, m * layout.depth, q), 0, 2, 1)


class TorchComposition(Torch):
    """torch's composition. Its backward is that of a graph recorded beforehand, not timed."""

    module = "torch"

    def load(self, case: Any, w: Any) -> None:
        self.case, self.ops = case, TorchOperations(self.torch)

    def convert(self, inputs: WeightedInputs) -> Any:
        given = [self.torch.from_numpy(a) for a in inputs.arrays]
        if inputs.grad_y is None:
            return given
        with self.torch.enable_grad():
            given = [a.requires_grad_() for a in given]
            y = self.case.compose(self.ops, *given)
        return y, given, self.torch.from_numpy(inputs.grad_y)

    def forward(self, given: Any) -> Any:
        return self.case.compose(self.ops, *given)

    def backward(self, given: Any) -> Any:
        y, arrays, grad_y = given
        return self.torch.autograd.grad(y, arrays, grad_y, retain_graph=True)

    def gradients(self, grads: Any) -> dict[str, np.ndarray]:
        return {name: a.numpy() for name, a in zip(self.case.differentiable, grads, strict=True)}


class OnnxComposition(OnnxRuntime):
    """onnxruntime's, of one graph."""

    def load(self, case: Any, w: Any) -> None:
        self.case, ops = case, GraphOperations(self.onnx)
        self.open(ops.model(case, case.compose(ops, *case.differentiable)), case.shapes["y"])

    def arrays(self, inputs: WeightedInputs) -> dict[str, np.ndarray]:
        return dict(zip(self.case.differentiable, inputs.arrays, strict=True))


class OpenVinoComposition(OpenVino):
    """OpenVINO's, of the same graph."""

    def start(self) -> None:
        super().start()
        import onnx  # builds the graph

        self.onnx = onnx

    def load(self, case: Any, w: Any) -> None:
        ops = GraphOperations(self.onnx)
        model = ops.model(case, case.compose(ops, *case.differentiable)).SerializeToString()
        self.open(self.core.read_model(model, b""), case.shapes["y"])

    def arrays(self, inputs: WeightedInputs) -> list[np.ndarray]:
        return list(inputs.arrays)


class Numdcn(NumdcnOperator):
    """numdcn with newly allocated results."""

    def arguments(self, inputs: WeightedInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {**dict(zip(self.case.differentiable, inputs.arrays, strict=True)), **self.case.options}


def contenders(name: str) -> dict[str, type[Contender]]:
    """Those of an operator."""
    own = type("Numdcn", (Numdcn,), {"operator": name, "__doc__": Numdcn.__doc__})
    return {
        "numdcn": own,
        "numdcn-out": type("NumdcnOut", (Reuse, own), {"__doc__": "numdcn with results filled in place."}),
        "torch": TorchComposition,
        "onnxruntime": OnnxComposition,
        "openvino": OpenVinoComposition,
    }


# The reference.


def corners(layout: Layout, positions: np.ndarray) -> Iterator[Any]:
    """For each of the four corners of positions (..., points, 2): whether it is inside, its pixel, its weights along y
    and x, and their signs."""
    starts, heights, widths = np.array(list(layout.of_points)).T
    p_y, p_x = positions[..., 0], positions[..., 1]
    low_y, low_x = np.floor(p_y).astype(int), np.floor(p_x).astype(int)
    for a, b in np.ndindex(2, 2):
        row, column = low_y + a, low_x + b
        inside = (row >= 0) & (row < heights) & (column >= 0) & (column < widths)
        pixel = np.where(inside, starts + row * widths + column, 0)
        yield inside, pixel, np.abs(1 - a - (p_y - low_y)), np.abs(1 - b - (p_x - low_x)), 2 * a - 1, 2 * b - 1


class Weighted(Operator):
    """One of the three; a case says what its arrays are: `draw`, `seen` and `point_gradients`."""

    def make_inputs(self, case: Any, seed: int, dtype: str, backward: bool) -> WeightedInputs:
        rng = generator(case, seed)
        arrays = tuple(a.astype(dtype) for a in case.draw(rng))
        return WeightedInputs(arrays, normal(rng, case.shapes["y"], dtype) if backward else None)

    def some(self, layout: Layout, count: int = 300) -> tuple[np.ndarray, ...]:
        """Some images, queries and heads."""
        rng = np.random.default_rng(1)
        return tuple(rng.integers(size, size=count) for size in layout.rows[:3])

    def forward_error(self, case: Any, inputs: WeightedInputs, w: Any, y: np.ndarray) -> float:
        if tuple(y.shape) != case.shapes["y"]:
            return float("inf")
        layout, seen = case.layout, case.seen(inputs)
        at = self.some(layout)
        want = np.zeros((len(at[0]), layout.depth))
        for inside, pixel, weight_y, weight_x, _, _ in corners(layout, seen.positions[at]):
            share = inside * weight_y * weight_x * seen.weights[at]
            want += np.einsum("kt,ktd->kd", share, seen.value[at[0][:, None], pixel, at[2][:, None]])
        return relative_error(y.reshape(*layout.rows[:3], layout.depth)[at], want)

    def backward_errors(
        self, case: Any, inputs: WeightedInputs, w: Any, grads: dict[str, np.ndarray], names: tuple[str, ...]
    ) -> dict[str, float]:
        bad = [name for name in names if name not in grads or tuple(grads[name].shape) != case.shapes[name]]
        if bad:
            return dict.fromkeys(bad, float("inf"))
        assert inputs.grad_y is not None
        layout, seen = case.layout, case.seen(inputs)
        grad_y = inputs.grad_y.reshape(*layout.rows[:3], layout.depth).astype(np.float64)
        image, *coordinates = names
        got = grads[image].reshape(seen.value.shape)[-1, :, 0, :2]
        points, weights = case.point_gradients(grads)
        errors = self.point_errors(layout, seen, grad_y, points, weights)
        return {
            image: relative_error(got, self.image_gradient(layout, seen, grad_y)),
            **dict.fromkeys(coordinates, errors),
        }

    def image_gradient(self, layout: Layout, seen: Seen, grad_y: np.ndarray) -> np.ndarray:
        """Two channels of the first head of the last image."""
        want = np.zeros((layout.pixels, min(2, layout.depth)))
        for inside, pixel, weight_y, weight_x, _, _ in corners(layout, seen.positions[-1, :, 0]):
            share = inside * weight_y * weight_x * seen.weights[-1, :, 0]
            for c in range(want.shape[1]):
                added = share * grad_y[-1, :, 0, c, None]
                want[:, c] += np.bincount(pixel.ravel(), added.ravel(), layout.pixels)
        return want

    def point_errors(
        self, layout: Layout, seen: Seen, grad_y: np.ndarray, points: np.ndarray, weights: np.ndarray
    ) -> float:
        """The largest error in gradients of positions and weights of some queries."""
        at = self.some(layout)
        want_points, want_weights = np.zeros(seen.positions[at].shape), np.zeros(seen.weights[at].shape)
        for inside, pixel, weight_y, weight_x, sign_y, sign_x in corners(layout, seen.positions[at]):
            pixels = seen.value[at[0][:, None], pixel, at[2][:, None]].astype(np.float64)
            product = inside * np.einsum("ktd,kd->kt", pixels, grad_y[at])
            want_weights += weight_y * weight_x * product
            want_points[..., 0] += seen.weights[at] * sign_y * weight_x * product
            want_points[..., 1] += seen.weights[at] * sign_x * weight_y * product
        return max(relative_error(points[at], want_points), relative_error(weights[at], want_weights))

    def tiny(self, case: Any) -> Any:
        return case.tiny()
