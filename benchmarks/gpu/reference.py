"""Float64 results of a problem, computed on the CPU by numdcn, with the sums of their absolute terms; see
problems.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks.cases.windows import pack, unpack
from benchmarks.gpu.problems import CASES, Arrays, Expected, Problem

# Coordinates: absolute values would move samples, and they may be float32 beside half images.
SIGNED = ("offsets", "rois", "points", "trans", "sampling_locations")


def positive(arrays: Arrays, coordinates: tuple[str, ...] = SIGNED) -> Arrays:
    return {n: a if a is None or n in coordinates else np.abs(a) for n, a in arrays.items()}


def expected(problem: Problem) -> dict[str, Expected]:
    """y and every gradient."""
    if problem.operator == "deform_conv_layer":
        return _layer(problem)
    if problem.operator == "dcnv4":
        return _packed(problem)
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
    if problem.operator in CASES:
        terms[_names(problem.operator)[0]] = _weighted_point_terms(problem, arrays, grad_y)
    elif problem.operator == "deform_conv":
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


def _names(operator: str) -> tuple[str, str]:
    """The arrays of points and of weights."""
    return ("sampling_locations", "attention_weights") if operator == "ms_deform_attn" else ("offsets", "mask")


def _weighted_point_terms(problem: Problem, arrays: Arrays, grad_y: np.ndarray) -> np.ndarray:
    """For the gradient of a location or an offset, likewise. Bases, taps and offset_scale are whole
    numbers, so an offset times the latter is as far beyond a pixel as its sample; a location in pixels of its level is
    half a pixel farther."""
    points, weights = _names(problem.operator)
    at = arrays[points].reshape(*arrays[weights].shape, 2)
    half, scale = 0.0, np.full(2, problem.keywords.get("offset_scale", 1.0))
    if problem.operator == "ms_deform_attn":
        half, scale = 0.5, np.array(problem.keywords["spatial_shapes"], np.float64)[:, None, ::-1]
        counts = problem.keywords.get("points_per_level")
        scale = scale if counts is None else np.repeat(scale[:, 0], counts, axis=0)
    cell, total = np.floor(at * scale - half) + half, np.zeros_like(at)
    for axis in (0, 1):
        for step in (0, 1):
            moved = at.copy()
            moved[..., axis] = ((cell + step) / scale)[..., axis]
            given = arrays | {points: moved.reshape(arrays[points].shape)}
            total[..., axis] += problem.call("backward", given, grad_y, wrt=weights)[weights]
    return (scale * arrays[weights][..., None] * total).reshape(arrays[points].shape)


def _packed(problem: Problem) -> dict[str, Expected]:
    """dcnv4, as dcnv3."""
    keywords, both = dict(problem.keywords), problem.arrays["offset_mask"]
    groups = keywords.pop("groups")
    offsets, mask = unpack(both, groups, _points_of(keywords))
    given = {"x": problem.arrays["x"], "offsets": offsets, "mask": mask}
    found = expected(Problem("dcnv3", given, keywords, problem.grad_y))
    moved, weighted = found.pop("offsets"), found.pop("mask")
    value, terms = (pack(a, b, groups, both.shape[3]) for a, b in zip(moved[:2], weighted[:2], strict=True))
    return found | {"offset_mask": Expected(value, terms, moved.length)}


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
    if problem.operator in CASES:
        return _weighted_lengths(problem)
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


def _points_of(keywords: dict[str, Any]) -> int:
    """The points of a group of dcnv3 or dcnv4."""
    return math.prod(keywords.get("kernel_size", (3, 3))) - keywords.get("remove_center", False)


def _weighted_lengths(problem: Problem) -> dict[str, float]:
    """The same for ms_deform_attn and dcnv3; of value, in the level whose pixels are touched most often."""
    arrays, (points, weights) = problem.arrays, _names(problem.operator)
    if problem.operator == "ms_deform_attn":
        image, levels, shape = "value", problem.keywords["spatial_shapes"], arrays[weights].shape
        heads, count = shape[2], math.prod(shape[3:])
    else:
        image, levels, count = "x", [arrays["x"].shape[1:3]], _points_of(problem.keywords)
        heads = arrays[weights].shape[3] // count
    samples = arrays[weights].size / (len(arrays[image]) * heads * len(levels))  # of a head and level
    lengths = {"y": 4.0 * count, image: 16 + 4 * samples / min(map(math.prod, levels))}
    return lengths | dict.fromkeys((points, weights), 4.0 * problem.grad_y.shape[-1] / heads)


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
