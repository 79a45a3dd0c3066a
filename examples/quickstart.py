"""Deformable convolution on two photographs: bend one like a lens, find edges that follow a swirl in the other.

    python examples/quickstart.py [--image PATH] [--out FOLDER]

Results are compared with SciPy and gradients are checked; the exit code is 1 if anything is off. Draws quickstart.png.
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_sample_image

import numdcn

LENS = 0.23  # how much farther out a pixel in the corner looks, as a fraction of its distance
CENTRE = (0.502, 0.478)  # of the swirl, as fractions of height and width
PITCH = np.deg2rad(40)  # between the swirl's lines and the radius
SPACING = (1.5, 3.0)  # of the taps, in pixels: across the swirl's lines and along them
DOCS = Path(__file__).resolve().parent.parent / "docs"
EPS = float(np.finfo(np.float32).eps)
DRAWN = 5  # magnification of the 3x3 kernel in the figure
RED, GREEN = "#ff2a1f", "#35ff5e"
say = functools.partial(print, flush=True)  # show progress immediately


def load(path: str | None, sample: str) -> np.ndarray:
    """A photograph (1, 3, H, W), float32 in 0 to 1: the file at `path`, or a sample image of scikit-learn."""
    image = load_sample_image(sample) if path is None else imread(path)
    image = np.atleast_3d(image)[..., :3] / (255.0 if image.dtype == np.uint8 else 1.0)
    step = -(-max(image.shape[:2]) // 1600)  # subsample large images: the figure shows no more anyway
    image = image[::step, ::step].transpose(2, 0, 1)[None]
    return np.repeat(image, 3 // image.shape[1], axis=1).astype(np.float32)  # grey becomes three equal channels


def from_point(h: int, w: int, y: float, x: float) -> np.ndarray:
    """The vector from (y, x) to each pixel: (2, h, w)."""
    return (np.mgrid[0:h, 0:w] - np.array([y, x])[:, None, None]).astype(np.float32)


def lens_offsets(h: int, w: int, strength: float) -> np.ndarray:
    """Offsets (1, 2, h, w) of a barrel lens: each pixel looks farther out, in proportion to its distance cubed."""
    d = from_point(h, w, (h - 1) / 2, (w - 1) / 2)
    squared = (d**2).sum(axis=0) / ((h**2 + w**2) / 4)  # 1 in the corners
    return np.float32(strength) * (squared * d)[None]


def swirl_offsets(h: int, w: int) -> np.ndarray:
    """Offsets (1, 18, h, w) that rotate a 3x3 kernel so that its rows follow the lines of a spiral, SPACING apart."""
    dy, dx = from_point(h, w, CENTRE[0] * h, CENTRE[1] * w)
    angle = np.arctan2(dy, dx) + PITCH
    along = SPACING[1] * np.stack([np.sin(angle), np.cos(angle)])
    across = SPACING[0] * np.stack([np.cos(angle), -np.sin(angle)])
    taps = [np.array([row, column])[:, None, None] for row in (-1, 0, 1) for column in (-1, 0, 1)]
    # offsets are relative to the taps of a plain 3x3 kernel
    return np.concatenate([tap[0] * across + tap[1] * along - tap for tap in taps])[None].astype(np.float32)


def edge_weights() -> np.ndarray:
    """A Sobel filter on brightness (1, 3, 3, 3): lower row minus upper row."""
    sobel = np.outer([-1, 0, 1], [1, 2, 1]) / 4
    return (np.array([0.299, 0.587, 0.114])[:, None, None] * sobel)[None].astype(np.float32)


def by_scipy(x: np.ndarray, offsets: np.ndarray, w: np.ndarray, padding: int) -> np.ndarray:
    """The same deformable convolution with `scipy.ndimage.map_coordinates`, in float64, one tap and one channel at a
    time."""
    y = np.zeros((1, w.shape[0], *offsets.shape[2:]))
    rows, columns = np.indices(y.shape[2:]) - padding
    for k in range(w.shape[2] * w.shape[3]):
        ky, kx = divmod(k, w.shape[3])
        points = [rows + ky + offsets[0, 2 * k], columns + kx + offsets[0, 2 * k + 1]]
        for c in range(x.shape[1]):
            sampled = map_coordinates(x[0, c], points, np.float64, order=1, mode="grid-constant")
            y[0] += w[:, c, ky, kx, None, None] * sampled
    return y


def tolerance(x: np.ndarray, w: np.ndarray) -> float:
    """The rounding error of y to expect in float32.

    A coordinate, at most H or W, is rounded by half an EPS of it; no slope is steeper than the largest x, because no x
    is negative. Each product in the sum adds an EPS, interpolation a few.
    """
    largest = float(np.abs(w).sum(axis=(1, 2, 3)).max() * x.max())
    return largest * EPS * ((x.shape[2] + x.shape[3]) / 2 + w[0].size + 4)


def timed(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
    """The result of a call, and the seconds it took."""
    start = time.perf_counter()
    return call(*args, **options), time.perf_counter() - start


def check(what: str, error: float, allowed: float) -> None:
    """Print an error; exit with code 1 if it is larger than allowed."""
    say(f"   {what:<44}{error:.1e}   (allowed {allowed:.1e})")
    if not error <= allowed:
        sys.exit(f"FAILED: {what}: {error:.3e} is more than {allowed:.3e}")


def forward(x: np.ndarray, offsets: np.ndarray, w: np.ndarray, padding: int) -> np.ndarray:
    """y of a deformable convolution, timed and compared with SciPy over the whole picture."""
    say("   forward    first call (may compile) ... ", end="")
    _, first = timed(numdcn.deform_conv_forward, x, offsets, w, padding=padding)
    y, second = timed(numdcn.deform_conv_forward, x, offsets, w, padding=padding)
    expected, scipy = timed(by_scipy, x, offsets, w, padding)
    say(f"{first:.2f} s; second {1e3 * second:.1f} ms; SciPy {1e3 * scipy:.0f} ms")
    check("largest difference from SciPy", float(np.abs(y - expected).max()), tolerance(x, w))
    return y


def backward(y: np.ndarray, x: np.ndarray, offsets: np.ndarray, w: np.ndarray, padding: int) -> np.ndarray:
    """The gradient with respect to the offsets of the loss sum(y**2) / 2, whose gradient with respect to y is y; all
    gradients are timed and checked."""
    say("   backward   first call (may compile) ... ", end="")
    _, first = timed(numdcn.deform_conv_backward, y, x, offsets, w, padding=padding)
    g, second = timed(numdcn.deform_conv_backward, y, x, offsets, w, padding=padding)
    say(f"{first:.2f} s; second {1e3 * second:.1f} ms")
    say("   norms of the gradients: x {:.4g}, offsets {:.4g}, w {:.4g}".format(*map(np.linalg.norm, g[:3])))
    # y is linear in x and in w: <g.x, x> = <g.w, w> = <grad_y, y>. Random rounding errors grow with the square root of
    # their number, and scale with the magnitudes of the products (x is not negative).
    sums = [float(np.vdot(a.astype(np.float64), b)) for a, b in ((g.x, x), (g.w, w), (y, y))]
    products = np.vdot(np.abs(y), numdcn.deform_conv_forward(x, offsets, np.abs(w), padding=padding))
    say("   <g.x, x>, <g.w, w>, <grad_y, y>:  " + ",  ".join(f"{s:.4f}" for s in sums))
    check("their spread, relative", (max(sums) - min(sums)) / (float(products) or 1.0), EPS * y.size**0.5)
    return g.offsets


def check_differences(g: np.ndarray, x: np.ndarray, offsets: np.ndarray, w: np.ndarray, padding: int) -> None:
    """Compare three of the largest elements of g, the gradient with respect to the offsets, with differences of the
    loss."""
    step = 0.125  # within a pixel the loss is a parabola, so the central difference is exact
    inside = np.abs(offsets % 1 - 0.5) < 0.5 - 1.1 * step
    steep = np.flatnonzero(inside & (np.abs(g) > np.quantile(np.abs(g), 0.999)))
    for element in steep[:: max(1, len(steep) // 3)][:3]:
        more, less = offsets.copy(), offsets.copy()
        more.flat[element] += step
        less.flat[element] -= step
        up, down = (numdcn.deform_conv_forward(x, o, w, padding=padding).astype(np.float64) for o in (more, less))
        slope = (up**2 - down**2).sum() / 2 / (2 * step)
        check(f"d loss / d offset {slope:+.5f}, by differences", abs(slope - g.flat[element]), 1e-3 * abs(slope))


def find_lens(bent: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    """Recover the lens's strength from the two pictures: bisection on the sign of the loss's gradient."""
    ray = lens_offsets(x.shape[2], x.shape[3], 1.0)  # the offsets per unit of strength
    low, high = 0.0, 0.5
    for _ in range(14):
        strength = (low + high) / 2
        difference = numdcn.deform_conv_forward(x, np.float32(strength) * ray, w) - bent
        g = numdcn.deform_conv_backward(difference, x, np.float32(strength) * ray, w, wrt="offsets")
        low, high = (strength, high) if np.vdot(g.offsets, ray) < 0 else (low, strength)
    say(f"   lens strength recovered from the gradient: {strength:.4f}, true value {LENS}")


def dots(ax: Axes, points: np.ndarray, colour: str, size: float) -> None:
    """Dots at points (2, ...), y then x."""
    ax.plot(points[1].ravel(), points[0].ravel(), "o", color=colour, ms=size, mec="white", mew=0.7, snap=False)


def draw_lens(ax: Axes, h: int, w: int) -> None:
    """Lines from some output pixels (green) to where they look (red)."""
    at = np.mgrid[h // 14 : h : h // 7, w // 22 : w : w // 11]
    to = at + lens_offsets(h, w, LENS)[0][:, at[0], at[1]]
    ax.plot([at[1].ravel(), to[1].ravel()], [at[0].ravel(), to[0].ravel()], color=RED, lw=1.6)
    dots(ax, to, RED, 5)
    dots(ax, at, GREEN, 5)


def draw_taps(ax: Axes, h: int, w: int) -> None:
    """Lines of the swirl; on them some output pixels (green) and the nine taps of each (red), drawn enlarged."""
    radius = np.geomspace(0.02, 1.2, 200) * h
    for arm in np.arange(8) * np.pi / 4:
        angle = arm + np.log(radius / h) * np.tan(PITCH)  # a line at the angle PITCH to the radius
        line = np.stack([CENTRE[0] * h + radius * np.sin(angle), CENTRE[1] * w + radius * np.cos(angle)])
        ax.plot(line[1], line[0], color="white", lw=0.8, alpha=0.6)
        y, x = np.rint(line[:, np.searchsorted(radius / h, (0.13, 0.25, 0.39, 0.56))]).astype(int)
        at = np.stack([y, x])[:, (abs(y / h - 0.5) < 0.46) & (abs(x / w - 0.5) < 0.46)]
        offsets = swirl_offsets(h, w)[0][:, at[0], at[1]]
        for k in range(9):
            dots(ax, at + DRAWN * (np.array(divmod(k, 3))[:, None] - 1 + offsets[2 * k : 2 * k + 2]), RED, 5)
        dots(ax, at, GREEN, 6)


def draw(lens: tuple[np.ndarray, np.ndarray], swirl: tuple[np.ndarray, np.ndarray], path: Path) -> None:
    """Four panels, 1200 pixels wide; 256 colours keep the file small."""
    (x, bent), (flower, edges) = lens, swirl
    glow = np.minimum(np.abs(edges[0, 0]) / (np.quantile(np.abs(edges), 0.995) or 1), 1) ** 0.8
    pictures = [*(a[0].transpose(1, 2, 0).clip(0, 1) for a in (x, bent, flower)), glow]
    taps = f"A 3x3 kernel turned by a swirl (drawn {DRAWN} times as large)"
    titles = ("Where the pixels of a lens look", "Through the lens", taps, "Edges along the swirl")
    fig = Figure(figsize=(12, 12 * x.shape[2] / x.shape[3] + 0.56), dpi=100, layout="constrained")
    axes = fig.subplots(2, 2)
    for ax, picture, title in zip(axes.flat, pictures, titles, strict=True):
        ax.imshow(picture, cmap="inferno")
        ax.set_title(title, fontsize=14)
        ax.set_axis_off()
        ax.autoscale(False)
    draw_lens(axes[0, 0], *x.shape[2:])
    draw_taps(axes[1, 0], *flower.shape[2:])
    fig.savefig(full := io.BytesIO())
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(full).convert("RGB").quantize(256).save(path, optimize=True)
    say(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    """Both tasks, then the figure."""
    parser = argparse.ArgumentParser(description="Deformable convolution on photographs, checked against SciPy.")
    parser.add_argument("--image", help="a photograph to use instead of the two that come with scikit-learn")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for quickstart.png (default: docs)")
    args = parser.parse_args()
    start = time.perf_counter()
    say(f"numdcn {numdcn.__version__}, threads: {numdcn.get_num_threads()}")
    x = load(args.image, "china.jpg")
    w = np.eye(3, dtype=np.float32)[:, :, None, None]
    say(f"1. through a lens: photograph {x.shape}, 1x1 kernel")
    offsets = lens_offsets(x.shape[2], x.shape[3], LENS)
    bent = forward(x, offsets, w, padding=0)
    backward(bent, x, offsets, w, padding=0)
    find_lens(bent, x, w)

    flower, w = load(args.image, "flower.jpg"), edge_weights()
    say(f"2. edges along a swirl: photograph {flower.shape}, 3x3 kernel")
    offsets = swirl_offsets(*flower.shape[2:])
    edges = forward(flower, offsets, w, padding=1)
    g = backward(edges, flower, offsets, w, padding=1)
    check_differences(g, flower, offsets, w, padding=1)

    draw((x, bent), (flower, edges), args.out / "quickstart.png")
    say(f"all checks passed, {time.perf_counter() - start:.1f} s in total")


if __name__ == "__main__":
    main()
