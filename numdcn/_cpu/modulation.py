"""A deformable layer's arithmetic between its two convolutions, in NumPy: masks from logits and back."""

from __future__ import annotations

import numpy as np


def split_prediction(z: np.ndarray, channels: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `channels` of z, which are offsets, and scale * sigmoid of the rest."""
    logits = z[:, channels:]
    with np.errstate(over="ignore", under="ignore"):  # exp may overflow to infinity: the mask is then 0
        return z[:, :channels], np.asarray(scale, z.dtype) / (1 + np.exp(-logits))


def join_gradients(grad_offsets: np.ndarray, grad_mask: np.ndarray, mask: np.ndarray, scale: int) -> np.ndarray:
    """The gradient of z, given those of the results of `split_prediction`."""
    with np.errstate(all="ignore"):
        grad_logits = grad_mask * mask * (1 - mask / scale)
    return np.concatenate([grad_offsets, grad_logits], axis=1)


def add_to(target: np.ndarray, other: np.ndarray) -> None:
    """target += other."""
    with np.errstate(all="ignore"):
        target += other
