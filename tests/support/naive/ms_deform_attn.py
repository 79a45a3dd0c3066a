"""Multi-scale deformable attention, written from its formulas: plain NumPy, slow, and independent of numdcn.

Section f of docs/semantics.md. Shapes: value (n, s, m, d), sampling_locations (n, q, m, l, p, 2) or (n, q, m, t, 2) with
(x, y), attention_weights likewise, y (n, q, m*d).
"""

import math
from typing import NamedTuple

import numpy as np

from . import weighted


class Gradients(NamedTuple):
    value: np.ndarray
    sampling_locations: np.ndarray
    attention_weights: np.ndarray


@np.errstate(invalid="ignore", over="ignore")
def forward(value, spatial_shapes, sampling_locations, attention_weights, *, points_per_level=None):
    batch, queries, heads, depth = *sampling_locations.shape[:3], value.shape[3]
    value, y = np.asarray(value, np.float64), np.zeros((batch, queries, heads, depth))
    locations, weights = _flat(sampling_locations, attention_weights)
    for pixels, points, size in _levels(spatial_shapes, sampling_locations, points_per_level):
        for n, m in np.ndindex(batch, heads):
            image = value[n, pixels, m].reshape(*size, depth)
            y[n, :, m] += weighted.forward(
                image, *_positions(locations[n, :, m, points], size), weights[n, :, m, points]
            )
    return y.reshape(batch, queries, heads * depth)


@np.errstate(invalid="ignore", over="ignore")
def backward(
    grad_y, value, spatial_shapes, sampling_locations, attention_weights, *, points_per_level=None, lower=-1.0
):
    """Gradients of sum(grad_y * forward(...)). For `lower` see `weighted.backward`."""
    batch, queries, heads, depth = *sampling_locations.shape[:3], value.shape[3]
    value = np.asarray(value, np.float64)
    grad_y = np.asarray(grad_y, np.float64).reshape(batch, queries, heads, depth)
    locations, weights = _flat(sampling_locations, attention_weights)
    g_value, g_locations, g_weights = np.zeros(value.shape), np.zeros(locations.shape), np.zeros(weights.shape)
    for pixels, points, size in _levels(spatial_shapes, sampling_locations, points_per_level):
        for n, m in np.ndindex(batch, heads):
            image, at = value[n, pixels, m].reshape(*size, depth), _positions(locations[n, :, m, points], size)
            g_image, g_y, g_x, g_weights[n, :, m, points] = weighted.backward(
                grad_y[n, :, m], image, *at, weights[n, :, m, points], lower
            )
            g_value[n, pixels, m] = g_image.reshape(-1, depth)
            g_locations[n, :, m, points, 0], g_locations[n, :, m, points, 1] = size[1] * g_x, size[0] * g_y
    return Gradients(g_value, g_locations.reshape(sampling_locations.shape), g_weights.reshape(attention_weights.shape))


def _levels(spatial_shapes, sampling_locations, points_per_level):
    """(the pixels of a level, its points, (height, width))"""
    sizes = [tuple(map(int, size)) for size in spatial_shapes]
    counts = [sampling_locations.shape[4]] * len(sizes) if points_per_level is None else points_per_level
    pixel = point = 0
    for (height, width), count in zip(sizes, counts, strict=True):
        yield slice(pixel, pixel + height * width), slice(point, point + int(count)), (height, width)
        pixel, point = pixel + height * width, point + int(count)


def _flat(sampling_locations, attention_weights):
    """Both with all points of a query and head on one axis."""
    rows = *attention_weights.shape[:3], math.prod(attention_weights.shape[3:])
    return sampling_locations.reshape(*rows, 2), attention_weights.reshape(rows)


def _positions(locations, size):
    """(p_y, p_x) of locations (q, t, 2)."""
    return tuple(weighted.position(-0.5, float(size[a]), 0.0, locations[..., 1 - a]) for a in (0, 1))
