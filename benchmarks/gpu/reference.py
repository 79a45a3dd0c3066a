"""Float64 results of a problem, computed on the CPU by numdcn, with the sums of their absolute terms; see
problems.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks.gpu.problems import Arrays, Expected, Problem

SIGNED = ("offsets", "rois", "points", "trans")  # coordinates: absolute values would move samples


def positive(arrays: Arrays, coordinates: tuple[str, ...] = SIGNED) -> Arrays:
    return {n: a if a is None or n in coordinates else np.abs(a) for n, a in arrays.items()}


def expected(problem: Problem) -> dict[str, Expected]:
    """y and every gradient."""
    if problem.operator == "deform_conv_layer":
        return _layer(problem)
    values = problem.call("forward", problem.arrays) | problem.call("backward", problem.arrays, problem.grad_y)
    terms, lengths = _terms(problem), _lengths(problem)
    return {name: Expected(value, terms[name], lengths[name]) for name, value in values.items()}


def _terms(problem: Problem) -> dict[str, np.ndarray]:
    """The sums of absolute terms of y and every gradient."""
    arrays, grad_y = positive(problem.arrays), np.abs(problem.grad_y)
    if problem.operator == "roi_pool":  # the positions of the maxima are those of x itself
        y = problem.call("forward", problem.arrays)["y"]
        return {"y": np.zeros_like(y), **problem.call("backward", problem.arrays, grad_y)}
    terms = problem.call("forward", arrays) | problem.call("backward", arrays, grad_y)
    if problem.operator == "deform_conv":
        terms["offsets"] = _offset_terms(problem, arrays, grad_y)
    elif problem.operator == "bilinear_sample":
        terms["points"] = _point_terms(problem, arrays, grad_y)
    elif problem.operator in ("deform_roi_pool", "deform_ps_roi_pool"):
        terms |= _shift_terms(problem, grad_y)
    return terms


def _offset_terms(problem: Problem, arrays: Arrays, grad_y: np.ndarray) -> np.ndarray:
    """For an offset's gradient: with |x| and |w|, the slope's two rows (or columns) are added instead of subtracted.
    These are the samples at the coordinate rounded down and at the next one, summed by a gradient of masks of ones."""
    offsets = arrays["offsets"]
    count, channels, *out = offsets.shape
    total = np.zeros_like(offsets).reshape(count, -1, 2, *out)
    mask = arrays["mask"] if arrays["mask"] is not None else np.ones((count, channels // 2, *out))
    for axis in (0, 1):
        for step in (0, 1):
            moved = offsets.reshape(total.shape).copy()
            moved[:, :, axis] = np.floor(moved[:, :, axis]) + step
            given = arrays | {"offsets": moved.reshape(offsets.shape), "mask": np.ones_like(mask)}
            total[:, :, axis] += problem.call("backward", given, grad_y, wrt="mask")["mask"]
        total[:, :, axis] *= mask
    return total.reshape(offsets.shape)


def _point_terms(problem: Problem, arrays: Arrays, grad_y: np.ndarray) -> np.ndarray:
    """For a point's gradient, likewise."""
    points = arrays["points"]
    total = np.zeros_like(points)
    for axis in (0, 1):
        for step in (0, 1):
            moved = points.copy()
            moved[..., axis] = np.floor(moved[..., axis]) + step
            y = problem.call("forward", arrays | {"points": moved})["y"]
            total[..., axis] += (grad_y * y).sum(1)
    return total


def _shift_terms(problem: Problem, grad_y: np.ndarray) -> dict[str, np.ndarray]:
    """For the gradients of bins' shifts: a slope is at most twice the largest pixel."""
    keywords, arrays = problem.keywords, problem.arrays
    corners = arrays["rois"][:, 1:] * keywords["spatial_scale"]
    sizes = np.maximum(corners[:, 2:] - corners[:, :2] + keywords["spatial_scale"], 0.1)  # along x, y
    slope = 2 * np.abs(arrays["x"]).max()
    if problem.operator == "deform_roi_pool":
        weights = (grad_y * arrays["mask"]).sum(1, keepdims=True)
        return {"offsets": keywords["gamma"] * slope * sizes[:, :, None, None] * weights}
    trans = arrays["trans"]
    classes = trans.shape[1] // 2
    weights = grad_y.reshape(len(trans), classes, -1).sum(-1)  # over all bins, which include the part's own
    reach = keywords["trans_std"] * slope * sizes[:, None, :] * weights[:, :, None]
    return {"trans": np.broadcast_to(reach.reshape(*trans.shape[:2], 1, 1), trans.shape)}


def _lengths(problem: Problem) -> dict[str, float]:
    """Approximately how many terms each result sums."""
    arrays, (n, c, *size) = problem.arrays, problem.arrays["x"].shape
    if "w" in arrays:
        per_group, taps = arrays["w"].shape[1], math.prod(arrays["w"].shape[2:])
        pixels = math.prod(problem.grad_y.shape[2:])
        per_output = arrays["w"].shape[0] * per_group // c
        visits = taps * (1 + pixels / math.prod(size))
        moved = 4 * per_output * c
        if arrays.get("offsets") is not None:
            moved //= arrays["offsets"].shape[1] // (2 * taps)
        lengths = {"y": per_group * taps, "x": per_output * visits, "w": n * pixels, "bias": n * pixels}
        return lengths | {"offsets": moved, "mask": moved}
    results = math.prod(problem.grad_y.shape[2:]) * len(problem.grad_y)
    touched = 16 + 4 * results / (n * math.prod(size))
    return dict.fromkeys(("y", "x"), touched) | dict.fromkeys(("points", "offsets", "mask", "trans"), 16.0 * c)


def _layer(problem: Problem) -> dict[str, Expected]:
    """The layer, as the predicting convolution and the deformable one."""
    import numdcn

    arrays, keywords = problem.arrays, problem.keywords
    r: Any = numdcn.deform_conv_layer_forward(**arrays, **keywords)
    values: dict[str, Any] = {"y": r.y}
    values |= problem.call("backward", arrays, problem.grad_y)
    given: Arrays = {name: arrays[name] for name in ("x", "w", "bias")} | {"offsets": r.offsets, "mask": r.mask}
    inner = Problem("deform_conv", given, {"padding": keywords["padding"]}, problem.grad_y)
    terms, lengths = _terms(inner), _lengths(inner)
    mask = np.asarray(r.mask)
    grad_z = np.concatenate([terms["offsets"], terms["mask"] * mask * (1 - mask)], axis=1)
    positives = (grad_z, np.abs(arrays["x"]), np.abs(arrays["offset_w"]), arrays["offset_b"])
    through: Any = numdcn.conv_backward(*positives, padding=keywords["padding"])
    terms |= {"x": terms["x"] + through.x, "offset_w": through.w, "offset_b": through.bias}
    # predictions and their gradients are rounded before use: a few terms per tap, not a sum of many
    few = dict.fromkeys(values, 16.0)
    return {
        name: Expected(value, terms[name], min(lengths.get(name, 16.0), few[name])) for name, value in values.items()
    }
