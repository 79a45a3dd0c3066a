"""Filters whose weights and points differ at every pixel: smooth a photograph without its edges, and straighten a wave.

    python examples/smooth.py [--image PATH] [--out FOLDER]

First a bilateral filter: dcnv3 with weights that fall with the difference in colour, compared with a loop in NumPy. Then
a photograph seen through waves is straightened: gradient descent on the offsets of dcnv4, which starts with a kernel of
one point that does nothing. The exit code is 1 if anything is off. Draws smooth.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread
from sklearn.datasets import load_sample_image

import numdcn

REACH = 2  # of the bilateral filter, in pixels: a kernel of 5 x 5
SHARPNESS = 30.0  # how fast its weights fall with the squared difference in colour
WAVE = 1.6  # pixels
STEPS, RATE, MOMENTUM, BEND = 150, 4.0, 0.9, 5  # of gradient descent; pixels over which offsets are alike
EPS = float(np.finfo(np.float32).eps)


def load(path: str | None) -> np.ndarray:
    """A photograph (1, H, W, 3), channels last, float32 in 0 to 1: the file at `path`, or part of a sample image."""
    image = load_sample_image("flower.jpg")[40:400, 130:580] if path is None else imread(path)
    image = np.atleast_3d(image)[..., :3] / (255.0 if image.dtype == np.uint8 else 1.0)
    step = max(1, max(image.shape[:2]) // 90)
    return image[::step, ::step].astype(np.float32)[None].repeat(3 // image.shape[2], axis=3)


def closeness(x: np.ndarray) -> np.ndarray:
    """The mask of a bilateral filter (1, H, W, points): of each pixel around another, how alike they are; sums are 1."""
    size = 2 * REACH + 1
    padded = np.pad(x, ((0, 0), (REACH, REACH), (REACH, REACH), (0, 0)), constant_values=9.0)  # unlike any pixel
    columns, rows = np.divmod(np.arange(size**2), size)  # point k of dcnv3 is in column k // 5
    around = [padded[:, j : j + x.shape[1], i : i + x.shape[2]] for i, j in zip(columns, rows, strict=True)]
    weights = np.stack([np.exp(-SHARPNESS * np.square(other - x).sum(-1)) for other in around], axis=-1)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def by_loops(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The same filter, pixel by pixel, in float64."""
    y = np.zeros(x.shape)
    for i, j in np.ndindex(x.shape[1:3]):
        for k, weight in enumerate(mask[0, i, j]):
            column, row = divmod(k, 2 * REACH + 1)
            if 0 <= i + row - REACH < x.shape[1] and 0 <= j + column - REACH < x.shape[2]:
                y[0, i, j] += float(weight) * x[0, i + row - REACH, j + column - REACH]
    return y


def bilateral(x: np.ndarray) -> np.ndarray:
    """A photograph, smooth but for its edges, compared with the loops."""
    mask = closeness(x)
    still = np.zeros((*mask.shape[:3], 2 * mask.shape[3]), np.float32)
    y = numdcn.dcnv3_forward(x, still, mask, kernel_size=2 * REACH + 1, padding=REACH)
    error = float(np.abs(y - by_loops(x, mask)).max())
    check("smooth, compared with loops", error, EPS * (mask.shape[3] + 4))  # a rounding for each term, none above 1
    return y


def waves(x: np.ndarray) -> np.ndarray:
    """The photograph seen through waves."""
    rows, columns = np.indices(x.shape[1:3]).astype(np.float32)
    moved = np.stack([rows + WAVE * np.sin(columns / 5), columns + WAVE * np.cos(rows / 6)], axis=-1)
    moved = np.clip(moved, 0, np.array(x.shape[1:3], np.float32) - 1)
    return numdcn.bilinear_sample_forward(x.transpose(0, 3, 1, 2), moved[None]).transpose(0, 2, 3, 1)


def alike(offsets: np.ndarray) -> np.ndarray:
    """Means over BEND x BEND pixels of (1, H, W, 2): neighbours move alike."""
    half = BEND // 2
    around = np.pad(offsets, ((0, 0), (half, half), (half, half), (0, 0)), mode="edge")
    for axis in (1, 2):
        size = around.shape[axis] - BEND + 1
        around = np.mean([np.take(around, range(n, n + size), axis) for n in range(BEND)], axis=0)
    return around


def straighten(seen: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The photograph seen, sampled where descent moved the points, and their offsets (1, H, W, 2)."""
    packed = np.zeros((*seen.shape[:3], 8), np.float32)  # x, y and the weight of the only point, then padding
    packed[..., 2] = 1
    speed = np.zeros((*seen.shape[:3], 2), np.float32)
    for _ in range(STEPS):
        y = numdcn.dcnv4_forward(seen, packed, groups=1, kernel_size=1)
        g = numdcn.dcnv4_backward(y - wanted, seen, packed, groups=1, kernel_size=1, wrt="offset_mask")
        assert g.offset_mask is not None
        speed = MOMENTUM * speed - RATE * alike(g.offset_mask[..., :2])
        packed[..., :2] = alike(packed[..., :2] + speed)
    return numdcn.dcnv4_forward(seen, packed, groups=1, kernel_size=1), packed[..., :2]


def check(what: str, error: float, allowed: float) -> None:
    """Print an error; exit with code 1 if it is larger than allowed."""
    print(f"{what:<32}{error:.1e}   (allowed {allowed:.1e})", flush=True)
    if not error <= allowed:
        sys.exit(f"FAILED: {what}: {error:.3e} is more than {allowed:.3e}")


def draw(pictures: dict[str, np.ndarray], offsets: np.ndarray, path: Path) -> None:
    """All pictures in a row, the last with arrows to where the points moved."""
    height, width = offsets.shape[1:3]
    figure = Figure(figsize=(3.2 * len(pictures), 3.2 * height / width + 0.4), layout="constrained")
    for axes, (title, picture) in zip(figure.subplots(1, len(pictures)), pictures.items(), strict=True):
        axes.imshow(picture[0].clip(0, 1))
        axes.set_title(title)
        axes.set_axis_off()
    rows, columns = np.mgrid[2:height:5, 2:width:5]
    x, y = offsets[0, rows, columns].T
    axes.quiver(columns.T, rows.T, x, y, angles="xy", scale_units="xy", scale=0.5, color="white", width=0.004)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", help="a photograph; default: a sample image of scikit-learn")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture; default: the current one")
    given = parser.parse_args()
    x = load(given.image)
    smooth, seen = bilateral(x), waves(x)
    straight, offsets = straighten(seen, x)
    inner = (slice(None), slice(4, -4), slice(4, -4))  # at the border the waves have hidden pixels
    before, after = (float(np.abs(picture - x)[inner].mean()) for picture in (seen, straight))
    print(f"mean difference through waves   {before:.3f}", flush=True)
    check("and straightened", after, 0.6 * before)
    pictures = {"photograph": x, "smooth but for edges": smooth, "through waves": seen, "straightened": straight}
    path = given.out / "smooth.png"
    draw(pictures, offsets, path)
    print(f"drew {path}")


if __name__ == "__main__":
    main()
