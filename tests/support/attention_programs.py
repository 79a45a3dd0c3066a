"""Run in the device server by test_attention.py: the GPU kernels of weighted samples, on arrays in many layouts."""

import numpy as np
from checks import LAYOUTS
from memory_programs import on_device

from numdcn._call.attention import AttentionArrays
from numdcn._call.options import Options
from numdcn._cuda.attention import run

PADDING = 3  # channels of a packed array that belong to nothing


def gaps(array):
    """Adjacent along the last axis, with one NaN before the next row: no row but the first is at a multiple of 16 bytes."""
    wide = np.full((*array.shape[:-1], array.shape[-1] + 1), np.nan, array.dtype)
    wide[..., :-1] = array
    return wide[..., :-1]


LAID_OUT = {**LAYOUTS, "plain": np.ascontiguousarray, "packed": np.ascontiguousarray, "gaps": gaps}


def packed_views(there, shape):
    """Views of points and weights in a packed array (B, Q, M * 3T + PADDING), as DCNv4 has them."""
    b, q, m, t = shape
    row = m * 3 * t + PADDING
    points = there.view((b, q, m, t, 2), (q * row, row, 3 * t, 2, 1))
    return points, there.view(shape, (q * row, row, 3 * t, 1), 2 * t)


def packed(points, weights):
    """The packed array of points and weights; the padding is NaN."""
    b, q, m, t = weights.shape
    made = np.full((b, q, m * 3 * t + PADDING), np.nan, points.dtype)
    groups = made[..., : m * 3 * t].reshape(b, q, m, 3 * t)
    groups[..., : 2 * t], groups[..., 2 * t :] = points.reshape(b, q, m, 2 * t), weights
    made[..., : m * 3 * t] = groups.reshape(b, q, m * 3 * t)
    return made


def on_devices(arrays, layout):
    """({name: host's array}, the library's views) of arrays in a layout."""
    value, points, weights = (arrays[name] for name in ("value", "points", "weights"))
    if layout == "packed":
        made, there = on_device(packed(points, weights))
        image, image_there = on_device(value.copy())
        return {"value": image, "packed": made}, (image_there, *packed_views(there, weights.shape))
    both = {name: on_device(LAID_OUT[layout](array)) for name, array in arrays.items()}
    return {name: made for name, (made, _) in both.items()}, tuple(both[name][1] for name in AttentionArrays._fields)


def read_back(made, shape):
    """{name: array} of what `on_devices` made."""
    found = {name: array.copy_to_host() for name, array in made.items()}
    if "packed" in found:
        b, q, m, t = shape
        every = found.pop("packed")
        groups = every[..., : m * 3 * t].reshape(b, q, m, 3 * t)
        found["points"], found["weights"] = groups[..., : 2 * t].reshape(b, q, m, t, 2), groups[..., 2 * t :]
        found["padding"] = every[..., m * 3 * t :]
    return {name: np.array(array) for name, array in found.items()}


def forward(p, arrays, layout="plain"):
    """(y, the arrays as they are afterwards)"""
    made, there = on_devices(arrays, layout)
    shape = (p.batch, p.queries, p.heads, p.channels)
    y, target = on_device(LAID_OUT[layout](np.full(shape, np.nan, arrays["value"].dtype)))
    run.forward(p, AttentionArrays(*there), target, Options())
    return y.copy_to_host(), read_back(made, arrays["weights"].shape)


def backward(p, grad_y, arrays, deterministic=False, layout="plain", wanted=AttentionArrays._fields):
    """{name: gradient}"""
    _, there = on_devices(arrays, layout)
    blank = {name: np.full(array.shape, np.nan, array.dtype) for name, array in arrays.items()}
    made, targets = on_devices(blank, layout)
    _, gradient = on_device(LAID_OUT[layout](grad_y))
    chosen = AttentionArrays(
        *(a if n in wanted else None for n, a in zip(AttentionArrays._fields, targets, strict=True))
    )
    run.backward(p, gradient, AttentionArrays(*there), chosen, Options(deterministic=deterministic))
    return read_back(made, arrays["weights"].shape)
