"""The data of train_digits.py: scikit-learn's digits, enlarged, then rotated, scaled and shifted at random."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import zoom
from sklearn.datasets import load_digits

import numdcn

SIZE = 28  # height and width of an image, in pixels
TURN = 60  # degrees at most, either way
SCALES = (0.7, 1.5)  # of a digit 16 pixels high
SHIFT = 4  # pixels at most, along each axis, either way
TRAIN, TEST = 1200, 597  # digits
INK = 3  # value of the brightest pixel, giving a standard deviation near 1 with a background of 0


class Digits(NamedTuple):
    """Digits (N, 1, 20, 20), 16 pixels high, and their labels (N,)."""

    images: np.ndarray
    labels: np.ndarray


def load(train: int = TRAIN, test: int = TEST) -> tuple[Digits, Digits]:
    """Training digits and test digits, each enlarged to twice its 8x8 pixels, with a margin."""
    flat, labels = load_digits(return_X_y=True)
    small = np.pad(flat.reshape(-1, 8, 8) / 16, ((0, 0), (1, 1), (1, 1)))
    large = zoom(small, (1, 2, 2), order=3, mode="grid-constant", grid_mode=True).clip(0, 1)
    images = (INK * large[:, None]).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    first, second = order[:TRAIN][:train], order[TRAIN:][:test]
    return Digits(images[first], labels[first]), Digits(images[second], labels[second])


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random transformations (count, 4), float32: angle in radians, scale, shift down, shift to the right."""
    angles = np.deg2rad(rng.uniform(-TURN, TURN, count))
    scales = np.exp(rng.uniform(np.log(SCALES[0]), np.log(SCALES[1]), count))
    return np.stack([angles, scales, *rng.uniform(-SHIFT, SHIFT, (2, count))], axis=1).astype(np.float32)


def transform(images: np.ndarray, transformations: np.ndarray) -> np.ndarray:
    """Images (N, 1, 28, 28) of digits, each transformed: each pixel samples the point it came from."""
    angles, scales = transformations[:, 0, None, None], transformations[:, 1, None, None]
    shifts = transformations[:, 2:, None, None]
    pixels = np.mgrid[:SIZE, :SIZE].astype(np.float32) - np.float32((SIZE - 1) / 2)
    y, x = np.moveaxis(pixels - shifts, 1, 0)  # from the digit's centre
    cos, sin = np.cos(angles) / scales, np.sin(angles) / scales
    points = np.stack([cos * y + sin * x, cos * x - sin * y], axis=-1)
    return numdcn.bilinear_sample_forward(images, points + np.float32((images.shape[-1] - 1) / 2))


def posed(test: Digits, copies: int) -> Digits:
    """Every test digit in `copies` transformations, always the same ones: first all digits in their first one, and
    so on."""
    count = copies * len(test.labels)
    images = np.tile(test.images, (copies, 1, 1, 1))
    return Digits(transform(images, draw(np.random.default_rng(1), count)), np.tile(test.labels, copies))
