"""Random problems for every operator with float64 results from the CPU, and how far a result may be from them.

Numbers have eight significant bits and fit float16, and coordinates are sums and products of small binary fractions:
every type represents the same problem, and every order of computing coordinates gives the same cells. So one reference
serves all types.

Bounds. A sum of `length` products, rounded independently, is off by about eps*sqrt(length)*sum|terms|, with eps of the
type used for the sum, as in the tests (tests/support/checks.py); `terms` below is sum|terms|, from the same operator on
absolute values. float16 and bfloat16 results are rounded once more; if a product takes operands rounded on the way
(sampled columns, or tf32) each term is off by the operand's eps, independently of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import ms_deform_attn, windows
from benchmarks.cases.operators import operator as known

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "tf32": 2.0**-10, "float16": 2.0**-10, "bfloat16": 2.0**-7}
ROUNDINGS = 6  # of one term, in addition to those of the sum
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126}  # unit to which a result near 0 is rounded
Arrays = dict[str, Any]


class Problem(NamedTuple):
    """Arguments of one operator, float64."""

    operator: str
    arrays: Arrays  # by argument name; None if absent
    keywords: dict[str, Any]
    grad_y: np.ndarray
    rounded: bool = False  # whether products take operands rounded to the type of the arrays

    def call(self, direction: str, arrays: Arrays, grad_y: Any = None, **more: Any) -> dict[str, Any]:
        """Results by name: y, or the gradients under the arguments' names."""
        import numdcn

        function = getattr(numdcn, f"{self.operator}_{direction}")
        if direction == "forward":
            result = function(**arrays, **self.keywords, **more)
            return {"y": getattr(result, "y", result)}
        grads = function(grad_y, **arrays, **self.keywords, **more)
        return {name: grad for name, grad in grads._asdict().items() if grad is not None}


class Expected(NamedTuple):
    """The expected value of one result."""

    value: np.ndarray
    terms: np.ndarray  # sum of the absolute terms
    length: float  # number of terms

    def bound(self, dtype: str, rounded: bool) -> np.ndarray:
        """How far off a result of this type (or of float32 with tf32 products) may be."""
        precise = "float64" if dtype == "float64" else "float32"
        bound = EPS[precise] * (ROUNDINGS + math.sqrt(self.length)) * self.terms + np.finfo(precise).tiny
        if dtype == "float64":
            return 2 * bound  # the reference is no more accurate
        if dtype in SMALLEST:
            bound += EPS[dtype] * np.abs(self.value) + SMALLEST[dtype]
        if rounded and dtype in ("tf32", "float16", "bfloat16"):
            bound += EPS[dtype] * (np.abs(self.value) + 8 * self.terms / math.sqrt(self.length))
        return bound


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to bfloat16 (to nearest, halves to even), as float32. They must not be NaN or huge."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def common(values: np.ndarray) -> np.ndarray:
    """The numbers, rounded to values that both float16 and bfloat16 represent, as float32."""
    return to_bfloat16(values).astype(np.float16).astype(np.float32)


class Draw:
    """Random numbers that every type can represent."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> np.ndarray:
        return common(self.rng.standard_normal(shape, np.float32)).astype(np.float64)

    def grid(self, low: float, high: float, step: float, *shape: int) -> np.ndarray:
        """Multiples of a step from low to high."""
        return self.rng.integers(round(low / step), round(high / step) + 1, shape) * step


class Size(NamedTuple):
    """How large the problems are."""

    batch: int
    channels: int  # a multiple of 8
    height: int  # powers of two, so that torch's normalised coordinates are exact
    width: int
    outputs: int
    boxes: int
    bins: tuple[int, int]
    points: int
    detector: bool = False  # boxes in float32 coordinates only


TINY = Size(1, 8, 8, 8, 8, 2, (2, 2), 5)  # for the simulator
SMALL = Size(3, 40, 16, 8, 72, 60, (3, 2), 333)
DETECTOR = Size(1, 256, 64, 128, 256, 512, (7, 7), 64 * 128, True)


def convolution(draw: Draw, size: Size, deformed: bool, mask: bool = False, groups: int = 1) -> Problem:
    """conv or deform_conv; with a mask there are two offset groups."""
    operator, offset_groups = "deform_conv" if deformed else "conv", 2 if mask else 1
    stride, padding, dilation = ((2, 1), (1, 2), (1, 2)) if mask else (1, 1, 1)
    pairs = [p if isinstance(p, tuple) else (p, p) for p in (stride, padding, dilation)]
    out = [(n + 2 * p - 2 * d - 1) // s + 1 for n, s, p, d in zip((size.height, size.width), *pairs, strict=True)]
    shape = (size.outputs, size.channels // groups, 3, 3)
    arrays: Arrays = {
        "x": draw.normal(size.batch, size.channels, size.height, size.width),
        "w": common(draw.normal(*shape) / math.sqrt(9 * shape[1])).astype(np.float64),
        "bias": draw.normal(size.outputs),
    }
    if deformed:
        arrays["offsets"] = draw.grid(-4, 4, 1 / 16, size.batch, 18 * offset_groups, *out)
        arrays["mask"] = draw.grid(0, 1, 1 / 64, size.batch, 9 * offset_groups, *out) if mask else None
    keywords = {"stride": stride, "padding": padding, "dilation": dilation}
    return Problem(operator, arrays, keywords, draw.normal(size.batch, size.outputs, *out), True)


def layer(draw: Draw, size: Size) -> Problem:
    """deform_conv_layer, modulated. Its offsets are exact: x in eighths, few predicting weights, all powers of two."""
    shape = (27, size.channels, 3, 3)
    w = common(draw.normal(size.outputs, size.channels, 3, 3) / math.sqrt(9 * size.channels)).astype(np.float64)
    predicting = np.zeros(shape)
    at = draw.rng.integers(0, shape[1:], (27, 2, 3))
    for k, spots in enumerate(at):
        for c, i, j in spots:
            predicting[k, c, i, j] = draw.rng.choice([-0.25, 0.25, 0.125])
    arrays = {
        "x": draw.grid(-2, 2, 1 / 8, size.batch, size.channels, size.height, size.width),
        "w": w,
        "offset_w": predicting,
        "offset_b": draw.grid(-1, 1, 1 / 32, 27),
        "bias": draw.normal(size.outputs),
    }
    grad_y = draw.normal(size.batch, size.outputs, size.height, size.width)
    return Problem("deform_conv_layer", arrays, {"modulated": True, "padding": 1}, grad_y, True)


def points(draw: Draw, size: Size) -> Problem:
    """bilinear_sample."""
    low, high = -2.0, float(max(size.height, size.width) + 1)
    arrays = {
        "x": draw.normal(size.batch, size.channels, size.height, size.width),
        "points": draw.grid(low, high, 1 / 64 if size.detector else 1 / 4, size.batch, size.points, 2),
    }
    return Problem("bilinear_sample", arrays, {}, draw.normal(size.batch, size.channels, size.points))


def boxes(draw: Draw, size: Size, whole: bool) -> tuple[np.ndarray, float]:
    """Boxes and their scale. Bins are 1, 2, ... quarter pixels of x long (or `whole` pixels), so that all samples lie
    on binary fractions; a few boxes extend beyond the image, but none of whole pixels."""
    scale, rows = 1 / 8 if size.detector else 1 / 2, []
    for _ in range(size.boxes):
        corner, far = [], []
        for extent, bins in zip((size.width, size.height), size.bins[::-1], strict=True):
            most = max(1, min(extent // bins - 1, 8))
            quarters = 4 * int(draw.rng.integers(1, most + 1))
            if not whole:
                quarters = int(draw.rng.choice([q for q in (1, 2, 3, 4, 6, 7, 8, 14, 16, 30, 32) if q <= 4 * most]))
            length = bins * quarters / 4
            low, high = (0, max(0, extent - 1 - length)) if whole else (-1.0, max(0.0, extent - length + 1))
            start = float(draw.grid(low, high, 1 if whole else 1 / 8))
            corner.append(start)
            far.append(start + length)
        rows.append([draw.rng.integers(size.batch), *np.array(corner) / scale, *np.array(far) / scale])
    return np.array(rows, np.float64), scale


def pooling(operator: str) -> Callable[[Draw, Size], Problem]:
    """The maker of an operator over boxes."""
    sensitive, whole = operator.startswith(("ps_", "deform_ps")), operator in ("roi_pool", "ps_roi_pool")

    def make(draw: Draw, size: Size) -> Problem:
        rois, scale = boxes(draw, size, whole)
        bins_y, bins_x = size.bins
        cells = min(size.bins) ** 2 if operator == "deform_ps_roi_pool" else bins_y * bins_x
        out = 10 if size.detector else max(2, size.channels // 16 * 2)  # even, for two classes
        channels = out * cells if sensitive else size.channels
        keywords: dict[str, Any] = {"output_size": size.bins, "spatial_scale": scale}
        arrays: Arrays = {"x": draw.normal(size.batch, channels, size.height, size.width), "rois": rois}
        if operator == "roi_pool":  # torchvision's bins are right if the length, both ends included, divides evenly
            rois[:, 3:] -= 1 / scale
        if operator == "roi_align":
            keywords |= {"aligned": True, "sampling_ratio": -1 if size.detector else 2}
        if operator == "ps_roi_align":
            keywords["sampling_ratio"] = 2
        if operator == "deform_roi_pool":
            arrays["offsets"] = draw.grid(-1, 1, 1 / 8, size.boxes, 2, *size.bins)
            arrays["mask"] = draw.grid(0, 1, 1 / 64, size.boxes, 1, *size.bins)
            keywords |= {"gamma": 0.125, "sampling_ratio": 2}
        if operator == "deform_ps_roi_pool":
            rois[:, 1:] = np.round(rois[:, 1:])  # both ends count there: a length of n means n - 1 apart
            rois[:, 3:] = (
                rois[:, 1:3]
                + np.maximum(1, np.round((rois[:, 3:] - rois[:, 1:3]) / size.bins[::-1])) * size.bins[::-1]
                - 1
            )
            arrays["trans"] = draw.grid(-1, 1, 1 / 8, size.boxes, 4, *size.bins)
            keywords |= {"trans_std": 0.125, "group_size": min(size.bins), "sample_per_part": 2}
        y_channels = out if sensitive else channels
        return Problem(operator, arrays, keywords, draw.normal(size.boxes, y_channels, *size.bins))

    return make


def attention(draw: Draw, size: Size, unequal: bool) -> Problem:
    """ms_deform_attn. If the levels have equally many points, no point lies where slopes jump: compiled rivals take
    another slope at -1."""
    counts = (1, 3) if unequal else (2, 2)
    heads = 2 if unequal else size.channels // 8  # eight channels fill 16 bytes in every type but float64
    levels = tuple((size.height >> k, size.width >> k) for k in range(len(counts)))
    pixels, depth = sum(height * width for height, width in levels), size.channels // heads
    rows = size.batch, size.points, heads
    shape = (*rows, sum(counts)) if unequal else (*rows, len(levels), counts[0])
    arrays = {
        "value": draw.normal(size.batch, pixels, heads, depth),
        "sampling_locations": draw.grid(-1 / 4, 5 / 4, 1 / 32, *shape, 2) + (0 if unequal else 1 / 64),
        "attention_weights": draw.grid(-1, 1, 1 / 64, *shape),
    }
    keywords = {"spatial_shapes": levels, **({"points_per_level": counts} if unequal else {})}
    return Problem("ms_deform_attn", arrays, keywords, draw.normal(*rows[:2], size.channels))


STRIDED = {
    "kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "offset_scale": 2.0,
    "remove_center": True,
}  # fmt: skip


def window(draw: Draw, size: Size, packed: bool, strided: bool) -> Problem:
    """dcnv3, or dcnv4 if `packed`."""
    points, groups = (14, 2) if strided else (windows.POINTS, size.channels // 8)
    x = draw.normal(size.batch, size.height, size.width, size.channels)
    out = size.batch, size.height // 2 if strided else size.height, size.width - 4 if strided else size.width
    arrays = {
        "x": x,
        "offsets": draw.grid(-2, 2, 1 / 16, *out, 2 * points * groups),
        "mask": draw.grid(-1, 1, 1 / 64, *out, points * groups),
    }
    keywords: dict[str, Any] = STRIDED if strided else {"padding": 1}
    if packed:
        used, channels = 3 * points * groups, -(-3 * points * groups // 8) * 8
        both = windows.pack(arrays["offsets"], arrays["mask"], groups, channels)
        both[..., used:] = draw.normal(*out, channels - used)  # never read
        arrays, keywords = {"x": x, "offset_mask": both}, {**keywords, "groups": groups}
    return Problem("dcnv4" if packed else "dcnv3", arrays, keywords, draw.normal(*out, size.channels))


MAKERS: dict[str, dict[str, Callable[[Draw, Size], Problem]]] = {
    "bilinear_sample": {"points": points},
    "conv": {"plain": lambda draw, size: convolution(draw, size, False)},
    "deform_conv": {
        "plain": lambda draw, size: convolution(draw, size, True),
        "mask": lambda draw, size: convolution(draw, size, True, mask=True, groups=2),
        "depthwise": lambda draw, size: convolution(
            draw, size._replace(outputs=size.channels), True, groups=size.channels
        ),
    },
    "deform_conv_layer": {"modulated": layer},
    **{
        name: {"boxes": pooling(name)}
        for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_roi_pool", "deform_ps_roi_pool")
    },
    "ms_deform_attn": {"levels": partial(attention, unequal=False), "unequal": partial(attention, unequal=True)},
    **{
        name: {label: partial(window, packed=packed, strided=label == "strided") for label in ("plain", "strided")}
        for name, packed in (("dcnv3", False), ("dcnv4", True))
    },
}


def make(operator: str, label: str, size: Size, seed: int) -> Problem:
    """The random problem of an operator."""
    return MAKERS[operator][label](Draw(seed), size)


Case = ms_deform_attn.AttentionCase | windows.WindowCase
STAGES = "c1", "c3", "d1"
CASES: dict[str, dict[str, Case]] = {  # timed in the sizes of published networks, which are the CPU benchmark's
    name: {case: known(name).cases[case] for case in cases}
    for name, cases in (("ms_deform_attn", ("encoder", "decoder", "rt-detr")), ("dcnv3", STAGES), ("dcnv4", STAGES))
}


def published(operator: str, case: Case, seed: int) -> Problem:
    """The problem of such a case. Its positions are exact: offsets are multiples of 2**-9 of a pixel; locations, which
    only float32 and float64 hold, of 2**-14 of a level that is less than 1024 pixels long."""
    draw = Draw(seed)
    arrays = dict(zip(case.differentiable, case.draw(draw.rng), strict=True))
    for name, a in arrays.items():
        located = name == "sampling_locations"
        arrays[name] = np.round(a * 2**14) / 2**14 if located else common(a).astype(np.float64)
    return Problem(operator, arrays, case.options, draw.normal(*case.shapes["y"]))


def case_of(operator: str, arrays: Arrays, keywords: dict[str, Any]) -> Case | None:
    """The case that a problem of these operators is; None if there is no such case."""
    if operator == "ms_deform_attn":
        if "points_per_level" in keywords:
            return None
        (n, _, m, depth), (_, queries, _, _, points, _) = arrays["value"].shape, arrays["sampling_locations"].shape
        return ms_deform_attn.AttentionCase("", keywords["spatial_shapes"], queries, n, m, depth, points)
    if {name: value for name, value in keywords.items() if name != "groups"} != {"padding": 1}:
        return None
    n, h, w, channels = arrays["x"].shape
    groups = keywords["groups"] if operator == "dcnv4" else arrays["mask"].shape[3] // windows.POINTS
    return windows.WindowCase("", h, w, groups, operator == "dcnv4", n, channels // groups)
