"""Shared by the benchmarks of pooling over boxes: cases, boxes, inputs, references, torchvision.

In all of these operators except the maximum, a bin's result is rows @ x[channel] @ columns: a weight for each row and
each column of the image. The float64 references compute these two vectors for every bin; forward and gradients are
products with them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases.interface import Operator, generator, normal, relative_error
from benchmarks.rivals.frameworks import Torchvision

SIZES = (16.0, 600.0)  # pixels of a box's side, log-uniform
INPUTS_TEXT = "boxes of an image of 800 x 1216 at scale 1/8, sides log-uniform in 16 to 600 pixels; x N(0, 1)"


class RoiCase(NamedTuple):
    """x (1, c, h, w) and boxes in an image 1/scale times as large -> y (boxes, c_out, bins, bins)."""

    name: str
    c: int = 256
    h: int = 100
    w: int = 152
    boxes: int = 512
    bins: int = 7
    scale: float = 0.125
    position_sensitive: bool = False
    sampling: int = -1  # samples along a bin's side; -1: by the box's size
    aligned: bool = True
    deformed: str = ""  # the array that moves the bins: offsets or trans
    margin: int = 0  # pixels at the image's right and lower edges without boxes

    @property
    def c_out(self) -> int:
        return self.c // self.bins**2 if self.position_sensitive else self.c

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "x": (1, self.c, self.h, self.w),
            "rois": (self.boxes, 5),
            "moves": (self.boxes, 2, self.bins, self.bins),
            "y": (self.boxes, self.c_out, self.bins, self.bins),
        }
        if not self.deformed:
            del shapes["moves"]
        return shapes

    @property
    def differentiable(self) -> tuple[str, ...]:
        return ("x", self.deformed) if self.deformed else ("x",)

    @property
    def text(self) -> str:
        out = f" -> {self.c_out}" if self.position_sensitive else ""
        return f"1,{self.c},{self.h},{self.w}{out}, {self.boxes} boxes, {self.bins}x{self.bins}"


class RoiInputs(NamedTuple):
    """The arrays of a call; moves only if bins are deformed, grad_y only for a backward."""

    x: np.ndarray  # (1, c, h, w)
    rois: np.ndarray  # (boxes, 5): image, x1, y1, x2, y2
    moves: np.ndarray | None  # (boxes, 2, bins, bins), channel 0 along x: offsets or trans
    grad_y: np.ndarray | None  # (boxes, c_out, bins, bins)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self if a is not None)


def make_boxes(case: RoiCase, rng: np.random.Generator) -> np.ndarray:
    """(boxes, 5): sides log-uniform, centres uniform in the image, clipped to it."""
    image = np.array([case.w, case.h]) / case.scale - case.margin
    sides = SIZES[0] * (SIZES[1] / SIZES[0]) ** rng.random((case.boxes, 2))
    centres = rng.random((case.boxes, 2)) * image
    low, high = (np.clip(centres + sign * sides / 2, 0, image) for sign in (-1, 1))
    return np.concatenate([np.zeros((case.boxes, 1)), low, high], axis=1)


class Bins(NamedTuple):
    """For each box and bin, the weight of every row and every column in its mean.

    The slopes are those of the weights as the bin moves by a pixel; a bin is not steady if a sample is so close to an
    integer that rounding decides which slope is right.
    """

    rows: np.ndarray  # (boxes, bins, bins, h)
    columns: np.ndarray  # (boxes, bins, bins, w)
    row_slopes: np.ndarray
    column_slopes: np.ndarray
    steady: np.ndarray  # (boxes, bins, bins) bool


def align_geometry(case: RoiCase, rois: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First corner and size of each box in pixels of x, (boxes, 2) each, along y and x."""
    corners = rois[:, 1:].astype(np.float64) * case.scale - (0.5 if case.aligned else 0.0)
    start, size = corners[:, [1, 0]], corners[:, [3, 2]] - corners[:, [1, 0]]
    return start, size if case.aligned else np.maximum(size, 1)


def axis_weights(p: np.ndarray, used: np.ndarray, size: int, rim: float, divide_active: bool) -> tuple[np.ndarray, ...]:
    """Weights and slopes along one axis of samples p (boxes, bins, bins, samples) where `used`; and where they are
    steady.

    A sample up to `rim` outside the first or the last pixel is moved to it; others add nothing. The divisor is the
    number of samples, or of those inside.
    """
    inside = used & (p >= -rim) & (p <= size - 1 + rim)
    count = np.maximum((inside if divide_active else used).sum(-1, keepdims=True), 1)
    at = np.clip(p, 0, size - 1)
    low = np.floor(at).astype(int)
    fraction, high = at - low, np.minimum(low + 1, size - 1)
    moving = inside & (p >= 0) & (p < size - 1)
    flat = np.arange(p[..., 0].size).reshape(*p.shape[:-1], 1) * size

    def scattered(to_low: np.ndarray, to_high: np.ndarray) -> np.ndarray:
        total = np.bincount((flat + low).ravel(), (to_low / count).ravel(), p[..., 0].size * size)
        total += np.bincount((flat + high).ravel(), (to_high / count).ravel(), total.size)
        return total.reshape(*p.shape[:-1], size)

    near = (np.abs(p - np.round(p)) < 1e-3) & used
    return scattered(inside * (1 - fraction), inside * fraction), scattered(-1.0 * moving, 1.0 * moving), ~near.any(-1)


def cell_indices(*size: int) -> np.ndarray:
    """The indices of a grid's cells, (*size, len(size))."""
    return np.moveaxis(np.indices(size), 0, -1)


def sampled_bins(
    case: RoiCase, first: np.ndarray, step: np.ndarray, count: np.ndarray, rim: float, divide_active: bool
) -> Bins:
    """Bins whose samples start at `first` (boxes, bins, bins, 2), `step` (boxes, 2) apart, `count` (boxes, 2) of
    them."""
    most = max(1, int(count.max()))
    axes = []
    for axis, size in enumerate((case.h, case.w)):
        index = np.arange(most)
        p = first[..., axis, None] + index * step[:, axis].reshape(-1, 1, 1, 1)
        used = np.broadcast_to(index < count[:, axis].reshape(-1, 1, 1, 1), p.shape)
        axes.append(axis_weights(p, used, size, rim, divide_active))
    (rows, row_slopes, steady_y), (columns, column_slopes, steady_x) = axes
    return Bins(rows, columns, row_slopes, column_slopes, steady_y & steady_x)


def align_bins(case: RoiCase, rois: np.ndarray, shift: np.ndarray | float = 0.0) -> Bins:
    """The bins of roi_align, each moved by shift (boxes, bins, bins, 2) pixels."""
    start, size = align_geometry(case, rois)
    bin_size = size / case.bins
    count = np.full(size.shape, case.sampling) if case.sampling > 0 else np.ceil(bin_size).astype(int)
    step = bin_size / np.maximum(count, 1)
    cells = cell_indices(case.bins, case.bins)
    first = start[:, None, None] + cells * bin_size[:, None, None] + step[:, None, None] / 2 + shift
    return sampled_bins(case, first, step, count, 1.0, False)


def channel_of(case: RoiCase, c: int, i: int, j: int) -> int:
    """The channel of x that output channel c reads in bin (i, j)."""
    return (c * case.bins + i) * case.bins + j if case.position_sensitive else c


def checked_channels(case: RoiCase) -> list[int]:
    """Some output channels: the first, the last and one in between."""
    return sorted({0, case.c_out // 3, case.c_out - 1})


def linear_forward_error(case: RoiCase, x: np.ndarray, bins: Bins, y: np.ndarray) -> float:
    """Relative error of y in some channels."""
    if tuple(y.shape) != case.shapes["y"]:
        return float("inf")
    channels = checked_channels(case)
    want = np.empty((case.boxes, len(channels), case.bins, case.bins))
    for k, c in enumerate(channels):
        for i, j in np.ndindex(case.bins, case.bins):
            image = x[0, channel_of(case, c, i, j)].astype(np.float64)
            want[:, k, i, j] = np.sum(bins.rows[:, i, j] @ image * bins.columns[:, i, j], axis=1)
    return relative_error(y[:, channels], want)


def linear_grad_x_error(case: RoiCase, bins: Bins, grad_y: np.ndarray, grad_x: np.ndarray) -> float:
    """Relative error of the gradient of x in the channels read by some output channels."""
    if tuple(grad_x.shape) != case.shapes["x"]:
        return float("inf")
    want: dict[int, np.ndarray] = {}
    for c in checked_channels(case):
        for i, j in np.ndindex(case.bins, case.bins):
            weighted = bins.rows[:, i, j] * grad_y[:, c, i, j].astype(np.float64)[:, None]
            channel = channel_of(case, c, i, j)
            want[channel] = want.get(channel, 0.0) + weighted.T @ bins.columns[:, i, j]
    return relative_error(grad_x[0, list(want)], np.array(list(want.values())))


def moves_error(case: RoiCase, inputs: RoiInputs, bins: Bins, unit: np.ndarray, grad: np.ndarray) -> float:
    """Relative error of the gradient of offsets or trans in some bins; unit (boxes, 2): pixels per move of 1 (y, x)."""
    if tuple(grad.shape) != case.shapes["moves"]:
        return float("inf")
    assert inputs.grad_y is not None
    steady = np.argwhere(bins.steady)
    chosen = steady[np.random.default_rng(1).permutation(len(steady))[:150]]
    got, want = [], []
    for r, i, j in chosen:
        channels = [channel_of(case, c, i, j) for c in range(case.c_out)]
        image, grad_y = inputs.x[0, channels].astype(np.float64), inputs.grad_y[r, :, i, j].astype(np.float64)
        mean = np.einsum("c,chw->hw", grad_y, image)
        along_y = bins.row_slopes[r, i, j] @ mean @ bins.columns[r, i, j]
        along_x = bins.rows[r, i, j] @ mean @ bins.column_slopes[r, i, j]
        want.append([along_x * unit[r, 1], along_y * unit[r, 0]])
        got.append(grad[r, :, i, j])
    return relative_error(np.array(got), np.array(want))


class RoiOperator(Operator):
    """An operator over boxes whose bins are means."""

    def make_inputs(self, case: RoiCase, seed: int, dtype: str, backward: bool) -> RoiInputs:
        rng, shapes = generator(case, seed), case.shapes
        x, rois = normal(rng, shapes["x"], dtype), make_boxes(case, rng).astype(np.float32).astype(dtype, copy=False)
        moves = normal(rng, shapes["moves"], dtype) if case.deformed else None
        return RoiInputs(x, rois, moves, normal(rng, shapes["y"], dtype) if backward else None)

    def bins(self, case: RoiCase, inputs: RoiInputs) -> Bins:
        return align_bins(case, inputs.rois)

    def unit(self, case: RoiCase, inputs: RoiInputs) -> np.ndarray:
        """Pixels by which offsets or trans of 1 move a bin, (boxes, 2), along y and x."""
        raise NotImplementedError

    def forward_error(self, case: RoiCase, inputs: RoiInputs, w: Any, y: np.ndarray) -> float:
        return linear_forward_error(case, inputs.x, self.bins(case, inputs), y)

    def backward_errors(
        self, case: RoiCase, inputs: RoiInputs, w: Any, grads: dict[str, np.ndarray], names: tuple[str, ...]
    ) -> dict[str, float]:
        missing = [name for name in names if name not in grads]
        if missing:
            return dict.fromkeys(missing, float("inf"))
        assert inputs.grad_y is not None
        bins = self.bins(case, inputs)
        errors = {"x": linear_grad_x_error(case, bins, inputs.grad_y, grads["x"])}
        for name in names:
            if name != "x":
                errors[name] = moves_error(case, inputs, bins, self.unit(case, inputs), grads[name])
        return errors

    def plain(self, case: RoiCase, inputs: RoiInputs) -> tuple[RoiCase, RoiInputs, tuple[str, ...]]:
        still = None if inputs.moves is None else np.zeros_like(inputs.moves)
        return case, inputs._replace(moves=still), ("x",)

    def tiny(self, case: RoiCase) -> RoiCase:
        return case._replace(c=case.bins**2 * 2 if case.position_sensitive else 16, boxes=4, h=32, w=32, scale=1 / 32)


class TorchvisionRoi(Torchvision):
    """Shared by torchvision's operators over boxes; what their forward saves for their backward is not timed."""

    def load(self, case: RoiCase, w: Any) -> None:
        self.case = case
        self.size = case.bins, case.bins

    def convert(self, inputs: RoiInputs) -> Any:
        x, rois = self.torch.from_numpy(inputs.x), self.torch.from_numpy(inputs.rois)
        if inputs.grad_y is None:
            return x, rois
        y = self.forward((x, rois))
        return self.torch.from_numpy(inputs.grad_y), rois, y[1] if isinstance(y, tuple) else None, tuple(x.shape)

    def result(self, y: Any) -> np.ndarray:
        return (y[0] if isinstance(y, tuple) else y).numpy()

    def gradients(self, grads: Any) -> dict[str, np.ndarray]:
        return {"x": grads.numpy()}
