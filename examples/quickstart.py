"""Deformable convolution on two photographs: bend one like a lens, find edges that follow a swirl in the other.

    python examples/quickstart.py [--image PATH] [--out FOLDER]

Every result is compared with scipy and every gradient is checked; the exit code is 1 if one is off. Draws quickstart.png.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from scipy.ndimage import map_coordinates

import numdcn

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)
from matplotlib.axes import Axes  # noqa: E402

LENS = 0.23  # how much farther out than itself a pixel in the corner looks, as a fraction
CENTRE = (0.502, 0.478)  # of the swirl, as fractions of height and width
PITCH = np.deg2rad(40)  # between the swirl's lines and the way out from its centre
SPACING = (1.5, 3.0)  # of the taps, in pixels: across the swirl's lines and along them
EPS = float(np.finfo(np.float32).eps)
DRAWN = 5  # times larger than it is: the 3x3 kernel in the figure
RED, GREEN = "#ff2a1f", "#35ff5e"
say = functools.partial(print, flush=True)  # at once, so that one sees what is going on


def load(path: str | None, sample: str) -> np.ndarray:
    """A photograph (1, 3, H, W), float32 in 0 to 1: the file at `path`, or one that comes with scikit-learn."""
    if path is None:
        from sklearn.datasets import load_sample_image

        image = load_sample_image(sample)
    else:
        image = plt.imread(path)
    image = np.atleast_3d(image)[..., :3] / (255.0 if image.dtype == np.uint8 else 1.0)
    step = -(-max(image.shape[:2]) // 1600)  # a large one is thinned out: the figure shows no more anyway
    image = np.broadcast_to(image[::step, ::step], (*image[::step, ::step].shape[:2], 3))
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32)


def from_point(h: int, w: int, y: float, x: float) -> np.ndarray:
    """For each pixel the way to it from (y, x): (2, h, w), float32."""
    return (np.mgrid[0:h, 0:w] - np.array([y, x])[:, None, None]).astype(np.float32)


def lens_offsets(h: int, w: int, strength: float) -> np.ndarray:
    """Offsets (1, 2, h, w) of a barrel lens: a pixel looks farther out, in proportion to its distance cubed."""
    d = from_point(h, w, (h - 1) / 2, (w - 1) / 2)
    squared = (d**2).sum(axis=0) / ((h**2 + w**2) / 4)  # 1 in the corners
    return np.float32(strength) * (squared * d)[None]


def swirl_offsets(h: int, w: int) -> np.ndarray:
    """Offsets (1, 18, h, w) that turn a 3x3 kernel: its rows lie along the lines of a spiral, SPACING apart."""
    dy, dx = from_point(h, w, CENTRE[0] * h, CENTRE[1] * w)
    angle = np.arctan2(dy, dx) + PITCH
    along = SPACING[1] * np.stack([np.sin(angle), np.cos(angle)])
    across = SPACING[0] * np.stack([np.cos(angle), -np.sin(angle)])
    taps = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    # an offset counts from where the tap of a plain 3x3 kernel is
    moves = [row * across + column * along - np.array([row, column])[:, None, None] for row, column in taps]
    return np.concatenate(moves)[None].astype(np.float32)


def edge_weights() -> np.ndarray:
    """A Sobel filter on brightness (1, 3, 3, 3): lower row less upper row."""
    sobel = np.outer([-1, 0, 1], [1, 2, 1]) / 4
    return (np.array([0.299, 0.587, 0.114])[:, None, None] * sobel)[None].astype(np.float32)


def by_scipy(x: np.ndarray, offsets: np.ndarray, w: np.ndarray, padding: int) -> np.ndarray:
    """The same deformable convolution by `scipy.ndimage.map_coordinates`, in float64, a tap and a channel at a time."""
    h, width = offsets.shape[2:]
    rows, columns = np.mgrid[0:h, 0:width] - padding
    y = np.zeros((1, w.shape[0], h, width))
    for k in range(w.shape[2] * w.shape[3]):
        ky, kx = divmod(k, w.shape[3])
        points = [rows + ky + offsets[0, 2 * k], columns + kx + offsets[0, 2 * k + 1]]
        for c in range(x.shape[1]):
            sampled = map_coordinates(x[0, c], points, np.float64, order=1, mode="grid-constant")
            y[0] += w[:, c, ky, kx, None, None] * sampled
    return y


def tolerance(x: np.ndarray, w: np.ndarray) -> float:
    """What float32 may cost y: a coordinate below H or W is rounded by half an EPS of it, and slopes are at most max x;
    each of the products that are summed adds an EPS, interpolation a few."""
    largest = float(np.abs(w).sum(axis=(1, 2, 3)).max() * x.max())
    return largest * EPS * ((x.shape[2] + x.shape[3]) / 2 + w[0].size + 4)


def timed(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """What `call` returns, and its seconds."""
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def check(what: str, error: float, allowed: float) -> None:
    """Print an error; leave with exit code 1 if it is larger than allowed."""
    say(f"   {what:<44}{error:.1e}   (allowed {allowed:.1e})")
    if not error <= allowed:
        sys.exit(f"FAILED: {what}: {error:.3e} is more than {allowed:.3e}")


def forward(x: np.ndarray, offsets: np.ndarray, w: np.ndarray, padding: int) -> np.ndarray:
    """y of a deformable convolution, timed and compared with scipy over the whole picture."""
    say("   forward   compiling kernels (once) ... ", end="")
    y, first = timed(lambda: numdcn.deform_conv_forward(x, offsets, w, padding=padding))
    y, second = timed(lambda: numdcn.deform_conv_forward(x, offsets, w, padding=padding))
    say(f"{first:.2f} s; second call {1e3 * second:.1f} ms; scipy ... ", end="")
    expected, scipy = timed(lambda: by_scipy(x, offsets, w, padding))
    say(f"{1e3 * scipy:.0f} ms")
    check("largest difference to scipy", float(np.abs(y - expected).max()), tolerance(x, w))
    return y


def backward(y: np.ndarray, x: np.ndarray, offsets: np.ndarray, w: np.ndarray, padding: int) -> np.ndarray:
    """Gradient by the offsets of the loss sum(y**2) / 2, whose gradient by y is y; all gradients timed and checked."""
    call = lambda: numdcn.deform_conv_backward(y, x, offsets, w, padding=padding)  # noqa: E731
    say("   backward  compiling kernels (once) ... ", end="")
    g, first = timed(call)
    g, second = timed(call)
    say(f"{first:.2f} s; second call {1e3 * second:.1f} ms")
    norms = ", ".join(f"{name} {np.linalg.norm(getattr(g, name)):.4g}" for name in ("x", "offsets", "w"))
    say(f"   norms of the gradients: {norms}")
    # y is linear in x and in w: <g.x, x> = <g.w, w> = <grad_y, y>. Random rounding errors grow with the root of their
    # number, and are of the size of the products, signs aside (x has none).
    sums = [float(np.vdot(a.astype(np.float64), b)) for a, b in ((g.x, x), (g.w, w), (y, y))]
    products = np.vdot(np.abs(y), numdcn.deform_conv_forward(x, offsets, np.abs(w), padding=padding))
    say("   <g.x, x>, <g.w, w>, <grad_y, y>:  " + ",  ".join(f"{s:.4f}" for s in sums))
    spread = (max(sums) - min(sums)) / float(products)
    check("their spread, relative", spread, EPS * y.size**0.5)
    return g.offsets


def check_differences(g: np.ndarray, x: np.ndarray, offsets: np.ndarray, w: np.ndarray, padding: int) -> None:
    """Three of the largest elements of g, the gradient by the offsets, against differences of the loss."""
    step = 0.125  # within a pixel the loss is a parabola, so that the central difference is exact
    inside = np.abs(offsets % 1 - 0.5) < 0.5 - 1.1 * step
    steep = np.flatnonzero(inside & (np.abs(g) > np.quantile(np.abs(g), 0.999)))
    for element in steep[:: max(1, len(steep) // 3)][:3]:
        ys = []
        for move in (step, -step):
            moved = offsets.copy()
            moved.flat[element] += move
            ys.append(numdcn.deform_conv_forward(x, moved, w, padding=padding).astype(np.float64))
        slope = ((ys[0] - ys[1]) * (ys[0] + ys[1])).sum() / 2 / (2 * step)
        exact = float(g.flat[element])
        check(f"d loss / d offset {exact:+.5f} by differences", abs(slope - exact), 1e-3 * abs(exact))


def find_lens(bent: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    """The lens's strength from the picture and the bent picture: halving, by the sign of the loss's gradient."""
    ray = lens_offsets(*x.shape[2:], 1.0)  # the offsets are `strength` times these
    low, high, start = 0.0, 0.5, time.perf_counter()
    for _ in range(14):
        strength = (low + high) / 2
        offsets = np.float32(strength) * ray
        difference = numdcn.deform_conv_forward(x, offsets, w) - bent
        g = numdcn.deform_conv_backward(difference, x, offsets, w, wrt="offsets")
        low, high = (strength, high) if np.vdot(g.offsets, ray) < 0 else (low, strength)
    seconds = time.perf_counter() - start
    say(f"   the lens found again by its gradient: {strength:.4f}, was {LENS}   (14 steps, {seconds:.2f} s)")


def dots(ax: Axes, points: np.ndarray, colour: str, size: float) -> None:
    """Dots at points (2, ...), y then x."""
    ax.plot(points[1].ravel(), points[0].ravel(), "o", color=colour, ms=size, mec="white", mew=0.7, snap=False)


def lattice(h: int, w: int, rows: int, columns: int) -> np.ndarray:
    """Some pixels (2, rows, columns), evenly spread."""
    y, x = (np.arange(rows) + 0.5) * h / rows, (np.arange(columns) + 0.5) * w / columns
    return np.stack(np.meshgrid(y, x, indexing="ij")).astype(int)


def draw_lens(ax: Axes, h: int, w: int) -> None:
    """Lines from some output pixels (green) to where they look (red)."""
    at = lattice(h, w, 7, 11)
    to = at + lens_offsets(h, w, LENS)[0][:, at[0], at[1]]
    ax.plot([at[1].ravel(), to[1].ravel()], [at[0].ravel(), to[0].ravel()], color=RED, lw=1.6)
    dots(ax, to, RED, 5)
    dots(ax, at, GREEN, 5)
    ax.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))


def draw_taps(ax: Axes, h: int, w: int) -> None:
    """Lines of the swirl; on them some output pixels (green) and the nine taps of each (red), drawn larger."""
    radius = np.linspace(0.02, 1.2, 400) * h
    for arm in np.arange(8) * np.pi / 4:
        angle = arm + np.log(radius / h) * np.tan(PITCH)  # where a line that makes the angle PITCH with the way out is
        line = np.stack([CENTRE[0] * h + radius * np.sin(angle), CENTRE[1] * w + radius * np.cos(angle)])
        ax.plot(line[1], line[0], color="white", lw=0.8, alpha=0.6)
        y, x = np.rint(line[:, np.searchsorted(radius / h, (0.12, 0.24, 0.38, 0.56))]).astype(int)
        inside = (y > 0.04 * h) & (y < 0.96 * h) & (x > 0.04 * w) & (x < 0.96 * w)
        at = np.stack([y, x])[:, inside]
        offsets = swirl_offsets(h, w)[0][:, at[0], at[1]]
        for k in range(9):
            dots(ax, at + DRAWN * (np.array(divmod(k, 3))[:, None] - 1 + offsets[2 * k : 2 * k + 2]), RED, 5)
        dots(ax, at, GREEN, 6)
    ax.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))


def draw(lens: tuple[np.ndarray, np.ndarray], swirl: tuple[np.ndarray, np.ndarray], path: Path) -> None:
    """Four panels, 1200 pixels wide; 256 colours keep the file small."""
    h, w = lens[0].shape[2:]
    fig, axes = plt.subplots(2, 2, figsize=(12, 12 * h / w + 0.56), dpi=100, layout="constrained")
    edges = np.abs(swirl[1][0, 0])
    axes[0, 0].imshow(lens[0][0].transpose(1, 2, 0))
    axes[0, 1].imshow(lens[1][0].transpose(1, 2, 0).clip(0, 1))
    axes[1, 0].imshow(swirl[0][0].transpose(1, 2, 0))
    axes[1, 1].imshow(np.minimum(edges / np.quantile(edges, 0.995), 1) ** 0.8, cmap="inferno")
    draw_lens(axes[0, 0], h, w)
    draw_taps(axes[1, 0], *swirl[0].shape[2:])
    titles = (
        "Where the pixels of a lens look",
        "Through the lens",
        f"A 3x3 kernel turned by a swirl (drawn {DRAWN} times as large)",
        "Edges along the swirl",
    )
    for ax, title in zip(axes.flat, titles, strict=True):
        ax.set_title(title, fontsize=15)
        ax.axis("off")
    fig.canvas.draw()
    from PIL import Image

    picture = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256, kmeans=2).save(path, optimize=True)
    say(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    """Both jobs, then the figure."""
    parser = argparse.ArgumentParser(description="Deformable convolution on photographs, checked against scipy.")
    parser.add_argument("--image", help="a photograph to use instead of the two that come with scikit-learn")
    docs = Path(__file__).resolve().parent.parent / "docs"
    parser.add_argument("--out", type=Path, default=docs, help="folder for quickstart.png (default: docs)")
    args = parser.parse_args()
    start = time.perf_counter()
    say(f"numdcn {numdcn.__version__}, {numdcn.get_num_threads()} threads")

    x = load(args.image, "china.jpg")
    w = np.eye(3, dtype=np.float32)[:, :, None, None]
    say(f"1. through a lens: photograph {x.shape}, 1x1 kernel")
    offsets = lens_offsets(*x.shape[2:], LENS)
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
