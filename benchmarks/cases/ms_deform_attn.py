"""Multi-scale deformable attention in the shapes of published detectors, against compositions of grid_sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases.interface import Target, normal
from benchmarks.cases.weighted import Layout, Seen, Weighted, WeightedInputs, composed, contenders, jittered

DETR = ((100, 167), (50, 84), (25, 42), (13, 21))  # of an image of 800 x 1333
RT_DETR = ((80, 80), (40, 40), (20, 20))
SPREAD = 2.0  # pixels of the level around the reference point


class AttentionCase(NamedTuple):
    """value (n, pixels, heads, depth), four points on each level -> y (n, queries, heads*depth)."""

    name: str
    levels: tuple[tuple[int, int], ...]
    queries: int = 0  # 0: one for every pixel
    n: int = 1
    heads: int = 8
    depth: int = 32
    points: int = 4

    @property
    def layout(self) -> Layout:
        pixels = sum(height * width for height, width in self.levels)
        return Layout(self.n, self.queries or pixels, self.heads, self.depth, self.levels, self.points)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        n, q, m, _ = self.layout.rows
        weights = n, q, m, len(self.levels), self.points
        return {
            "value": (n, self.layout.pixels, m, self.depth),
            "sampling_locations": (*weights, 2),
            "attention_weights": weights,
            "y": (n, q, m * self.depth),
        }

    @property
    def differentiable(self) -> tuple[str, ...]:
        return "value", "sampling_locations", "attention_weights"

    @property
    def options(self) -> dict[str, Any]:
        return {"spatial_shapes": self.levels}

    @property
    def text(self) -> str:
        levels = ", ".join(f"{height}x{width}" for height, width in self.levels)
        return f"{self.layout.queries} queries, {self.heads} heads of {self.depth}, {self.points} points on {levels}"

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each level, (levels, 1, 2)."""
        return np.array(self.levels, np.float64)[:, None]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Locations around the pixel of the query, or around random reference points; weights sum to 1."""
        if self.queries:
            reference = rng.random((self.queries, 2))
        else:
            reference = np.concatenate([(np.argwhere(np.ones(size)) + 0.5) / size for size in self.levels])
        shapes = self.shapes
        moved = jittered(rng, shapes["sampling_locations"], SPREAD)
        positions = np.floor(reference[:, None, None, None] * self.sizes) + moved
        weights = np.exp(normal(rng, shapes["attention_weights"], "float64"))
        return (
            normal(rng, shapes["value"], "float32"),
            ((positions + 0.5) / self.sizes)[..., ::-1],
            weights / weights.sum((3, 4), keepdims=True),
        )

    def seen(self, inputs: WeightedInputs) -> Seen:
        """The arrays in the common form."""
        value, locations, weights = inputs.arrays
        positions = locations[..., ::-1].astype(np.float64) * self.sizes - 0.5
        rows = self.layout.rows
        return Seen(value, positions.reshape(*rows, 2), weights.reshape(rows))

    def point_gradients(self, grads: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Those of positions and of weights."""
        rows = self.layout.rows
        positions = grads["sampling_locations"][..., ::-1] / self.sizes
        return positions.reshape(*rows, 2), grads["attention_weights"].reshape(rows)

    def compose(self, ops: Any, value: Any, locations: Any, weights: Any) -> Any:
        """The composition of grid_sample."""
        rows = self.layout.rows
        double = ops.multiply(locations, ops.constant("two", lambda: np.array(2.0)))
        grid = ops.add(double, ops.constant("minus one", lambda: np.array(-1.0)))
        return composed(ops, self.layout, value, ops.reshape(grid, *rows, 2), ops.reshape(weights, *rows))

    def tiny(self) -> AttentionCase:
        """A small case like this one."""
        return self._replace(levels=((4, 5), (2, 3)), queries=7)


OPERATOR = Weighted(
    "ms_deform_attn",
    "locations N(0, 2) pixels of the level around a reference point, weights a softmax, value N(0, 1)",
    (
        AttentionCase("encoder", DETR),
        AttentionCase("decoder", DETR, 300),
        AttentionCase("rt-detr", RT_DETR, 300),
    ),
    contenders("ms_deform_attn"),
    (
        Target("forward", "fastest", 6, cases=("encoder",)),
        Target("forward", "fastest", 4),
        Target("backward", "torch", 8, cases=("encoder", "rt-detr")),
    ),
    memory_cases=("encoder",),
    start_cases=("decoder",),
)
