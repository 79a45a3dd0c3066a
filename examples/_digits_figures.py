"""The two figures of train_digits.py: learning curves, and where a trained deformable network looks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import _digits_data as data
import _digits_net as net
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

import numdcn

COLOURS = {"plain": "#8a8a8a", "plain, wider": "#2a78c2", "plain, deeper": "#2f9e62", "deformable": "#e0402f"}
RED, GREEN = "#ff2a1f", "#35ff5e"
GRID = np.mgrid[-1:2, -1:2].reshape(2, 9).T.astype(np.float32)  # the taps of a 3x3 kernel from its centre: (9, 2)
SHOWN = (3, 7)  # labels of the test digits shown, in each of POSES
POSES = ((-55, 0.9), (0, 1.4), (55, 1.1))  # degrees, scale


def write(fig: Figure, path: Path) -> None:
    """Save as a PNG with 256 colours, which keeps the file small."""
    fig.savefig(full := io.BytesIO())
    Image.open(full).convert("RGB").quantize(256).save(path, optimize=True)
    print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


def curves(done: list[dict[str, Any]], path: Path) -> None:
    """Training loss and test error per epoch: the mean over the seeds, with their range as a band."""
    fig = Figure(figsize=(12, 4.6), dpi=100, layout="constrained")
    left, right = fig.subplots(1, 2)
    for name, colour in COLOURS.items():
        runs = [d for d in done if d["name"] == name]
        losses = np.array([d["curves"]["loss"] for d in runs])
        tests = np.array([d["tests"] for d in runs])  # (seeds, times, 2)
        of_loss = (left, np.arange(1, losses.shape[1] + 1), losses)
        for ax, epochs, values in (of_loss, (right, tests[0, :, 0], 100 * (1 - tests[:, :, 1]))):
            ax.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, lw=0)
            ax.plot(epochs, values.mean(axis=0), color=colour, lw=2, label=name)
    left.set_title("Loss in training (cross-entropy)")
    right.set_title("Wrong test digits, %")
    for ax, ticks in ((left, (0.1, 0.2, 0.5, 1, 2)), (right, (2, 3, 5, 10, 20, 50, 100))):
        ax.set(yscale="log", xlabel="epoch")
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    right.legend(loc="upper right", frameon=False)
    write(fig, path)


def taps(at: np.ndarray, stride: int, moved: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Where a layer looks from points (P, 2) of its output: points of its input (9*P, 2), and the masks there (9*P,).

    Offsets and masks between pixels are interpolated. If `moved` is empty, the grid of a plain layer.
    """
    points = stride * at[:, None] + GRID
    if not moved:
        return points.reshape(-1, 2), np.ones(points.size // 2, np.float32)
    offsets, mask = (numdcn.bilinear_sample_forward(moved[key], at[None])[0].T for key in ("offsets", "mask"))
    return (points + offsets.reshape(points.shape)).reshape(-1, 2), mask.ravel()


def looks(pixel: np.ndarray, conv2: dict[str, Any], conv3: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where a pixel of conv3 looks in the image, in pixels of the image: the 9 taps of conv3, and their 81 taps of
    conv2.

    A pixel of conv2's output covers two of the image, because conv1 has a stride of 2.
    """
    through_one, mask = taps(pixel[None], 2, conv3)
    through_two, masks = taps(through_one, 1, conv2)
    return [(2 * through_one, mask), (2 * through_two, np.repeat(mask, 9) * masks)]


def dots(ax: Axes, points: np.ndarray, mask: np.ndarray, size: float) -> None:
    """Points (P, 2), y then x, with areas proportional to the masks."""
    ax.scatter(points[:, 1], points[:, 0], s=size * mask, color=RED, edgecolor="white", linewidth=0.5)


def brightest(image: np.ndarray) -> np.ndarray:
    """Of the four central pixels of conv3's output, the one where the image (28, 28) is brightest: y, x."""
    corners = np.argwhere(np.ones((2, 2))) + 3
    return max(corners, key=lambda corner: image[tuple(4 * corner)]).astype(np.float32)


def points(params: net.Arrays, path: Path) -> None:
    """Some test digits in several poses, and where a pixel of conv3 looks; plain and deformable, one layer and two."""
    _, test = data.load()
    images = test.images[[np.flatnonzero(test.labels == label)[0] for label in SHOWN for _ in POSES]]
    poses = np.array([(np.deg2rad(turn), scale, 0, 0) for _ in SHOWN for turn, scale in POSES], np.float32)
    images = data.transform(images, poses)
    logits, saved = net.forward(params, images, net.NETWORKS["deformable"])
    fig = Figure(figsize=(12, 6.4), dpi=100, layout="constrained")
    fig.suptitle(
        "Where a pixel of the third layer looks (green: itself; red: its taps, with the mask as area)", fontsize=14
    )
    axes = fig.subplots(3, len(images))
    for k, image in enumerate(images):
        conv2, conv3 = ({key: value[k : k + 1] for key, value in saved[layer][1].items()} for layer in (1, 2))
        pixel = brightest(image[0])
        rows = (looks(pixel, {}, {})[1], *looks(pixel, conv2, conv3))
        for ax, (where, mask), size in zip(axes[:, k], rows, (22, 40, 22), strict=True):
            ax.imshow(image[0], cmap="gray", vmin=0, vmax=1.15 * data.INK)
            dots(ax, where, mask, size)
            ax.plot(4 * pixel[1], 4 * pixel[0], "o", color=GREEN, ms=8, mec="black", mew=0.8)
            ax.set(xlim=(-0.5, data.SIZE - 0.5), ylim=(data.SIZE - 0.5, -0.5), xticks=[], yticks=[])
    titles = ("plain\n81 taps of two layers", "deformable\n9 taps of one layer", "deformable\n81 taps of two layers")
    for ax, title in zip(axes[:, 0], titles, strict=True):
        ax.set_ylabel(title, fontsize=12)
    hits = (logits.argmax(axis=1) == np.repeat(SHOWN, len(POSES))).sum()
    print(f"digits in the figure that the deformable network recognises: {hits} of {len(images)}")
    write(fig, path)
