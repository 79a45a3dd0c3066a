"""Draws a problem for an operator: its geometry, its parameters, and the positions of its coordinates and odd numbers.

DRAW has a function for each operator. Arrays of a case, coordinates on borders and pixels and boxes of all kinds come
from the operators' own tests. To add an operator, add a function here.
"""

import zlib

import numpy as np
import test_bilinear_sample
import test_conv
import test_dcnv3
import test_dcnv4
import test_deform_conv
import test_deform_conv_layer
import test_deform_ps_roi_pool
import test_deform_roi_pool
import test_ms_deform_attn
import test_ps_roi_align
import test_ps_roi_pool
import test_roi_align
import test_roi_pool
from conv_cases import Case
from dcn_cases import Case as Window
from dcn_cases import odd_positions
from roi_cases import KINDS
from roi_cases import Case as Boxes
from roi_family import HUGE
from test_deform_conv_properties import draw_offsets

# odd ones are drawn with the problem
COORDINATES = ("rois", "offsets", "points", "trans", "offset_w", "offset_b", "sampling_locations", "offset_mask")


class Dice:
    """Random choices, the same for the same operator and seed. `large`: whether the problem is for several threads;
    `told`: what is wrong with it on purpose."""

    def __init__(self, operator, seed):
        self.rng = np.random.default_rng([seed, zlib.crc32(operator.encode())])
        self.dtype, self.seed = self.one(np.float32, np.float64), seed
        self.large, self.told = self.chance(0.03), ""

    def one(self, *values):
        return values[self.rng.integers(len(values))]

    def pair(self, low, high):
        return tuple(self.rng.integers(low, high + 1, 2).tolist())

    def chance(self, share):
        return bool(self.rng.random() < share)

    def much(self, usual, large):
        """One of `usual`, or one of `large` for a large problem."""
        return self.one(*(large if self.large else usual))

    def some(self, names):
        return [name for name in names if self.chance(0.5)]


def convolution(dice, **more):
    """A case with an image large enough, with its padding, for at least one output."""
    groups, dilation, kernel = dice.one(1, 1, 2, 3, 5), dice.pair(1, 3), dice.pair(1, 4)
    padding = dice.pair(0, 3), dice.pair(0, 3)
    channels = groups * dice.much([1, 1, 2, 3, 4, 6, 17, 40], [12, 17, 40])
    more_pixels = dice.much([dice.pair(0, 7)], [dice.pair(60, 90)])
    size = [max(1, dilation[a] * (kernel[a] - 1) + 1 - sum(padding[a])) + n for a, n in enumerate(more_pixels)]
    return Case(
        batch=dice.much([0, 1, 1, 2, 3], [2, 5]),
        channels=channels,
        c_out=groups * dice.much([1, 1, 2, 3, 5, 16, 33], [16, 33]),
        size=tuple(size),
        kernel=kernel,
        stride=dice.pair(1, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=dice.one(*(n for n in range(1, channels + 1) if channels % n == 0)),
        mask=dice.chance(0.5),
        bias=dice.chance(0.5),
        **more,
    )


def conv(dice):
    return test_conv.make(convolution(dice), dice.dtype, dice.seed)


def deform_conv(dice):
    case = convolution(dice)
    offsets = draw_offsets(case, dice.dtype, dice.one(0.1, 0.7, 1.0), dice.one(0.0, 0.0, 0.01, 0.2))
    return test_deform_conv.make(case, dice.dtype, dice.seed, offsets)


def deform_conv_layer(dice):
    case = convolution(dice, spread=dice.one(0.0, 1.0, 5.0, 30.0))
    p = test_deform_conv_layer.make(case, dice.dtype, dice.one(1, 2), dice.chance(0.5), dice.seed)
    if p["offset_b"] is not None and dice.chance(0.3):
        p["offset_b"][dice.rng.random(len(p["offset_b"])) < 0.2] += dice.one(1e3, 1e30, -np.inf, np.nan)
    return p


def bilinear_sample(dice):
    points = [dice.much([0, 1, 1, 2, 3, 7, 20], [70, 90]) for _ in range(dice.much([0, 1, 2, 3], [2]))]
    case = test_bilinear_sample.Case(
        batch=dice.much([0, 1, 1, 2, 3], [2, 5]),
        channels=dice.much([1, 1, 2, 3, 7, 8, 16, 17, 40], [17, 40]),
        size=dice.pair(1, 9),
        points=tuple(points),
    )
    odd = test_bilinear_sample.odd_points(case, dice.dtype, dice.one(0.1, 0.7, 1.0), dice.one(0.0, 0.0, 0.01, 0.2))
    return test_bilinear_sample.make(case, dice.dtype, dice.seed, odd)


def windows(make):
    """Draws a window for `make`, of dcnv3 or dcnv4, with an image large enough, with its padding, for one output."""

    def draw(dice):
        dilation, kernel, padding = dice.pair(1, 3), dice.pair(1, 4), (dice.pair(0, 3), dice.pair(0, 3))
        more_pixels = dice.much([dice.pair(0, 7)], [dice.pair(50, 70)])
        case = Window(
            batch=dice.much([0, 1, 1, 2, 3], [2, 5]),
            groups=dice.one(1, 1, 2, 3, 5),
            depth=dice.much([1, 1, 2, 3, 4, 8, 16, 17, 33], [16, 32]),
            size=tuple(
                max(1, dilation[a] * (kernel[a] - 1) + 1 - sum(padding[a])) + n for a, n in enumerate(more_pixels)
            ),
            kernel=kernel,
            stride=dice.pair(1, 3),
            padding=padding,
            dilation=dilation,
            scale=dice.one(1.0, 1.0, 0.5, 2.0, -1.0),
            remove_center=kernel[0] % 2 == kernel[1] % 2 == 1 and kernel != (1, 1) and dice.chance(0.3),
        )
        return make(dice, case, odd_positions(case, dice.dtype, dice.one(0.1, 0.7, 1.0), dice.one(0.0, 0.0, 0.01, 0.2)))

    return draw


def ms_deform_attn(dice):
    sizes = [(dice.one(1, 2, 4, 8), dice.one(1, 2, 4, 8)) for _ in range(dice.one(1, 1, 2, 3, 5))]
    unequal = tuple(dice.one(1, 2, 3, 5) for _ in sizes)
    case = test_ms_deform_attn.Case(
        batch=dice.much([0, 1, 1, 2, 3], [2, 5]),
        heads=dice.one(1, 1, 2, 3, 8),
        depth=dice.much([1, 1, 2, 3, 4, 8, 16, 17, 33], [16, 32]),
        levels=tuple(sizes),
        points=dice.one(1, 2, 4, unequal),
        queries=dice.much([0, 1, 1, 2, 7, 20], [900, 1500]),
    )
    odd = test_ms_deform_attn.odd_positions(case, dice.dtype, dice.one(0.1, 0.7, 1.0), dice.one(0.0, 0.0, 0.01, 0.2))
    return test_ms_deform_attn.make(case, dice.dtype, dice.seed, odd)


def boxes(make, channels_of=1, **params):
    """Draws boxes and images for `make`, and for each of `params` one of its values (the default, if it is None)."""

    def draw(dice):
        chosen = {name: dice.one(*values) for name, values in params.items()}
        count = dice.much([0, 1, 2, 5, 9], [1500])
        case = Boxes(
            batch=dice.one(int(count > 0), 1, 2, 3),
            channels=dice.much([1, 2, 3, 8, 17], [40, 64]) * channels_of,
            size=dice.much([dice.pair(1, 9)], [dice.pair(30, 50)]),
            output=dice.pair(1, 4),
            boxes=dice.much([*KINDS, "quarter", "quarter", "mixed"], ["whole", "mixed"]),
            count=count,
            scale=dice.one(1.0, 1.0, 0.5, 0.25, 2.0, 0.7, 1 / 3, 1 / 16, 1e-30, 1e30),
            params={name: value for name, value in chosen.items() if value is not None},
        )
        p = make(dice, case)
        corners = p["rois"][:, 1:]
        corners[...] = corners.clip(*np.array([-1, 1]) * np.finfo(dice.dtype).max)  # boxes divided by a tiny scale
        if dice.chance(0.2):
            corners[dice.rng.random(corners.shape) < 0.3] = dice.one(*HUGE, -1.0, -0.5, 0.0, *case.size)
        return p

    return draw


def pooled(module):
    return lambda dice, case: module.make(case, dice.dtype, dice.seed)


def shifted(module, *optional, **more):
    """Like `pooled`, for an operator with offsets, some of which are odd, and arrays that may be absent."""

    def make(dice, case):
        chosen = {name: draw(dice) for name, draw in more.items()}
        p = module.special(case, dice.dtype, dice.seed, dice.one(0.0, 0.2, 0.7), **chosen)
        return p.having(**dict.fromkeys(name for name in optional if dice.chance(0.2)))

    return make


RATIOS = [None, -1, 0, 1, 2, 3]
DRAW = {
    "bilinear_sample": bilinear_sample,
    "conv": conv,
    "dcnv3": windows(lambda dice, case, odd: test_dcnv3.make(case, dice.dtype, dice.seed, odd)),
    "dcnv4": windows(lambda dice, case, odd: test_dcnv4.make(case, dice.dtype, dice.seed, odd, dice.chance(0.5))),
    "deform_conv": deform_conv,
    "deform_conv_layer": deform_conv_layer,
    "deform_ps_roi_pool": boxes(
        shifted(
            test_deform_ps_roi_pool, "trans", classes=lambda dice: dice.one(1, 2, 3), parts=lambda dice: dice.pair(1, 4)
        ),
        channels_of=6,
        group_size=[1, 2, 3],
        sample_per_part=[None, 1, 2, 3],
        trans_std=[None, 0.0, 0.25, 1.0, -0.5],
    ),
    "deform_roi_pool": boxes(
        shifted(test_deform_roi_pool, "offsets", "mask"),
        sampling_ratio=RATIOS,
        gamma=[None, 0.0, 0.25, 1.0, -0.5, 1e30],
    ),
    "ms_deform_attn": ms_deform_attn,
    "ps_roi_align": boxes(pooled(test_ps_roi_align), sampling_ratio=RATIOS),
    "ps_roi_pool": boxes(pooled(test_ps_roi_pool)),
    "roi_align": boxes(pooled(test_roi_align), sampling_ratio=RATIOS, aligned=[None, False, True]),
    "roi_pool": boxes(pooled(test_roi_pool)),
}


def odd_numbers(dice, p):
    """The problem with odd numbers in one of its arrays, except coordinates, which have their own."""
    names = [name for name in ("grad_y", *p.given()) if name not in COORDINATES]
    chosen, share = dice.one(*names), dice.one(0.01, 0.1, 0.5)
    least = float(np.finfo(p.dtype).smallest_subnormal)
    values = dice.one([np.nan], [np.inf, -np.inf], [0.0, -0.0], [least, -least, 99 * least], [np.nan, np.inf, 0.0, 1.0])

    def odd(name, array):
        if name != chosen:
            return array
        there = dice.rng.random(array.shape) < share
        return np.where(there, dice.rng.choice(values, array.shape), array).astype(array.dtype)

    return p.map(odd)


def draw(operator, dice):
    """A family.Problem, with parameters in any of their accepted forms."""
    p = DRAW[operator](dice)
    if dice.chance(0.4):
        p = odd_numbers(dice, p)
    if dice.chance(0.05) and not dice.large:
        p = p.map(lambda _, array: np.broadcast_to(array[:1], array.shape))
    return p._replace(params={name: other_form(dice, value, name) for name, value in p.params.items()})


def other_form(dice, value, name):
    """The same value as an int, a list, or a NumPy number or array."""
    if name in ("spatial_shapes", "points_per_level"):
        return dice.one(value, list(value), np.array(value))
    if isinstance(value, tuple) and isinstance(value[0], int) and value[0] == value[1] and dice.chance(0.5):
        value = value[0]
    if isinstance(value, tuple):
        return dice.one(value, list(value))
    return dice.one(value, value, np.asarray(value)[()]) if isinstance(value, (int, float)) else value
