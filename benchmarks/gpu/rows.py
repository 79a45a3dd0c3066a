"""The rows S1 to S7 on a GPU: new inputs, and a float64 reference for some elements of every result, with bounds.

The inputs fit every type (see problems.py); coordinates are rounded once, to float32, as kernels compute them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases.layers import positions
from benchmarks.gpu.device import Device
from benchmarks.gpu.problems import Expected, common
from benchmarks.rivals.layer import Case

POSITIONS, PIXELS, WEIGHTS = 12, 24, 4  # numbers sampled: of y and the gradients of offsets and mask; of x; of w


def fresh(device: Device, case: Case, seed: int) -> dict[str, np.ndarray]:
    """Host arrays by name, float32, including grad_y. x, grad_y N(0, 1), offsets N(0, 2), mask uniform, w over
    sqrt(terms)."""
    draws = {"offsets": 2.0, "w": 1 / math.sqrt(case.c // case.groups * case.taps)}
    shapes = {**case.shapes, "grad_y": case.shapes["y"]}
    del shapes["y"]
    rng, made = np.random.default_rng(seed), {}
    if device.on_torch:
        device.torch.manual_seed(seed)
    for name, shape in shapes.items():
        if device.on_torch:  # fast on a GPU
            draw = device.torch.rand if name == "mask" else device.torch.randn
            values = draw(shape, device=device.place) * draws.get(name, 1.0)
            made[name] = device.get(values.bfloat16().half().float())
        else:
            drawn = rng.random(shape, np.float32) if name == "mask" else rng.standard_normal(shape, np.float32)
            made[name] = common(drawn * np.float32(draws.get(name, 1.0)))
    return made


class Sampled(NamedTuple):
    """Some elements of a result: their positions, and the expected values."""

    places: tuple[np.ndarray, ...]
    expected: Expected


def bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """For images (L, H, W) at points (L, K): the value, the slopes along y and x; and, for absolute values, the value
    and the sums of the slopes' terms: (6, L, K)."""
    lines, height, width = image.shape
    active = (y >= -1) & (y < height) & (x >= -1) & (x < width)
    y, x = np.where(active, y, -9.0).astype(np.float64), np.where(active, x, -9.0).astype(np.float64)
    low_y, low_x = np.floor(y).astype(int), np.floor(x).astype(int)
    fraction = (y - low_y, x - low_x)
    line, out = np.arange(lines)[:, None], np.zeros((6, *y.shape))
    for a in (0, 1):
        for b in (0, 1):
            row, column = low_y + a, low_x + b
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = image[line, np.where(inside, row, 0), np.where(inside, column, 0)].astype(np.float64) * inside
            weight = (fraction[0] if a else 1 - fraction[0], fraction[1] if b else 1 - fraction[1])
            size = np.abs(pixel)
            out[0] += pixel * weight[0] * weight[1]
            out[1] += pixel * (2 * a - 1) * weight[1]
            out[2] += pixel * (2 * b - 1) * weight[0]
            out[3] += size * weight[0] * weight[1]
            out[4] += size * weight[1]
            out[5] += size * weight[0]
    return out


class Reference:
    """The sampled elements of a row's results."""

    def __init__(self, case: Case, given: dict[str, np.ndarray], seed: int) -> None:
        self.case, self.given, self.rng = case, given, np.random.default_rng(seed)
        self.w = given["w"].astype(np.float64).reshape(case.groups, case.c_out // case.groups, -1, case.taps)
        group = case.c // case.offset_groups
        self.offset_group = np.arange(case.c) // group
        pixels = math.prod(case.out_size)
        visits = case.taps * (1 + pixels / (case.h * case.w))
        per_group, per_output = case.c // case.groups, case.c_out // case.groups
        self.length = {"y": per_group * case.taps, "x": per_output * visits, "w": case.n * pixels}
        self.length |= dict.fromkeys(("offsets", "mask"), 4 * per_output * group)

    def coordinates(self, n: Any, k: Any, i: Any, j: Any, group: Any) -> tuple[np.ndarray, np.ndarray]:
        """y and x of taps k of offset groups at output positions, rounded to float32."""
        case, offsets = self.case, self.given["offsets"]
        channel = 2 * (group * case.taps + k)
        base_y = i * case.stride - case.padding + k // case.kernel * case.dilation
        base_x = j * case.stride - case.padding + k % case.kernel * case.dilation
        moved = (offsets[n, channel, i, j], offsets[n, channel + 1, i, j])
        return base_y.astype(np.float32) + moved[0], base_x.astype(np.float32) + moved[1]

    def mask(self, n: Any, k: Any, i: Any, j: Any, group: Any) -> np.ndarray:
        if not self.case.mask:
            return np.ones(np.broadcast(n, k, i, j, group).shape)
        return self.given["mask"][n, group * self.case.taps + k, i, j].astype(np.float64)

    def at_positions(self, directions: tuple[str, ...]) -> dict[str, Sampled]:
        """y, and the gradients of offsets and mask, for all channels at some positions."""
        case, spots = self.case, positions(self.case, POSITIONS, self.rng)
        taps, groups = np.arange(case.taps), self.offset_group[:, None]
        names = {"forward": ("y",), "backward": ("offsets", "mask") if case.mask else ("offsets",)}
        found: dict[str, list[np.ndarray]] = {name: [] for d in directions for name in names[d]}
        terms: dict[str, list[np.ndarray]] = {name: [] for name in found}
        for n, i, j in spots:
            at = (n, taps[None, :], np.array(i), np.array(j), groups)
            samples, mask = bilinear(self.given["x"][n], *self.coordinates(*at)), self.mask(*at)
            if "y" in found:
                for sample, w, into in ((samples[0], self.w, found), (samples[3], np.abs(self.w), terms)):
                    columns = (sample * mask).reshape(case.groups, -1, case.taps)
                    into["y"].append(np.einsum("bock,bck->bo", w, columns).ravel())
            if "offsets" in found:
                self._local(n, i, j, samples, mask, found, terms)
        return {name: self._sampled(name, spots, np.array(found[name]), np.array(terms[name])) for name in found}

    def _local(self, n: int, i: int, j: int, samples: np.ndarray, mask: np.ndarray, found: Any, terms: Any) -> None:
        """Gradients of offsets and mask at a position, from the column gradient."""
        case = self.case
        grad_y = self.given["grad_y"][n, :, i, j].astype(np.float64).reshape(case.groups, -1)
        for first, grad, w, into in ((0, grad_y, self.w, found), (3, np.abs(grad_y), np.abs(self.w), terms)):
            column = np.einsum("bock,bo->bck", w, grad).reshape(case.c, case.taps)
            slopes = [samples[first + axis] * column * mask for axis in (1, 2)]
            shape = (case.offset_groups, -1, case.taps)
            summed = [slope.reshape(shape).sum(1) for slope in slopes]
            into["offsets"].append(np.stack(summed, axis=-1).ravel())
            if case.mask:
                into["mask"].append((samples[first] * column).reshape(shape).sum(1).ravel())

    def _sampled(self, name: str, spots: list[tuple[int, int, int]], value: np.ndarray, terms: np.ndarray) -> Sampled:
        n, i, j = (np.array(axis)[:, None] for axis in zip(*spots, strict=True))
        channel = np.arange(value.shape[1])[None, :]
        index = tuple(np.ascontiguousarray(a) for a in np.broadcast_arrays(n, channel, i, j))
        return Sampled(index, Expected(value, terms, self.length[name]))

    def pixels(self) -> Sampled:
        """The gradient of some pixels of x: every tap that touches the pixel is found by search."""
        case = self.case
        i, j = (a.ravel()[None, :] for a in np.indices(case.out_size))
        taps = np.arange(case.taps)[:, None]
        value, terms, places = [], [], []
        for _ in range(PIXELS):
            n, c, row, column = (int(self.rng.integers(size)) for size in case.shapes["x"])
            group = self.offset_group[c]
            y, x = self.coordinates(n, taps, i, j, group)
            share = np.maximum(0, 1 - np.abs(y - np.float64(row))) * np.maximum(0, 1 - np.abs(x - np.float64(column)))
            k, spot = np.nonzero(share)
            weights = share[k, spot] * self.mask(n, k, i[0, spot], j[0, spot], group)
            block, rest = divmod(c, case.c // case.groups)
            rows = slice(block * case.c_out // case.groups, (block + 1) * case.c_out // case.groups)
            grad_y = self.given["grad_y"][n, rows][:, i[0, spot], j[0, spot]].astype(np.float64)
            products = self.w[block, :, rest][:, k] * grad_y * weights
            value.append(products.sum())
            terms.append(np.abs(products).sum())
            places.append((n, c, row, column))
        index = tuple(np.array(axis) for axis in zip(*places, strict=True))
        return Sampled(index, Expected(np.array(value), np.array(terms), self.length["x"]))

    def weights(self) -> Sampled:
        """The gradient of some weights: a few (input channel, tap) pairs, all output channels of their group."""
        case = self.case
        i, j = (a.ravel()[None, :] for a in np.indices(case.out_size))
        images = np.arange(case.n)[:, None]
        value, terms, places = [], [], []
        for _ in range(WEIGHTS):
            c, k = int(self.rng.integers(case.c)), int(self.rng.integers(case.taps))
            group, (block, rest) = self.offset_group[c], divmod(c, case.c // case.groups)
            at = (images, np.array(k), i, j, group)
            samples, mask = bilinear(self.given["x"][:, c], *self.coordinates(*at)), self.mask(*at)
            outputs = case.c_out // case.groups
            for o in range(block * outputs, (block + 1) * outputs, max(1, outputs // 16)):
                grad_y = self.given["grad_y"][:, o].reshape(case.n, -1).astype(np.float64)
                value.append((samples[0] * mask * grad_y).sum())
                terms.append((samples[3] * mask * np.abs(grad_y)).sum())
                places.append((o, rest, k // case.kernel, k % case.kernel))
        index = tuple(np.array(axis) for axis in zip(*places, strict=True))
        return Sampled(index, Expected(np.array(value), np.array(terms), self.length["w"]))

    def results(self, direction: str) -> dict[str, Sampled]:
        """Some elements of y, or of every gradient."""
        found = self.at_positions((direction,))
        return found if direction == "forward" else {**found, "x": self.pixels(), "w": self.weights()}


def taken(device: Device, array: Any, sampled: Sampled, dtype: str) -> np.ndarray:
    """The sampled elements of a result."""
    torch = device.torch
    if torch is not None and isinstance(array, torch.Tensor):
        return device.get(array[tuple(torch.from_numpy(a).to(array.device) for a in sampled.places)])
    return device.get(array, dtype)[sampled.places]
