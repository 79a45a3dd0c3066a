"""dcnv4 computes what the formulas say: dcnv3 of the unpacked array, and gradients packed in the same way."""

import math

import dcn_cases
import family
import family_errors
import family_gpu
import family_halves
import numpy as np
import pytest
from checks import LAYOUTS, assert_same_bits, cpu, dot, reference, said
from dcn_cases import CASES, LARGE, SMOOTH, WILD, Case, cases, odd_positions
from family import (
    DTYPES,
    STEP,
    Problem,
    assert_images_are_independent,
    check_against_naive,
    directions,
    near,
    outputs,
    table,
)
from hypothesis import given
from hypothesis import strategies as st
from naive import dcnv4 as naive

import numdcn


def terms(problem):
    points = math.prod(problem["offset_mask"].shape[1:3])
    taps, depth = used(problem) // 3, problem["x"].shape[3]
    return {"y": 4 * taps, "x": max(4, taps * points), "offset_mask": 4 * depth}


def used(problem):
    """How many channels of offset_mask are read."""
    p = problem.params
    kh, kw = (p["kernel_size"],) * 2 if np.ndim(p["kernel_size"]) == 0 else p["kernel_size"]
    return 3 * p["groups"] * (kh * kw - bool(p["remove_center"]))


def magnitudes(problem):
    """sum|terms|, which takes absolute values of the mask but not of the offsets."""
    offsets, mask = naive.unpacked(problem["offset_mask"], **problem.params)
    channels = problem["offset_mask"].shape[3]
    packed = naive.packed(offsets, np.abs(mask), problem.params["groups"], channels)
    positive = problem.having(x=np.abs(problem["x"]), offset_mask=packed, grad_y=np.abs(problem.grad_y))
    positive = positive._replace(params=problem.params)
    back = positive.backward(reference("dcnv4"), lower=1.0)
    return {**outputs(positive.forward(reference("dcnv4"))), **outputs(back)}


OPERATOR = family.Operator(
    "dcnv4", arrays=("x", "offset_mask"), differentiable=("x", "offset_mask"), linear=("x",), length=terms,
    magnitudes=magnitudes,
)  # fmt: skip


def make(case, dtype=np.float64, seed=None, draw=None, padded=True):
    """As dcnv3's problem, packed; channels of padding, if there are any, hold numbers that nobody may read."""
    x, offsets, mask, grad_y = dcn_cases.arrays(case, dtype, seed, draw)
    needed = 3 * case.groups * case.points
    packed = naive.packed(offsets, mask, case.groups, -(-needed // 8) * 8 if padded else needed)
    packed[..., needed:] = 1e4
    return Problem(OPERATOR, {"x": x, "offset_mask": packed}, grad_y, {"groups": case.groups, **case.options})


def usual(dtype):
    return make(dcn_cases.USUAL, dtype)


def zeros(*shape):
    return np.zeros(shape, np.float32)


class TestFamily(family.Family):
    operator, usual = OPERATOR, staticmethod(usual)
    cases = table(make, CASES)
    cases |= {f"{case}-unpadded": lambda dtype, case=case: make(case, dtype, padded=False) for case in CASES[::4]}
    large = table(make, LARGE)
    smooth = table(lambda case, dtype: make(case, dtype, draw=dcn_cases.between_pixels(case)), SMOOTH)
    wild = table(lambda case, dtype: make(case, dtype, draw=odd_positions(case, dtype, 0.7, 0.1)), WILD)

    def test_finite_differences(self, subject, smooth_case):
        """Between kinks y is a polynomial of degree three in offset_mask, for which differences of four points are
        exact."""
        p, rng = smooth_case(np.float64), np.random.default_rng(2)
        p["offset_mask"][..., used(p) :] = 0
        g, scale = p.backward(subject), np.abs(p.grad_y).sum()

        def loss(name, moved):
            return dot(p.grad_y, p.having(**{name: p[name] + moved}).forward(subject))

        for name in p.wanted():
            for direction in directions(rng, p[name].shape, 6):
                near_, far = (loss(name, h * direction) - loss(name, -h * direction) for h in (STEP / 2, STEP))
                near((8 * near_ - far) / (6 * STEP), dot(getattr(g, name), direction), 20 * scale)


# x (3, 4, 5, 8), groups 2, kernel (2, 3), padding (1, 0): y (3, 5, 3, 8), offset_mask (3, 5, 3, 40), of which 36 are used
class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = (
        *dcn_cases.WRONG_PARAMETERS,
        *(("groups", value, ValueError, said(value), "at least 1|divisor") for value in (0, -1, 3, 5)),
        *(("groups", value, TypeError, "None|float|str|bool", "int") for value in (None, 2.0, "2", True)),
        *(("x", zeros(*shape), ValueError, said(*shape), "empty") for shape in ((3, 0, 5, 8), (3, 4, 5, 0))),
        ("x", zeros(3, 4, 2, 8), ValueError, "2 pixels", "at least 3"),
        *(
            ("offset_mask", zeros(3, 5, 3, channels), ValueError, said(3, 5, 3, channels), "36 = .* 40")
            for channels in (0, 18, 35, 37, 39, 41, 48)
        ),
        ("offset_mask", zeros(3, 4, 3, 40), ValueError, said(3, 4, 3, 40), said(3, 5, 3, 40)),
        ("offset_mask", zeros(3, 5, 4, 36), ValueError, said(3, 5, 4, 36), said(3, 5, 3, 36)),
        ("offset_mask", zeros(1, 5, 3, 40), ValueError, said(1, 5, 3, 40), said(3, 5, 3, 40)),
    )

    def test_groups_are_needed(self, backend):
        p = self.usual(np.float32)
        with pytest.raises(TypeError, match="groups"):
            backend.forward(*p.positional())

    def test_other_numbers_of_groups(self, backend):
        """The error says which would fit."""
        p = self.usual(np.float32)
        for groups in (1, 4, 8):
            with pytest.raises(ValueError, match="groups=2 would fit"):
                p._replace(params={**p.params, "groups": groups}).forward(backend)


class TestGPU(family_gpu.GPU):
    operator = OPERATOR
    usual = staticmethod(lambda dtype: make(dcn_cases.TINY, dtype))
    full = TestFamily.cases | TestFamily.wild
    cases = table(make, [Case(size=(1, 1), kernel=2), Case(size=(3, 2), remove_center=True, depth=9), CASES[-1]])
    odd = Case(2, 2, 3, (2, 3), kernel=2, padding=1)
    cases |= table(lambda case, dtype: make(case, dtype, draw=odd_positions(case, dtype, 0.8, 0.05)), [odd])
    errors = TestErrors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize("groups, depth", [(1, 1), (2, 3), (4, 16)])
def test_an_image_does_not_depend_on_the_batch(backend, groups, depth, batch, dtype):
    assert_images_are_independent(backend, make(Case(batch, groups, depth), dtype), ("offset_mask",))


def test_forms_of_parameters(backend):
    dcn_cases.assert_forms_of_parameters(backend, make(Case(2, 2, 3, kernel=(3, 2), padding=(1, 0)), np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases(), padded=st.booleans(), nan=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 2**32 - 1))
def test_it_is_dcnv3_unpacked(dtype, case, padded, nan, seed):
    """Bit for bit."""
    p = make(case, dtype, seed, odd_positions(case, dtype, 0.5, nan), padded)
    offsets, mask = naive.unpacked(p["offset_mask"], **p.params)
    got, want = p.forward(cpu("dcnv4")), numdcn.dcnv3_forward(p["x"], offsets, mask, **case.options)
    assert_same_bits(*(np.where(np.isnan(a), dtype("nan"), a) for a in (got, want)))
    g, h = p.backward(cpu("dcnv4")), numdcn.dcnv3_backward(p.grad_y, p["x"], offsets, mask, **case.options)
    packed = naive.packed(h.offsets, h.mask, case.groups, p["offset_mask"].shape[3])
    for got, want in ((g.x, h.x), (g.offset_mask, packed)):
        assert_same_bits(*(np.where(np.isnan(a), dtype("nan"), a) for a in (got, want)))


@pytest.mark.parametrize("fill", [np.nan, np.inf, -1e30])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_is_neither_read_nor_given_a_gradient(backend, fill, layout):
    """Whatever it holds; its gradient is 0, in an array of any layout."""
    p = make(Case(2, 1, 3), np.float32)  # 27 channels, then 5
    y, g = p.forward(backend), p.backward(backend)
    packed = p["offset_mask"].copy()
    packed[..., 27:] = fill
    changed = p.having(offset_mask=LAYOUTS[layout](packed))
    assert_same_bits(changed.forward(backend), y)
    if layout != "read_only":
        out = type(g)(offset_mask=LAYOUTS[layout](np.full_like(packed, np.nan)))
        changed.backward(backend, out=out, wrt="offset_mask")
        assert_same_bits(np.ascontiguousarray(out.offset_mask), g.offset_mask)
    assert not g.offset_mask[..., 27:].any() and np.count_nonzero(g.offset_mask[..., :27]) > g.offset_mask.size / 2
    assert not np.signbit(g.offset_mask[..., 27:]).any()


def test_at_the_start_of_training(subject):
    """The layer that predicts offset_mask begins with zeros: y is 0, and only the mask has a gradient."""
    p = make(Case(2, 2, 4), np.float64)
    p = p.having(offset_mask=np.zeros_like(p["offset_mask"]))
    g = p.backward(subject)
    offsets, mask = naive.unpacked(g.offset_mask, **p.params)
    assert not p.forward(subject).any() and not g.x.any() and not offsets.any()
    assert np.count_nonzero(mask) > mask.size / 2


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    case=cases(),
    layouts=st.tuples(*(st.sampled_from(sorted(LAYOUTS)),) * 3),
    share=st.sampled_from([0.0, 0.01, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_special_offsets_and_nan_pixels(backend, dtype, case, layouts, share, seed):
    kinds = dict(zip(("x", "offset_mask", "grad_y"), layouts, strict=True))
    problem = make(case, dtype, seed, odd_positions(case, dtype, 0.5, 0.01))
    problem["x"][np.random.default_rng(seed).random(problem["x"].shape) < share] = np.nan
    check_against_naive(backend, problem.map(lambda name, array: LAYOUTS[kinds[name]](array)))
