"""The layers of the convolutions: cases, weights, inputs, and a float64 reference for some elements of every result."""

from __future__ import annotations

import zlib

import numpy as np

from benchmarks.cases.interface import relative_error
from benchmarks.rivals.layer import Case, Inputs

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("S1", 1, 128, 100, 152, 128),
        Case("S2", 1, 256, 50, 76, 256),
        Case("S3", 1, 512, 25, 38, 512, padding=2, dilation=2),
        Case("S4", 8, 256, 14, 14, 256),
        Case("S5a", 1, 64, 180, 320, 64, offset_groups=8, mask=True),
        Case("S5b", 1, 64, 180, 320, 64, offset_groups=16, mask=True),
        Case("S6", 2, 256, 56, 56, 512, stride=2),
        Case("S7", 1, 256, 56, 56, 256, groups=256),
        Case("S8", 1, 16, 32, 32, 32),
        Case("large", 1, 64, 512, 960, 64),
        Case("batch33", 33, 64, 28, 28, 64),
    )
}


def make_weights(case: Case, dtype: str) -> np.ndarray:
    """The weights of a case, (c_out, c/groups, kernel, kernel): the same in every process."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    shape = case.shapes["w"]
    return (rng.standard_normal(shape) / np.sqrt(shape[1] * case.taps)).astype(dtype)


def make_inputs(case: Case, seed: int, dtype: str, backward: bool) -> Inputs:
    """New inputs: x and grad_y N(0, 1), offsets N(0, 2) pixels, mask uniform in (0, 1)."""
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), seed])
    shapes = case.shapes
    x = rng.standard_normal(shapes["x"], dtype=np.float32)
    offsets = rng.standard_normal(shapes["offsets"], dtype=np.float32)
    offsets *= np.float32(2)
    mask = rng.random(shapes["mask"], dtype=np.float32) if case.mask else None
    grad_y = rng.standard_normal(shapes["y"], dtype=np.float32) if backward else None

    def cast(a: np.ndarray | None) -> np.ndarray | None:
        return None if a is None else a.astype(dtype, copy=False)

    return Inputs(x.astype(dtype, copy=False), offsets.astype(dtype, copy=False), cast(mask), cast(grad_y))


class Samples:
    """Bilinear samples in float64 at coordinates rounded to the dtype of the offsets, as operators compute them."""

    def __init__(self, case: Case, inputs: Inputs, w: np.ndarray) -> None:
        self.case, self.inputs = case, inputs
        self.grad_y = np.empty(0) if inputs.grad_y is None else inputs.grad_y
        self.w = w.astype(np.float64).reshape(*w.shape[:2], case.taps)  # (c_out, c/groups, taps)

    def coordinates(self, n: int, g: int, k: int, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """y and x, in pixels, of tap k of offset group g at the output positions (i, j)."""
        case, offsets = self.case, self.inputs.offsets
        channel = 2 * (g * case.taps + k)
        base_y = i * case.stride - case.padding + k // case.kernel * case.dilation
        base_x = j * case.stride - case.padding + k % case.kernel * case.dilation
        y = base_y.astype(offsets.dtype) + offsets[n, channel, i, j]
        x = base_x.astype(offsets.dtype) + offsets[n, channel + 1, i, j]
        return y.astype(np.float64), x.astype(np.float64)

    def values(self, n: int, c: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples of channels c at points (y, x) and their slopes along y and x, each (len(c), points)."""
        case = self.case
        active = (y >= -1) & (y < case.h) & (x >= -1) & (x < case.w)
        y, x = np.where(active, y, -9.0), np.where(active, x, -9.0)
        low_y, low_x = np.floor(y).astype(int), np.floor(x).astype(int)
        fraction_y, fraction_x = y - low_y, x - low_x
        value, slope_y, slope_x = (np.zeros((len(c), y.size)) for _ in range(3))
        for a in (0, 1):
            for b in (0, 1):
                row, col = low_y + a, low_x + b
                inside = (row >= 0) & (row < case.h) & (col >= 0) & (col < case.w)
                pixel = self.inputs.x[n, c][:, np.where(inside, row, 0), np.where(inside, col, 0)] * inside
                weight_y, weight_x = (fraction_y if a else 1 - fraction_y), (fraction_x if b else 1 - fraction_x)
                value += pixel * (weight_y * weight_x)
                slope_y += pixel * ((2 * a - 1) * weight_x)
                slope_x += pixel * ((2 * b - 1) * weight_y)
        return value, slope_y, slope_x

    def mask_at(self, n: int, g: int, k: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        mask = self.inputs.mask
        return np.ones(i.shape) if mask is None else mask[n, g * self.case.taps + k, i, j].astype(np.float64)

    def channels(self, g: int) -> np.ndarray:
        """The input channels of offset group g."""
        size = self.case.c // self.case.offset_groups
        return np.arange(g * size, (g + 1) * size)

    def weights_of(self, c: int, k: int) -> tuple[slice, np.ndarray]:
        """The output channels that read input channel c, and their weights at tap k."""
        case = self.case
        block, rest = divmod(c, case.c // case.groups)
        rows = slice(block * case.c_out // case.groups, (block + 1) * case.c_out // case.groups)
        return rows, self.w[rows, rest, k]


def positions(case: Case, count: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Output positions (n, i, j): the corners of the first and last image, and some random ones."""
    out_h, out_w = case.out_size
    corners = [(n, i, j) for n in {0, case.n - 1} for i in {0, out_h - 1} for j in {0, out_w - 1}]
    more = [(int(rng.integers(case.n)), int(rng.integers(out_h)), int(rng.integers(out_w))) for _ in range(count)]
    return corners + more


def forward_error(case: Case, inputs: Inputs, w: np.ndarray, y: np.ndarray, count: int = 16) -> float:
    """Relative error of y, all output channels, at a sample of output positions."""
    if tuple(y.shape) != case.shapes["y"]:
        return float("inf")
    samples, want, got = Samples(case, inputs, w), [], []
    for n, i, j in positions(case, count, np.random.default_rng(1)):
        at = np.array([i]), np.array([j])
        column = np.zeros((case.c, case.taps))
        for g in range(case.offset_groups):
            c = samples.channels(g)
            for k in range(case.taps):
                value, _, _ = samples.values(n, c, *samples.coordinates(n, g, k, *at))
                column[c, k] = value[:, 0] * samples.mask_at(n, g, k, *at)[0]
        blocks = column.reshape(case.groups, -1, case.taps)
        weights = samples.w.reshape(case.groups, case.c_out // case.groups, -1, case.taps)
        want.append(np.einsum("bock,bck->bo", weights, blocks).ravel())
        got.append(y[n, :, i, j])
    return relative_error(np.array(got), np.array(want))


def backward_errors(
    case: Case, inputs: Inputs, w: np.ndarray, grads: dict[str, np.ndarray], names: tuple[str, ...]
) -> dict[str, float]:
    """Relative error of each named gradient, at a sample of its elements; infinite if it is missing or has the wrong
    shape."""
    missing = [n for n in names if n not in grads or tuple(grads[n].shape) != case.shapes[n]]
    if missing:
        return dict.fromkeys(missing, float("inf"))
    samples, rng, count = Samples(case, inputs, w), np.random.default_rng(2), 8
    errors = {
        "x": relative_error(*sampled_grad_x(samples, grads["x"], count, rng)),
        "w": relative_error(*sampled_grad_w(samples, grads["w"], count, rng)),
    }
    if "offsets" in names:
        errors |= local_errors(samples, grads, count, rng)
    return errors


def sampled_grad_x(samples: Samples, grad: np.ndarray, count: int, rng: np.random.Generator) -> tuple:
    """Actual and expected gradient of some pixels of x: every tap that touches the pixel is found by search."""
    case, grad_y = samples.case, samples.grad_y
    i, j = (a.ravel() for a in np.indices(case.out_size))
    want, got = [], []
    for _ in range(count):
        n, c, row, col = (int(rng.integers(size)) for size in case.shapes["x"])
        g, total = c // (case.c // case.offset_groups), 0.0
        for k in range(case.taps):
            y, x = samples.coordinates(n, g, k, i, j)
            share = np.maximum(0, 1 - np.abs(y - row)) * np.maximum(0, 1 - np.abs(x - col))
            hit = np.flatnonzero(share)
            rows, weights = samples.weights_of(c, k)
            column = weights @ grad_y[n][rows, i[hit], j[hit]].astype(np.float64)
            total += float(np.sum(column * share[hit] * samples.mask_at(n, g, k, i[hit], j[hit])))
        want.append(total)
        got.append(grad[n, c, row, col])
    return np.array(got), np.array(want)


def sampled_grad_w(samples: Samples, grad: np.ndarray, count: int, rng: np.random.Generator) -> tuple:
    """Actual and expected gradient of the weights of some (input channel, tap) pairs, for all output channels."""
    case, grad_y = samples.case, samples.grad_y
    i, j = (a.ravel() for a in np.indices(case.out_size))
    want, got = [], []
    for _ in range(count):
        c, k = int(rng.integers(case.c)), int(rng.integers(case.taps))
        g, (rows, _) = c // (case.c // case.offset_groups), samples.weights_of(c, k)
        total = 0.0
        for n in range(case.n):
            value, _, _ = samples.values(n, np.array([c]), *samples.coordinates(n, g, k, i, j))
            column = value[0] * samples.mask_at(n, g, k, i, j)
            total = total + grad_y[n, rows].reshape(-1, column.size).astype(np.float64) @ column
        want.append(total)
        got.append(grad[rows, c % (case.c // case.groups), k // case.kernel, k % case.kernel])
    return np.array(got), np.array(want)


def local_errors(samples: Samples, grads: dict[str, np.ndarray], count: int, rng: np.random.Generator) -> dict:
    """Relative errors of grad_offsets and grad_mask: all their channels at some output positions.

    Offsets that end up within 1e-3 of an integer are skipped, since rounding decides which slope is right there.
    """
    case = samples.case
    want: dict[str, list[float]] = {"offsets": [], "mask": []}
    got: dict[str, list[float]] = {"offsets": [], "mask": []}
    for n, i, j in positions(case, count, rng):
        at = np.array([i]), np.array([j])
        grad_y = samples.grad_y[n, :, i, j].astype(np.float64).reshape(case.groups, -1)
        weights = samples.w.reshape(case.groups, case.c_out // case.groups, -1, case.taps)
        column = np.einsum("bock,bo->bck", weights, grad_y).reshape(case.c, case.taps)
        for g in range(case.offset_groups):
            c = samples.channels(g)
            for k in range(case.taps):
                y, x = samples.coordinates(n, g, k, *at)
                value, *slopes = samples.values(n, c, y, x)
                channel = g * case.taps + k
                if case.mask:
                    want["mask"].append(column[c, k] @ value[:, 0])
                    got["mask"].append(grads["mask"][n, channel, i, j])
                if max(abs(p - round(p)) < 1e-3 for p in (y[0], x[0])):
                    continue
                m = samples.mask_at(n, g, k, *at)[0]
                want["offsets"] += [m * (column[c, k] @ slope[:, 0]) for slope in slopes]
                got["offsets"] += [grads["offsets"][n, 2 * channel + a, i, j] for a in (0, 1)]
    return {name: relative_error(np.array(got[name]), np.array(want[name])) for name in want if want[name]}


def tiny(case: Case) -> Case:
    """A small layer like this one."""
    channels = max(16, case.offset_groups)
    return case._replace(n=1, c=channels, h=9, w=9, c_out=channels, groups=channels if case.groups > 1 else 1)
