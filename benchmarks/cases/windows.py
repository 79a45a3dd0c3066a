"""Shared by the benchmarks of dcnv3 and dcnv4: the stages of InternImage, for classification and for detection."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases.interface import Target, normal
from benchmarks.cases.weighted import Layout, Seen, WeightedInputs, composed, jittered

POINTS = 9
TARGETS = (
    Target("forward", "fastest", 5, cases=("d1", "d2", "c1")),
    Target("forward", "fastest", 1.5, cases=("c3", "c4")),
    Target("backward", "torch", 8, cases=("d2", "c1")),
)
INPUTS_TEXT = "offsets N(0, 1) pixels, kernel 3, padding 1; mask a softmax; x N(0, 1)"


def pack(offsets: np.ndarray, mask: np.ndarray, groups: int, channels: int) -> np.ndarray:
    """offset_mask (n, h, w, channels) of offsets (n, h, w, groups*points*2) and mask (n, h, w, groups*points). The
    channels that are left over are 0."""
    blocks = [a.reshape(*a.shape[:3], groups, -1) for a in (offsets, mask)]
    used = np.concatenate(blocks, axis=4).reshape(*mask.shape[:3], -1)
    return np.pad(used, [(0, 0)] * 3 + [(0, channels - used.shape[3])])


def unpack(packed: np.ndarray, groups: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and mask of offset_mask."""
    shape = packed.shape[:3]
    blocks = packed[..., : 3 * points * groups].reshape(*shape, groups, 3 * points)
    return blocks[..., : 2 * points].reshape(*shape, -1), blocks[..., 2 * points :].reshape(*shape, -1)


class WindowCase(NamedTuple):
    """x (n, h, w, groups*depth) -> y of the same shape."""

    name: str
    h: int
    w: int
    groups: int
    packed: bool = False  # dcnv4
    n: int = 1
    depth: int = 16

    @property
    def layout(self) -> Layout:
        return Layout(self.n, self.h * self.w, self.groups, self.depth, ((self.h, self.w),), POINTS)

    @property
    def channels(self) -> int:
        """Of offset_mask."""
        return -(-3 * POINTS * self.groups // 8) * 8

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        out, count = (self.n, self.h, self.w), self.groups * POINTS
        image = (*out, self.groups * self.depth)
        if self.packed:
            return {"x": image, "offset_mask": (*out, self.channels), "y": image}
        return {"x": image, "offsets": (*out, 2 * count), "mask": (*out, count), "y": image}

    @property
    def differentiable(self) -> tuple[str, ...]:
        return ("x", "offset_mask") if self.packed else ("x", "offsets", "mask")

    @property
    def options(self) -> dict[str, Any]:
        return {"padding": 1, **({"groups": self.groups} if self.packed else {})}

    @property
    def text(self) -> str:
        return f"{self.n},{self.h},{self.w},{self.groups}x{self.depth}, k3"

    @property
    def regular(self) -> np.ndarray:
        """Positions without offsets, (pixels, 1, points, 2), y first."""
        pixels = np.argwhere(np.ones((self.h, self.w)))
        taps = np.array([(j - 1, i - 1) for i in range(3) for j in range(3)])
        return (pixels[:, None] + taps)[:, None].astype(np.float64)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """x, offsets and mask, or x and both of them packed."""
        rows, shapes = self.layout.rows, self.shapes
        offsets, mask = jittered(rng, (*rows, 2), 1.0), np.exp(rng.standard_normal(rows))
        mask /= mask.sum(-1, keepdims=True)
        x = normal(rng, shapes["x"], "float32")
        offsets, mask = (a.reshape(*shapes["x"][:3], -1) for a in (offsets, mask))
        return (x, pack(offsets, mask, self.groups, self.channels)) if self.packed else (x, offsets, mask)

    def split(self, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Offsets (*rows, 2) and mask (rows)."""
        rows = self.layout.rows
        offsets, mask = unpack(arrays[0], self.groups, POINTS) if self.packed else arrays
        return offsets.reshape(*rows, 2), mask.reshape(rows)

    def seen(self, inputs: WeightedInputs) -> Seen:
        """The arrays in the common form."""
        offsets, mask = self.split(inputs.arrays[1:])
        value = inputs.arrays[0].reshape(self.n, self.h * self.w, self.groups, self.depth)
        return Seen(value, self.regular + offsets[..., ::-1].astype(np.float64), mask)

    def point_gradients(self, grads: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Those of positions and of weights."""
        offsets, mask = self.split(tuple(grads[name] for name in self.differentiable[1:]))
        return offsets[..., ::-1], mask

    def compose(self, ops: Any, x: Any, *coordinates: Any) -> Any:
        """The composition of grid_sample."""
        rows = self.layout.rows
        if self.packed:
            used = ops.slice(coordinates[0], 3, 0, 3 * POINTS * self.groups)
            blocks = ops.reshape(used, *rows[:3], 3 * POINTS)
            coordinates = ops.slice(blocks, 3, 0, 2 * POINTS), ops.slice(blocks, 3, 2 * POINTS, 3 * POINTS)
        size = np.array([self.w, self.h])
        regular = ops.constant("regular", lambda: (2 * self.regular[..., ::-1] + 1) / size - 1)
        moved = ops.multiply(ops.reshape(coordinates[0], *rows, 2), ops.constant("pixel", lambda: 2 / size))
        grid = ops.add(moved, regular)
        value = ops.reshape(x, self.n, self.h * self.w, self.groups, self.depth)
        y = composed(ops, self.layout, value, grid, ops.reshape(coordinates[1], *rows))
        return ops.reshape(y, *self.shapes["y"])

    def tiny(self) -> WindowCase:
        """A small case like this one."""
        return self._replace(h=5, w=4, groups=2)


CASES = (
    WindowCase("d1", 200, 320, 4),
    WindowCase("d2", 100, 160, 8),
    WindowCase("d3", 50, 80, 16),
    WindowCase("d4", 25, 40, 32),
    WindowCase("c1", 56, 56, 4),
    WindowCase("c2", 28, 28, 8),
    WindowCase("c3", 14, 14, 16),
    WindowCase("c4", 7, 7, 32),
)
