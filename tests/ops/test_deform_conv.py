"""deform_conv computes what the formulas say: against the naive reference, over sizes, geometries and layouts.

Expressed through other operations: test_deform_conv_identities. Edges and non-finite numbers, one by one:
test_deform_conv_special. With Hypothesis: test_deform_conv_properties. Tensor cores: test_deform_conv_tensor.
Published numbers: test_deform_conv_vectors.
"""

import math

import family
import family_errors
import family_gpu
import family_halves
import numpy as np
import pytest
from checks import LAYOUTS, assert_close, assert_same_bits, said
from conv_cases import (
    WRONG_GEOMETRY,
    WRONG_IMAGES,
    WRONG_WEIGHTS,
    Case,
    assert_forms_of_parameters,
    output_size,
    zeros,
)
from family import DTYPES, Problem, assert_images_are_independent, assert_same, check_against_naive, outputs, table


def terms(problem):
    c_out, per_group, *kernel = problem["w"].shape
    images, channels, *size = problem["x"].shape
    taps, pixels, per_output = math.prod(kernel), math.prod(problem.grad_y.shape[2:]), c_out // (channels // per_group)
    visits = taps * (1 + pixels / math.prod(size))  # samples that touch one pixel
    moved = 4 * per_output * channels // (problem["offsets"].shape[1] // (2 * taps))
    sums = images * pixels
    return {"y": per_group * taps, "x": per_output * visits, "offsets": moved, "mask": moved, "w": sums, "bias": sums}


NAMES = ("x", "offsets", "w", "bias", "mask")
OPERATOR = family.Operator(
    "deform_conv", arrays=NAMES, differentiable=NAMES, linear=("x", "w", "mask"), length=terms,
    added=("bias",), optional=("bias", "mask"), keywords=("mask",), coordinates=("offsets",),
)  # fmt: skip


def make(case, dtype=np.float64, seed=0, offsets=None):
    """Random arrays for a case. `offsets(rng, shape)` may draw the offsets."""
    rng = np.random.default_rng(seed)
    taps, out = math.prod(case.kernel), output_size(case)

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    shape = (case.batch, 2 * case.offset_groups * taps, *out)
    moved = rng.normal(size=shape) * case.spread if offsets is None else offsets(rng, shape)
    arrays = {
        "x": draw(case.batch, case.channels, *case.size),
        "offsets": moved.astype(dtype),
        "w": draw(case.c_out, case.channels // case.groups, *case.kernel),
        "bias": draw(case.c_out) if case.bias else None,
        "mask": draw(case.batch, case.offset_groups * taps, *out) if case.mask else None,
    }
    return Problem(OPERATOR, arrays, draw(case.batch, case.c_out, *out), case.geometry)


CASES = [
    # one pixel, one channel, images of one row or one column
    Case(size=(1, 1), kernel=(1, 1)),
    Case(size=(1, 1), padding=1, mask=True, bias=True),
    Case(size=(1, 7), kernel=(1, 3), channels=2, c_out=3, bias=True),
    Case(size=(7, 1), kernel=(3, 2), padding=(1, 1), channels=3, c_out=2, mask=True),
    Case(size=(7, 5), channels=2, c_out=1, batch=3),
    Case(size=(7, 5), kernel=(5, 5), padding=2, channels=3, c_out=4, mask=True, bias=True),
    Case(size=(2, 3), kernel=(5, 5), padding=((3, 1), (2, 4)), channels=4, c_out=5),
    # numbers of channels around vector and tile widths
    Case(channels=5, c_out=7, size=(7, 5), kernel=(3, 2), stride=(2, 1), padding=((2, 0), (0, 3)), bias=True),
    Case(channels=7, c_out=8, size=(6, 6), dilation=(2, 1), padding=(1, 0), mask=True),
    Case(channels=8, c_out=15, size=(7, 5), padding=1, bias=True),
    Case(channels=15, c_out=16, size=(7, 5), padding=1, offset_groups=3, mask=True),
    Case(channels=16, c_out=17, size=(9, 8), kernel=(1, 3), offset_groups=4),
    Case(channels=17, c_out=20, size=(7, 5), padding=1, mask=True, bias=True),
    Case(channels=20, c_out=31, size=(7, 9), kernel=(3, 2), stride=(1, 2), padding=1),
    Case(channels=31, c_out=33, size=(7, 5), padding=1, bias=True),
    Case(channels=33, c_out=64, size=(6, 7), kernel=(3, 3), padding=1, mask=True),
    Case(channels=64, c_out=70, size=(5, 7), padding=1, bias=True),
    Case(channels=70, c_out=33, size=(7, 5), kernel=(1, 1), bias=True),
    Case(channels=300, c_out=9, size=(6, 7), padding=1, mask=True),
    Case(channels=260, c_out=140, size=(3, 5), kernel=(1, 3)),
    Case(channels=200, c_out=32, size=(7, 6), kernel=(1, 2), mask=True),  # chunks of different lengths, a single panel
    Case(channels=9, c_out=290, size=(5, 4), kernel=(3, 2)),
    # groups, offset groups, and neither dividing the other
    Case(channels=12, c_out=6, size=(7, 5), padding=1, groups=3, offset_groups=4, mask=True, bias=True, batch=2),
    Case(33, 6, 4, (5, 4), (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3),
    Case(channels=64, c_out=32, size=(6, 7), padding=1, groups=2, offset_groups=8, mask=True),
    Case(channels=64, c_out=64, size=(6, 7), padding=1, groups=32, offset_groups=1, bias=True),
    Case(channels=256, c_out=64, size=(6, 5), kernel=(2, 2), groups=2, offset_groups=2, mask=True),
    Case(channels=48, c_out=36, size=(5, 6), padding=1, groups=12, offset_groups=16, mask=True),
    Case(channels=10, c_out=10, size=(7, 5), padding=1, offset_groups=10, mask=True),
    Case(channels=12, c_out=8, size=(7, 5), padding=1, groups=4, offset_groups=6, bias=True),
    # depthwise, also with two outputs per channel and with offset groups
    Case(channels=5, c_out=5, size=(7, 5), padding=1, groups=5, mask=True, bias=True),
    Case(channels=17, c_out=34, size=(7, 5), padding=1, groups=17, bias=True),
    Case(channels=64, c_out=64, size=(9, 8), padding=1, groups=64, batch=2),
    Case(channels=33, c_out=33, size=(7, 5), kernel=(5, 5), padding=2, groups=33, offset_groups=11, mask=True),
    Case(channels=16, c_out=32, size=(7, 5), padding=1, groups=16, offset_groups=16, mask=True, bias=True),
    Case(channels=280, c_out=280, size=(4, 5), padding=1, groups=280),
    Case(channels=20, c_out=20, size=(9, 10), kernel=(9, 8), padding=2, groups=20, offset_groups=2, bias=True),
    # more output pixels than one tile, batches, and no images at all
    Case(channels=3, c_out=4, size=(40, 41), padding=1, bias=True),
    Case(channels=20, c_out=17, size=(42, 43), stride=1, padding=0, mask=True, offset_groups=2),
    Case(channels=8, c_out=16, size=(80, 41), stride=(2, 1), padding=1, batch=3),
    Case(channels=18, c_out=18, size=(40, 41), padding=1, groups=18, offset_groups=2, mask=True),
    Case(channels=16, c_out=3, size=(3, 301), kernel=(3, 1), dilation=(1, 3), offset_groups=2, bias=True),
    Case(channels=3, c_out=2, size=(2, 2), padding=1, batch=33, bias=True, mask=True),
    Case(channels=3, c_out=4, size=(7, 5), padding=1, batch=0, bias=True, mask=True),
    Case(channels=4, c_out=4, size=(7, 5), padding=1, batch=0, groups=4),
    # strides and dilations larger than the kernel, images that the taps skip over
    Case(channels=2, c_out=3, size=(13, 11), stride=(5, 4), padding=1, dilation=(3, 2), bias=True),
    Case(channels=2, c_out=2, size=(4, 4), kernel=(2, 2), padding=((9, 9), (0, 7)), stride=3, spread=5.0),
    # without offsets all coordinates are integers, many exactly -1; at 30 pixels nearly all samples are outside
    *(Case(2, 6, 5, (8, 9), padding=1, offset_groups=2, mask=True, spread=spread) for spread in (0.0, 30.0)),
]
SMOOTH = [
    Case(2, 6, 4, (5, 4), (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3, mask=True, bias=True),
    Case(batch=1, channels=18, c_out=17, size=(7, 6), padding=((0, 2), (1, 1)), mask=True, bias=True),
    Case(batch=2, channels=9, c_out=18, size=(6, 7), padding=1, groups=9, offset_groups=3, mask=True, bias=True),
    Case(batch=2, channels=5, c_out=4, size=(6, 7), kernel=(1, 1)),
]
LARGE = {
    "plain": Case(2, 33, 40, (33, 31), padding=1, bias=True),
    "masked": Case(1, 33, 34, (61, 62), padding=1, mask=True, bias=True),
    "many_channels": Case(1, 300, 70, (17, 18), padding=1),
    "many_outputs": Case(1, 16, 300, (25, 26), padding=1, bias=True),
    "grouped": Case(2, 72, 48, (41, 40), padding=1, groups=3, offset_groups=4, mask=True),
    "offset_groups": Case(1, 64, 32, (35, 36), padding=1, offset_groups=16, mask=True),
    "depthwise": Case(2, 37, 74, (120, 121), padding=1, groups=37, bias=True),
    "masked_depthwise": Case(1, 64, 64, (160, 161), padding=1, groups=64, offset_groups=8, mask=True),
    "batch": Case(33, 16, 20, (15, 16), padding=1, mask=True, bias=True),
}
GUARDED = [
    Case(1, 1, 1, (5, 4), (1, 1)),
    Case(2, 17, 19, (7, 5), padding=1, mask=True, bias=True),
    Case(1, 33, 5, (20, 21), padding=1, bias=True),
    Case(2, 12, 6, (7, 5), padding=1, groups=3, offset_groups=4, mask=True, bias=True),
    Case(1, 7, 7, (9, 8), padding=1, groups=7, mask=True),
    Case(1, 40, 80, (9, 8), padding=1, groups=40, offset_groups=5, bias=True),
    Case(1, 3, 70, (1, 9), (1, 3), stride=2, mask=True),
    Case(1, 1, 33, (5, 1), (1, 1), padding=1),
]


def of_any_seed(case, dtype):
    return make(case, dtype, seed=len(str(case)))


def between_pixels(rng, shape):
    """Offsets whose fraction is far from 0 and 1: coordinates away from the kinks, for finite differences."""
    return rng.integers(-3, 3, size=shape) + rng.uniform(0.1, 0.9, size=shape)


def wild_offsets(rng, shape):
    """Offsets of every kind: near, at the edges, far, infinite and NaN."""
    moved = rng.normal(size=shape) * 3
    odd = rng.random(shape) < 0.2
    moved[odd] = rng.choice([-1.0, 0.0, 1.0, -9.0, 9.0, 1e9, -1e9, 1e30, np.inf, -np.inf, np.nan], size=odd.sum())
    return moved


class TestFamily(family.Family):
    operator = OPERATOR
    usual = staticmethod(
        lambda dtype: make(Case(2, 20, 36, (7, 6), padding=1, groups=2, offset_groups=4, mask=True, bias=True), dtype)
    )
    cases = table(of_any_seed, CASES)
    smooth = table(lambda case, dtype: make(case, dtype, offsets=between_pixels), SMOOTH)
    large = table(make, LARGE.values())
    wild = table(lambda case, dtype: make(case, dtype, offsets=wild_offsets), GUARDED)


class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator = OPERATOR
    usual = staticmethod(
        lambda dtype: make(Case(2, 4, 6, (6, 5), padding=1, groups=2, offset_groups=2, mask=True, bias=True), dtype)
    )
    wrong = (
        *WRONG_GEOMETRY,
        *WRONG_WEIGHTS,
        *WRONG_IMAGES,
        ("offsets", zeros(2, 35, 6, 5), ValueError, "35", "18"),
        ("offsets", zeros(2, 9, 6, 5), ValueError, "9", "18"),
        ("offsets", zeros(2, 0, 6, 5), ValueError, "0", "18"),
        ("offsets", zeros(2, 54, 6, 5), ValueError, "54|3", "4"),
        ("offsets", zeros(1, 36, 6, 5), ValueError, said(1, 36, 6, 5), "2"),
        ("offsets", zeros(2, 36, 6, 4), ValueError, said(2, 36, 6, 4), r"6,\s*5"),
        ("offsets", zeros(2, 36, 4, 3), ValueError, said(2, 36, 4, 3), r"6,\s*5"),
        ("mask", zeros(2, 9, 6, 5), ValueError, said(2, 9, 6, 5), said(2, 18, 6, 5)),
        ("mask", zeros(2, 18, 6, 6), ValueError, said(2, 18, 6, 6), said(2, 18, 6, 5)),
    )


# On a GPU.


def odd_offsets(rng, shape):
    """Offsets that lead to borders and pixels, or are huge, infinite or NaN."""
    moved = rng.normal(size=shape) * 2
    odd = rng.choice([-2, -1, -0.5, -0.0, 1, 1.5, 3, 1e9, -1e30, np.inf, -np.inf, np.nan], size=shape)
    return np.where(rng.random(shape) < 0.4, odd, moved)


TINY = [
    Case(size=(1, 1), kernel=(1, 1)),
    Case(2, 6, 4, (5, 4), (3, 2), (2, 1), ((1, 0), (0, 2)), (2, 1), groups=2, offset_groups=3, mask=True, bias=True),
    Case(channels=9, c_out=5, size=(4, 3), padding=1, bias=True),
    Case(1, 18, 20, (3, 3), (2, 1), (1, 2), (0, 1), groups=2, offset_groups=3, mask=True, bias=True),
    Case(channels=4, c_out=8, size=(4, 3), padding=1, groups=4, offset_groups=2, mask=True),
    Case(2, 17, 17, (3, 2), (2, 2), padding=1, groups=17, mask=True),
    Case(1, 21, 6, (3, 3), (3, 2), padding=1, groups=3, offset_groups=7, bias=True),
    Case(1, 10, 15, (4, 2), (1, 3), padding=(0, 1), groups=5, offset_groups=2, mask=True),
    Case(1, 3, 11, (3, 3), (2, 1), stride=(1, 2), bias=True),
    Case(1, 30, 6, (2, 2), (1, 2), groups=6),
    Case(channels=2, c_out=3, size=(4, 3), padding=1, batch=0, bias=True, mask=True),
    # output pixels of several patches
    Case(2, 8, 3, (5, 7), (1, 1)),
    # several offset groups planned together, more than fit at once, with chunks that reach into the next
    Case(1, 28, 5, (3, 2), (2, 1), offset_groups=7, mask=True),
    Case(1, 36, 6, (2, 3), (1, 2), padding=(0, 1), offset_groups=3, mask=True, bias=True),
]
# groups and offset groups of whole vectors in float32, not in half types; offset groups in two groups; several in one chunk
SHARED = [
    Case(1, 24, 6, (3, 2), (2, 1), groups=2, offset_groups=6, mask=True),
    Case(1, 24, 6, (3, 2), (2, 1), groups=2, offset_groups=3, mask=True),
    Case(1, 16, 3, (2, 2), (2, 1), offset_groups=4, mask=True),
]
ODD = [
    Case(2, 4, 3, (4, 3), (3, 2), padding=1, offset_groups=2, mask=True, bias=True),
    Case(2, 10, 3, (4, 3), (2, 2), padding=1, offset_groups=2, mask=True, bias=True),
]


class TestGPU(family_gpu.GPU):
    operator, errors, tf32, rounds_terms = OPERATOR, TestErrors, True, True
    usual = staticmethod(
        lambda dtype: make(
            Case(2, 18, 6, (3, 3), (2, 1), padding=(0, 1), groups=2, offset_groups=3, mask=True, bias=True), dtype
        )
    )
    others = table(
        make,
        [Case(2, 4, 6, (3, 3), (2, 2), padding=(0, 1), groups=2, offset_groups=2, mask=True, bias=True), *SHARED],
    )
    full = TestFamily.cases
    cases = table(make, TINY) | table(lambda case, dtype: make(case, dtype, offsets=odd_offsets), ODD)


@pytest.mark.parametrize("channels, groups", [(4, 2), (8, 1)], ids=["few", "many"])
def test_taps_one_after_another(gpu, channels, groups):
    """With deterministic=True a GPU takes the taps one by one."""
    p = make(Case(1, channels, 4, (2, 2), (1, 2), groups=groups, offset_groups=2, mask=True, spread=0.5), np.float32)
    want, got = family.expected(p), outputs(p.backward(gpu, deterministic=True))
    assert list(got) == p.wanted()
    for name, array in got.items():
        assert_close(array, *want[name], name)


# Sizes, layouts and parameters specific to this operator.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in CASES if case.batch == 0], ids=str)
def test_no_images_leave_gradients_of_zero(backend, case, dtype):
    y, g = check_against_naive(backend, make(case, dtype))
    assert y.shape == (0, case.c_out, *output_size(case))
    assert g.w.size and not g.w.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout_of_a_depthwise_one(backend, layout):
    plain = make(Case(batch=2, channels=6, c_out=6, size=(7, 6), padding=1, groups=6, mask=True, bias=True), np.float32)
    y, g = check_against_naive(backend, plain.map(lambda _, array: LAYOUTS[layout](array)))
    assert_same_bits(y, plain.forward(backend))
    assert_same(g, plain.backward(backend))


def test_weights_that_are_the_same_for_all_channels(backend):
    """A stride of zero between channels, and between the images of all other arrays."""
    case = Case(batch=3, channels=5, c_out=4, size=(7, 6), padding=1, mask=True, bias=True)

    def repeat(name, array):
        return np.broadcast_to(array[:1] if name != "w" else array[:, :1], array.shape)

    check_against_naive(backend, make(case, np.float32).map(repeat))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in (*LARGE.values(), *CASES) if case.batch > 1], ids=str)
def test_an_image_does_not_depend_on_the_batch(backend, case, dtype):
    p = make(case, dtype)
    assert_images_are_independent(backend, p, [name for name in ("offsets", "mask") if name in p.given()])


def test_forms_of_parameters(backend):
    p = TestErrors.usual(np.float32)
    assert_forms_of_parameters(backend, p)
    assert p.backward(backend)._fields == NAMES


def test_a_kernel_larger_than_the_image(backend):
    """No output pixels remain."""
    with pytest.raises(ValueError, match="output|fit|kernel"):
        backend.forward(zeros(1, 1, 2, 5), zeros(1, 18, 0, 3), zeros(1, 1, 3, 3))
