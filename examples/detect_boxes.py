"""Deformable RoI pooling on photographs: the bins of a box follow the object when the camera turns, moves and tilts.

    python examples/detect_boxes.py [--image PATH] [--out FOLDER]

Each photograph has a hand-drawn box around an object, and a second view, computed as another camera would see it, in
which the box is still in its old place and so no longer fits. Gradient descent through `deform_roi_pool_backward` finds
offsets with which each bin pools in the second view what the plain bin pools in the photograph. It uses only the pooled
colours, and a preference of bins for staying with their neighbours. The camera's movement is known, so the final
distance of each bin from where it belongs is printed and checked, and so are the gradients; the exit code is 1 if
anything is off. (Distances are not checked with a photograph of your own, which may lack detail.) Draws
detect_boxes.png.
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn.datasets import load_sample_image

import numdcn

BINS = 7  # along each axis of a box
GAMMA = 0.1  # an offset of 1 moves a bin by this fraction of the box
STIFFNESS = (3e-3, 3e-4)  # of the net of bins, one value per stage of the descent
STEPS = 50  # per stage
SOFTEST = 1e-3  # curvature assumed for a bin on its own, without stiffness
MOMENTUM = 0.85
PATCH = 24  # pixels per bin in the figure
DOCS = Path(__file__).resolve().parent.parent / "docs"
EPS = float(np.finfo(np.float32).eps)
YELLOW, BLUE, GREEN = "#ffd400", "#38b6ff", "#35ff5e"
say = functools.partial(print, flush=True)  # show progress immediately


class Shot(NamedTuple):
    """A hand-drawn box, and how the second camera differs."""

    sample: str  # a sample image of scikit-learn
    name: str
    box: tuple[float, float, float, float]  # x1, y1, x2, y2
    turn: float  # degrees
    zoom: float
    shift: tuple[float, float]  # pixels, x and y
    tilt: tuple[float, float]  # perspective: growth of the distance per pixel to the right, and downwards


SHOTS = (
    Shot("china.jpg", "pagoda", (62, 26, 356, 392), 13, 0.96, (52, 4), (-1e-4, 1.5e-4)),
    Shot("flower.jpg", "dahlia", (172, 86, 450, 360), -16, 1.08, (-38, 22), (2e-4, 1e-4)),
)


class Scene(NamedTuple):
    """Photographs and second views (N, 3, H, W), boxes (N, 5), and where the centres of their bins belong (N, 2, 7, 7)."""

    photo: np.ndarray
    view: np.ndarray
    rois: np.ndarray
    truth: np.ndarray  # movements in pixels, x first

    @property
    def size(self) -> np.ndarray:
        """Width and height of each box (N, 2, 1, 1), the unit of movements."""
        return (self.rois[:, 3:] - self.rois[:, 1:3])[:, :, None, None].astype(np.float64)


def load(path: str | None, sample: str) -> np.ndarray:
    """A photograph (1, 3, H, W), float32 in 0 to 1: the file at `path`, or a sample image of scikit-learn."""
    image = np.atleast_3d(load_sample_image(sample) if path is None else imread(path))
    image = image[..., : 3 if image.shape[2] > 2 else 1] / (255.0 if image.dtype == np.uint8 else 1.0)  # drop alpha
    step = -(-max(image.shape[:2]) // 1600)  # subsample large images
    image = image[::step, ::step].transpose(2, 0, 1)[None]
    return np.repeat(image, 3 // image.shape[1], axis=1).astype(np.float32)  # grey becomes three equal channels


def check(what: str, error: float, allowed: float) -> None:
    """Print an error; exit with code 1 if it is larger than allowed."""
    say(f"   {what:<44}{error:.1e}   (allowed {allowed:.1e})")
    if not error <= allowed:
        sys.exit(f"FAILED: {what}: {error:.3e} is more than {allowed:.3e}")


def camera(shot: Shot) -> np.ndarray:
    """The homography (3, 3) that maps pixels (x, y, 1) of the photograph to those of the second view."""
    (x, y), angle = np.add(shot.box[:2], shot.box[2:]) / 2, np.deg2rad(shot.turn)
    c, s = shot.zoom * np.cos(angle), shot.zoom * np.sin(angle)
    there = np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1]])
    back = np.array([[1, 0, x + shot.shift[0]], [0, 1, y + shot.shift[1]], [0, 0, 1]])
    return np.asarray(back @ np.array([[c, -s, 0], [s, c, 0], [*shot.tilt, 1]]) @ there)


def through(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (2, ...), x first, mapped by a homography."""
    seen = np.tensordot(homography, np.concatenate([points, np.ones_like(points[:1])]), axes=1)
    return np.asarray(seen[:2] / seen[2])


def second_view(photo: np.ndarray, homography: np.ndarray) -> np.ndarray:
    """The photograph (1, 3, H, W) as the other camera sees it; black beyond its edges."""
    rows, columns = np.mgrid[0 : photo.shape[2], 0 : photo.shape[3]].astype(np.float64)
    x, y = through(np.linalg.inv(homography), np.stack([columns, rows]))
    return numdcn.bilinear_sample_forward(photo, np.stack([y, x], axis=-1)[None].astype(np.float32))


def centres(rois: np.ndarray) -> np.ndarray:
    """Centres of the plain bins of boxes (R, 5), in pixels: (R, 2, 7, 7), x first."""
    step = (np.arange(BINS) + 0.5) / BINS
    grid = np.stack(np.meshgrid(step, step))
    first, last = rois[:, 1:3, None, None].astype(np.float64), rois[:, 3:, None, None]
    return np.asarray(first - 0.5 + (last - first) * grid)  # pixel i is centred at i here, at i + 0.5 for boxes


def scene(shots: tuple[Shot, ...], path: str | None) -> Scene:
    """All photographs, views and boxes as one batch."""
    photos = [load(path, shot.sample) for shot in shots]
    views = [second_view(photo, camera(shot)) for photo, shot in zip(photos, shots, strict=True)]
    rois = np.array([(n, *shot.box) for n, shot in enumerate(shots)], np.float32)
    at = centres(rois)
    truth = np.stack([through(camera(shot), here) - here for here, shot in zip(at, shots, strict=True)])
    return Scene(np.concatenate(photos), np.concatenate(views), rois, truth)


def offsets_of(moves: np.ndarray, size: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """Offsets that move bins by `moves` pixels."""
    return np.asarray(moves / (GAMMA * size), dtype)


def pool(x: np.ndarray, s: Scene, moves: np.ndarray) -> np.ndarray:
    """Means of moved bins, (N, 3, 7, 7)."""
    return numdcn.deform_roi_pool_forward(x, s.rois, offsets_of(moves, s.size), output_size=BINS, gamma=GAMMA)


def loss(y: np.ndarray, wanted: np.ndarray) -> float:
    """Half the sum of squared differences, whose gradient with respect to y is y - wanted."""
    return float(((y - wanted).astype(np.float64) ** 2).sum() / 2)


def bending() -> np.ndarray:
    """Quadratic form (49, 49) of the bending energy of the net: squared second differences of its nodes' movements.

    It is zero for a net that is shifted, rotated, scaled or sheared as a whole.
    """
    one, slope, bend = (np.diff(np.eye(BINS), n, axis=0) for n in range(3))
    one, slope, bend = one.T @ one, slope.T @ slope, bend.T @ bend
    return np.asarray(np.kron(bend, one) + 2 * np.kron(slope, slope) + np.kron(one, bend))


def off_by(moves: np.ndarray, s: Scene) -> np.ndarray:
    """The distance of each bin from where it belongs, in pixels: (N, 7, 7)."""
    return np.hypot(*np.moveaxis(moves - s.truth, 1, 0))


def tell(what: str, s: Scene, moves: np.ndarray, wanted: np.ndarray) -> float:
    """Print how well moved bins do; returns their loss."""
    far, now = off_by(moves, s), loss(pool(s.view, s, moves), wanted)
    say(f"   {what:<28} loss {now:8.5f}   off by {far.mean():5.2f} px, at most {far.max():5.2f}")
    return now


def find(s: Scene, wanted: np.ndarray) -> np.ndarray:
    """Movements (N, 2, 7, 7) with which the bins see in the second view what is wanted: gradient descent with momentum.

    The loss is that of the pooled colours plus the bending energy of the net. Gradients are divided by the curvature of
    the latter, so that bins that see only sky move with their neighbours.
    """
    moves, speed = np.zeros((2, *s.truth.shape))
    form = bending()
    for stiffness in STIFFNESS:
        smooth = np.linalg.inv(SOFTEST * np.eye(BINS**2) + stiffness * form)
        for _ in range(STEPS):
            y = pool(s.view, s, moves)
            g = numdcn.deform_roi_pool_backward(
                y - wanted, s.view, s.rois, offsets_of(moves, s.size), output_size=BINS, gamma=GAMMA, wrt="offsets"
            )
            assert g.offsets is not None
            slope = (g.offsets / (GAMMA * s.size)).reshape(-1, BINS**2)  # with respect to the movements
            slope = slope + stiffness * moves.reshape(slope.shape) @ form
            speed = MOMENTUM * speed - (slope @ smooth).reshape(speed.shape)
            moves = moves + speed
        tell(f"{STEPS} steps, stiffness {stiffness:g}", s, moves, wanted)
    return moves


def check_zero(s: Scene, wanted: np.ndarray) -> None:
    """Deformable RoI pooling with zero offsets is RoI align."""
    error = np.abs(pool(s.photo, s, np.zeros_like(s.truth)) - wanted).max()
    check("zero offsets against roi_align: difference", float(error), EPS * sum(s.photo.shape[2:]))


def check_differences(s: Scene, moves: np.ndarray, wanted: np.ndarray) -> None:
    """Compare steep gradients of the loss with respect to the offsets, at half the movements, with central differences
    in float64."""
    view, rois, target = (a.astype(np.float64) for a in (s.view, s.rois, wanted))
    offsets = offsets_of(moves / 2, s.size, np.float64)
    step = 1e-7  # millionths of a pixel: hardly any sample leaves its cell
    y = numdcn.deform_roi_pool_forward(view, rois, offsets, output_size=BINS, gamma=GAMMA)
    g = numdcn.deform_roi_pool_backward(
        y - target, view, rois, offsets, output_size=BINS, gamma=GAMMA, wrt="offsets"
    ).offsets
    assert g is not None
    for element in np.argsort(-np.abs(g), axis=None, kind="stable")[: g.size // 4 : g.size // 12]:
        sides = []
        for side in (step, -step):
            moved = offsets.copy()
            moved.flat[element] += side
            sides.append(numdcn.deform_roi_pool_forward(view, rois, moved, output_size=BINS, gamma=GAMMA))
        slope = float(((sides[0] - sides[1]) * ((sides[0] + sides[1]) / 2 - target)).sum() / (2 * step))
        check(f"d loss / d offset {slope:+.6f}, by differences", abs(slope - g.flat[element]), 1e-5 * abs(slope))


def compare(s: Scene, moves: np.ndarray, name: str) -> None:
    """What related operators give for the first box, in the photograph and in the second view."""
    photo, view, box = s.photo[:1], s.view[:1], s.rois[:1]
    moves, size = moves[:1], s.size[:1]
    offsets = offsets_of(moves, size)
    say(f"   pooled colours of the {name}: root mean square difference of view and photograph")
    means = numdcn.roi_align_forward(photo, box, BINS, aligned=True)
    rows = {
        "roi_pool (maximum)": numdcn.roi_pool_forward(view, box, BINS) - numdcn.roi_pool_forward(photo, box, BINS),
        "roi_align (mean)": numdcn.roi_align_forward(view, box, BINS, aligned=True) - means,
        "deform_roi_pool": numdcn.deform_roi_pool_forward(view, box, offsets, output_size=BINS, gamma=GAMMA) - means,
    }
    for what, difference in rows.items():
        say(f"      {what:<36}{np.sqrt((difference**2).mean()):8.3f}")
    # position-sensitive maps, one per bin: how close each pixel is to the colour this bin should see, at most 1
    parts = means.reshape(3, BINS**2, 1, 1)
    like = [np.exp(-((x[0, :, None] - parts) ** 2).sum(axis=0) / 0.02)[None] for x in (photo, view)]
    trans = offsets_of(moves, size + 1)  # it includes both ends of a box
    votes = {
        "ps_roi_pool": [numdcn.ps_roi_pool_forward(x, box, BINS) for x in like],
        "ps_roi_align": [numdcn.ps_roi_align_forward(x, box, BINS) for x in like],
        "deform_ps_roi_pool": [
            numdcn.deform_ps_roi_pool_forward(x, box, t, output_size=BINS, group_size=BINS, trans_std=GAMMA)
            for x, t in zip(like, (None, trans), strict=True)
        ],
    }
    say("   how confident its bins are of seeing their parts, using maps like R-FCN's: in the photograph, in the view")
    for what, (there, here) in votes.items():
        say(f"      {what:<36}{there.mean():8.3f}{here.mean():8.3f}")


def patchwork(x: np.ndarray, n: int, s: Scene, moves: np.ndarray) -> np.ndarray:
    """What the bins of box n see, side by side, with each bin as its own box for `roi_align_forward`."""
    middle = (centres(s.rois) + moves)[n].reshape(2, -1).T + 0.5
    half = s.size[n].ravel() / BINS / 2
    rois = np.column_stack([np.full(BINS**2, n), middle - half, middle + half]).astype(np.float32)
    patches = numdcn.roi_align_forward(x, rois, PATCH, aligned=True)  # (49, 3, PATCH, PATCH)
    rows = patches.reshape(BINS, BINS, 3, PATCH, PATCH).transpose(0, 3, 1, 4, 2)
    return np.asarray(rows.reshape(BINS * PATCH, BINS * PATCH, 3))


def draw_net(ax: Axes, s: Scene, n: int, moves: np.ndarray, colour: str) -> None:
    """A box, the net of its bins' centres, and nine of its bins."""
    x1, y1, x2, y2 = s.rois[n, 1:] - 0.5
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=YELLOW, lw=2.5))
    net = (centres(s.rois)[n] + moves[n]).transpose(1, 2, 0)
    ax.add_collection(LineCollection([*net, *net.transpose(1, 0, 2)], colors="white", lw=1.2))
    w, h = s.size[n].ravel() / BINS
    for x, y in net[::3, ::3].reshape(-1, 2):
        ax.add_patch(Rectangle((x - w / 2, y - h / 2), w, h, fill=False, ec=colour, lw=1.6))
    ax.plot(*net.reshape(-1, 2).T, "o", color=colour, ms=4.5, mec="black", mew=0.6, snap=False)


def draw(s: Scene, moves: np.ndarray, path: Path) -> None:
    """A row of photographs for each box, below each what its bins see and pool; 256 colours keep the file small."""
    n_shots, _, h, w = s.photo.shape
    still = np.zeros_like(moves)
    columns = [
        ("The box, and its 7x7 bins", s.photo, still, YELLOW),
        ("The camera moved: bins {:.0f} px off", s.view, still, BLUE),
        ("Offsets found: bins {:.1f} px off", s.view, moves, GREEN),
    ]
    fig = Figure(figsize=(12, n_shots * (4 * h / w + 2.6)), dpi=100, layout="constrained")
    grid = fig.add_gridspec(2 * n_shots, 6, height_ratios=[4 * h / w, 2] * n_shots)
    for n, (width, height) in enumerate(s.size.reshape(-1, 2)):
        for column, (title, x, shifts, colour) in enumerate(columns):
            ax = fig.add_subplot(grid[2 * n, 2 * column : 2 * column + 2])
            ax.imshow(x[n].transpose(1, 2, 0).clip(0, 1))
            ax.autoscale(False)
            ax.set_title(title.format(off_by(shifts, s)[n].mean()), fontsize=14)
            draw_net(ax, s, n, shifts, colour)
            ax.set_axis_off()
            pooled = pool(x, s, shifts)[n].transpose(1, 2, 0)
            below = {"what each bin sees": patchwork(x, n, s, shifts), "its mean: what is pooled": pooled}
            for k, (caption, picture) in enumerate(below.items()):
                ax = fig.add_subplot(grid[2 * n + 1, 2 * column + k])
                ax.imshow(picture.clip(0, 1), interpolation="nearest", aspect=height / width)
                ax.set_title(caption, fontsize=11)
                ax.set_axis_off()
    fig.savefig(full := io.BytesIO())
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(full).convert("RGB").quantize(256, kmeans=1).save(path, optimize=True)
    say(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    """Find the offsets, check them, compare, draw."""
    parser = argparse.ArgumentParser(description="Deformable RoI pooling on photographs: bins that follow an object.")
    parser.add_argument("--image", help="a photograph to use instead of scikit-learn's two; its middle is boxed")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for detect_boxes.png (default: docs)")
    args = parser.parse_args()
    start = time.perf_counter()
    say(f"numdcn {numdcn.__version__}, threads: {numdcn.get_num_threads()}")
    shots: tuple[Shot, ...] = SHOTS
    if args.image is not None:
        h, w = load(args.image, "").shape[2:]
        box = (round(0.25 * w), round(0.2 * h), round(0.7 * w), round(0.85 * h))
        shots = (SHOTS[0]._replace(name="object", box=box, tilt=(-0.1 / w, 0.1 / h)),)
    s = scene(shots, args.image)
    say(f"photographs {s.photo.shape}, boxes: " + ", ".join(f"{shot.name} {shot.box}" for shot in shots))
    wanted = numdcn.roi_align_forward(s.photo, s.rois, BINS, aligned=True)
    check_zero(s, wanted)

    still = np.zeros_like(s.truth)
    say("1. moving bins to see in the second view what they saw in the photograph")
    before = tell("plain bins", s, still, wanted)
    moves = find(s, wanted)
    tell("bins where they belong", s, s.truth, wanted)
    check_differences(s, moves, wanted)
    if args.image is None:
        check("loss after / before", loss(pool(s.view, s, moves), wanted) / before, 0.01)
        for shot, far in zip(shots, off_by(moves, s), strict=True):
            check(f"bins of the {shot.name}: mean distance, pixels", float(far.mean()), 3.0)
    say("2. other ways to pool the same box")
    compare(s, moves, shots[0].name)
    draw(s, moves, args.out / "detect_boxes.png")
    say(f"all checks passed, {time.perf_counter() - start:.1f} s in total")


if __name__ == "__main__":
    main()
