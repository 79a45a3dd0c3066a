"""deform_conv_layer_forward and _backward against the naive reference, each stage with its own bounds.

Offsets that differ by a rounding may be on different sides of an integer, where slopes differ by much more. So the
predicted offsets and the mask are compared with a naive convolution; then y and the gradients with the naive layer,
given the very offsets and mask that the library computed. The layer expressed through its parts, published
numbers and new layers: test_deform_conv_layer_special.
"""

import math

import device
import family
import family_errors
import family_gpu
import ml_dtypes
import numpy as np
import pytest
from checks import LAYOUTS, ROUNDINGS, assert_close, cpu, dot, reference, said
from conv_cases import WRONG_GEOMETRY, WRONG_WEIGHTS, Case, output_size, zeros
from family import DTYPES, Problem, assert_images_are_independent, assert_same, check_against_naive, only, table
from hypothesis import given
from hypothesis import strategies as st
from naive import conv
from naive import deform_conv_layer as naive
from test_deform_conv import OPERATOR as DEFORM_CONV

import numdcn

NAMES = ("x", "w", "offset_w", "offset_b", "bias")
LIBRARY = cpu("deform_conv_layer")


def of_y(backend):
    """The backend with a forward that returns only y, like those of other operators; `expected` checks the rest."""
    return backend._replace(forward=lambda *arrays, **more: backend.forward(*arrays, **more).y)


@pytest.fixture
def backend():
    return of_y(LIBRARY)


@pytest.fixture
def gpu(gpu):
    return of_y(gpu)


@pytest.fixture(params=["cpu", "naive"])
def subject(request):
    return of_y({"cpu": LIBRARY, "naive": reference("deform_conv_layer")}[request.param])


def make(case, dtype=np.float64, mask_scale=1, offset_bias=True, seed=0):
    """Random arrays; offsets of about `case.spread` pixels. `case.mask` says whether the layer is modulated."""
    rng = np.random.default_rng(seed)
    taps, per_tap = math.prod(case.kernel), 3 if case.mask else 2

    def draw(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(dtype)

    predicted = per_tap * case.offset_groups * taps
    arrays = {
        "x": draw(case.batch, case.channels, *case.size),
        "w": draw(case.c_out, case.channels // case.groups, *case.kernel),
        "offset_w": draw(predicted, case.channels, *case.kernel, scale=case.spread / math.sqrt(case.channels * taps)),
        "offset_b": draw(predicted) if offset_bias else None,
        "bias": draw(case.c_out) if case.bias else None,
    }
    params = {**case.geometry, **({"modulated": True, "mask_scale": mask_scale} if case.mask else {})}
    return Problem(OPERATOR, arrays, draw(case.batch, case.c_out, *output_size(case)), params)


def geometry_of(problem):
    return {name: problem.params[name] for name in ("stride", "padding", "dilation")}


def check_prediction(problem, result, eps=None):
    """Offsets and mask are those of a naive convolution, within its bounds: at the arrays' precision, unless `eps`
    is given."""
    x, w, bias = (problem[name] for name in ("x", "offset_w", "offset_b"))
    z = conv.forward(x, w, bias, **geometry_of(problem))
    sizes = conv.forward(np.abs(x), np.abs(w), None if bias is None else np.abs(bias), **geometry_of(problem))
    eps, tiny = np.finfo(x.dtype).eps if eps is None else eps, np.finfo(x.dtype).tiny
    bound = eps * (ROUNDINGS + math.sqrt(math.prod(w.shape[1:]))) * sizes + tiny
    moves = result.offsets.shape[1]
    assert result.offsets.dtype == x.dtype
    assert_close(result.offsets, z[:, :moves], bound[:, :moves], "offsets")
    if not problem.params.get("modulated"):
        assert result.mask is None and moves == z.shape[1]
        return
    assert result.mask.dtype == x.dtype and 3 * moves == 2 * z.shape[1]
    scale = problem.params["mask_scale"]
    with np.errstate(over="ignore"):
        mask = scale / (1 + np.exp(-z[:, moves:]))
    # the slope of the sigmoid, for logits off by their bound, plus its own rounding errors
    spread = 1.5 * mask * (1 - mask / scale) * bound[:, moves:] + (ROUNDINGS + np.abs(z[:, moves:])) * eps * mask
    assert_close(result.mask, mask, spread + tiny, "mask")


def second_convolution(problem, result):
    """The problem of the convolution with the offsets and the mask of `result`."""
    x, w, bias = (problem[name] for name in ("x", "w", "bias"))
    arrays = {"x": x, "offsets": result.offsets, "w": w, "bias": bias, "mask": result.mask}
    return Problem(DEFORM_CONV, arrays, problem.grad_y, geometry_of(problem))


def expected(problem, result=None):
    """{name: (value, bound)} of y and the gradients, for offsets and mask of `result`: by default those of the library,
    which are then checked."""
    if result is None:
        result = problem.forward(LIBRARY)
        check_prediction(problem, result)
    x, w = problem["x"], problem["w"]
    second = family.expected(second_convolution(problem, result))
    want = {name: pair for name, pair in second.items() if name in ("y", "w", "bias")}
    made = {"offsets": result.offsets, "mask": result.mask}
    values = problem.backward(naive, **made)._asdict()
    sizes = problem.map(lambda _, array: np.abs(array)).backward(naive, lower=1.0, **made)._asdict()
    # square roots of the numbers of terms: in a gradient of an offset, of a pixel, in a sum over pixels and images
    c_out, per_group, *kernel = w.shape
    channels, taps, pixels = x.shape[1], math.prod(kernel), math.prod(problem.grad_y.shape[2:])
    per_output, offset_groups = c_out // (channels // per_group), result.offsets.shape[1] // (2 * taps)
    moved = math.sqrt(4 * per_output * channels / offset_groups)
    visits = taps * (1 + pixels / math.prod(x.shape[2:]))
    of_pixel = math.sqrt(per_output * visits) + moved + math.sqrt(len(problem["offset_w"]) * taps)
    of_sum = moved + math.sqrt(len(x) * pixels)
    info = np.finfo(problem.dtype)
    for name, length in {"x": of_pixel, "offset_w": of_sum, "offset_b": of_sum}.items():
        if values[name] is not None:
            want[name] = values[name], info.eps * (3 * ROUNDINGS + length) * sizes[name] + info.tiny
    return want


OPERATOR = family.Operator(
    "deform_conv_layer", arrays=NAMES, differentiable=NAMES, linear=("w",), length=None, added=("bias",),
    optional=("offset_b", "bias"), expected=expected,
)  # fmt: skip

CASES = [
    Case(size=(1, 1), kernel=(1, 1)),
    Case(size=(1, 1), padding=1, mask=True, bias=True),
    Case(size=(1, 7), kernel=(1, 3), channels=2, c_out=3, bias=True, batch=2),
    Case(size=(7, 1), kernel=(3, 2), padding=(1, 1), channels=3, c_out=2, mask=True),
    Case(channels=7, c_out=8, size=(6, 6), dilation=(2, 1), padding=(1, 0), mask=True),
    Case(channels=8, c_out=15, size=(7, 5), padding=1, bias=True),
    Case(channels=15, c_out=16, size=(7, 5), padding=1, offset_groups=3, mask=True),
    Case(channels=17, c_out=20, size=(7, 9), kernel=(3, 2), stride=(1, 2), padding=((2, 0), (0, 3)), bias=True),
    Case(channels=33, c_out=31, size=(7, 5), padding=1, mask=True, bias=True),
    Case(channels=64, c_out=70, size=(5, 7), padding=1, groups=2, offset_groups=8, mask=True),
    Case(channels=300, c_out=9, size=(4, 5), padding=1, mask=True),
    Case(channels=12, c_out=6, size=(7, 5), padding=1, groups=3, offset_groups=4, mask=True, bias=True, batch=2),
    Case(33, 6, 4, (5, 4), (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3),
    Case(channels=16, c_out=32, size=(7, 5), padding=1, groups=16, offset_groups=16, mask=True, bias=True),
    Case(channels=5, c_out=5, size=(40, 41), padding=1, groups=5, bias=True),
    Case(channels=3, c_out=4, size=(7, 5), padding=1, batch=0, bias=True, mask=True),
    # without offsets all coordinates are integers, many exactly -1; at 30 pixels nearly all samples are outside
    *(Case(2, 6, 4, (7, 6), padding=1, mask=mask, spread=spread) for mask in (False, True) for spread in (0.0, 30.0)),
]
GROUPED = Case(2, 6, 4, (7, 6), (3, 2), (2, 1), 1, groups=2, offset_groups=3, mask=True, bias=True)
LARGE = [Case(2, 33, 20, (33, 31), padding=1, mask=True, bias=True), Case(3, 2, 3, (3, 3), padding=1)]


def make_any(case, dtype):
    """With and without the optional arrays, and with both scales of the mask."""
    seed = len(str(case))
    return make(case, dtype, mask_scale=1 + seed % 2, offset_bias=bool(seed % 3) and case.spread > 0, seed=seed)


def usual(dtype):
    return make(Case(2, 4, 6, (6, 5), padding=1, groups=2, offset_groups=2, mask=True, bias=True), dtype)


def scaled(mask_scale, dtype=np.float64):
    """A small layer; a scale of 0 means no mask."""
    return make(GROUPED._replace(mask=mask_scale > 0), dtype, mask_scale=mask_scale)


def wild(offset, dtype):
    """Half of the offsets and logits are `offset` away from those predicted."""
    p = make(GROUPED, dtype)
    p["offset_b"][::2] += dtype(offset)
    return p


class TestFamily(family.Family):
    operator, usual = OPERATOR, staticmethod(usual)
    cases, large = table(make_any, CASES), table(make, LARGE)
    smooth, wild = table(scaled, (0, 1, 2)), table(wild, (1e3, 1e30, np.inf, np.nan))

    def test_finite_differences(self, subject, smooth_case):
        """y is not a polynomial here: steps so small that (almost surely) no coordinate crosses a pixel."""
        p, rng, step = smooth_case(np.float64), np.random.default_rng(3), 1e-6
        g = p.backward(subject)
        for name in NAMES:
            for direction in family.directions(rng, p[name].shape, 3):
                ahead, behind = (p.having(**{name: p[name] + s * direction}).forward(subject) for s in (step, -step))
                slope = dot(p.grad_y, ahead - behind) / (2 * step)
                np.testing.assert_allclose(slope, dot(getattr(g, name), direction), rtol=1e-6, atol=1e-5, err_msg=name)


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = (
        *WRONG_GEOMETRY,
        *WRONG_WEIGHTS,
        ("offset_w", zeros(53, 4, 3, 3), ValueError, "53", "27"),
        ("offset_w", zeros(36, 4, 3, 3), ValueError, "36", "27"),
        ("offset_w", zeros(0, 4, 3, 3), ValueError, "0", "27"),
        ("offset_w", zeros(81, 4, 3, 3), ValueError, "81|3", "4"),
        ("offset_w", zeros(54, 2, 3, 3), ValueError, said(54, 2, 3, 3), said(54, 4, 3, 3)),
        ("offset_w", zeros(54, 4, 3, 2), ValueError, said(54, 4, 3, 2), said(54, 4, 3, 3)),
        ("offset_w", zeros(54, 4, 1, 1), ValueError, said(54, 4, 1, 1), said(54, 4, 3, 3)),
        ("offset_b", zeros(36), ValueError, r"\(36,?\)", "54"),
        ("offset_b", zeros(0), ValueError, r"\(0,?\)", "54"),
        *(("modulated", value, TypeError, came, "True") for value, came in ((1, "1"), (None, "None"), ("yes", "yes"))),
        *(("mask_scale", v, ValueError, str(v), "1 or 2") for v in (0, 3, -1, 1.5, np.nan)),
        *(("mask_scale", v, (TypeError, ValueError), str(v), "1 or 2") for v in ("1", None, True, (1, 2))),
    )

    @pytest.mark.parametrize("given", ["offsets", "mask"])
    @pytest.mark.parametrize("kind", family_errors.WRONG_KINDS)
    def test_wrong_kinds_of_given_results(self, backend, given, kind):
        p, result = usual(np.float32), usual(np.float32).forward(LIBRARY)
        change, error, came, wanted = family_errors.WRONG_KINDS[kind]
        more = {"offsets": result.offsets, "mask": result.mask, given: change(getattr(result, given))}
        self.raises(p, backend, error, given, came, wanted, ("backward",), **more)

    @pytest.mark.parametrize("given, shape", [("offsets", (2, 36, 6, 5)), ("mask", (2, 18, 6, 5))])
    def test_wrong_shapes_of_given_results(self, backend, given, shape):
        for wrong in ((1, *shape[1:]), (2, 27, 6, 5), (*shape[:3], 4), shape[1:], (*shape, 1)):
            p, more = usual(np.float32), {given: zeros(*wrong)}
            self.raises(p, backend, ValueError, given, said(*wrong), said(*shape), ("backward",), **more)

    def test_a_mask_for_a_layer_without(self, backend):
        p = make(Case(2, 4, 6, (6, 5), padding=1, bias=True), np.float32)
        with pytest.raises(ValueError, match="`mask`.*modulated"):
            p.backward(backend, mask=zeros(2, 9, 6, 5))

    @pytest.mark.parametrize("given", ["offsets", "mask"])
    def test_backward_out_overlapping_given_results(self, backend, given, name):
        p, result = usual(np.float32), usual(np.float32).forward(LIBRARY)
        right = p.backward(backend)
        for shared in family_errors.SHARED:
            array, out = family_errors.overlapping(getattr(result, given), getattr(right, name), shared)
            more = {"offsets": result.offsets, "mask": result.mask, given: array}
            with pytest.raises(ValueError, match=rf"out\.{name}.*{given}"):
                p.backward(backend, out=family_errors.empty(right)._replace(**{name: out}), **more)
            assert (array == getattr(result, given)).all()

    def test_weights_prepared_for_other_groups(self, backend):
        p = usual(np.float32)
        for name, groups in (("w", 1), ("offset_w", 2)):
            other = p.holding(**{name: numdcn.prepare_weights(p[name], groups=groups)})
            for direction in ("forward", "backward"):
                with pytest.raises(ValueError, match=rf"`{name}`.*groups"):
                    getattr(other, direction)(backend)


class TestGPU(family_gpu.GPU):
    """Offsets and mask are those the GPU computes: they are compared, and y and the gradients are for them."""

    operator, errors = OPERATOR, TestErrors
    test_numbers_that_are_not_finite = None  # NaN affects all offsets; the tests of deform_conv and conv are exact
    usual = staticmethod(
        lambda dtype: make(
            Case(2, 4, 2, (3, 4), (2, 2), padding=1, groups=2, offset_groups=2, mask=True, bias=True), dtype
        )
    )
    cases = table(
        make_any,
        [
            Case(size=(1, 1), kernel=(1, 1)),
            Case(1, 6, 4, (4, 3), (2, 2), (2, 1), (1, 0), groups=2, offset_groups=3, mask=True, bias=True),
            Case(channels=3, c_out=2, size=(3, 3), padding=1, batch=0, bias=True, mask=True),
            Case(channels=3, c_out=3, size=(3, 3), padding=1, groups=3, bias=True, spread=0.0),
            Case(1, 16, 4, (3, 3), (2, 1), groups=2, offset_groups=2, mask=True, bias=True),
        ],
    )

    def expected(self, gpu, p):
        result = p.forward(device.on(gpu.name, "deform_conv_layer"))
        check_prediction(p, result)
        return expected(p, result)

    def expected_of_narrow(self, gpu, narrow, wide):
        """Offsets, mask and their gradients are rounded on the way: all bounds are those of the narrow type."""
        result = narrow.forward(device.on(gpu.name, "deform_conv_layer"))
        assert result.offsets.dtype == result.mask.dtype == narrow.dtype
        info = ml_dtypes.finfo(narrow.dtype)
        result = type(result)(*(array.astype(np.float32) for array in result))
        check_prediction(wide, result, float(info.eps))
        ratio = float(info.eps) / np.finfo(np.float32).eps
        return {
            k: (value, bound * ratio + float(info.smallest_normal))
            for k, (value, bound) in expected(wide, result).items()
        }

    @pytest.mark.full
    def test_given_offsets_and_mask(self, gpu):
        """The backward with what the forward returned equals the one without; arrays in another place are rejected."""
        p, raw = self.usual(np.float32), device.on(gpu.name, "deform_conv_layer")
        result, g = p.forward(raw), p.backward(gpu, deterministic=True)
        assert_same(p.backward(gpu, deterministic=True, offsets=result.offsets, mask=result.mask), g)
        for name in ("offsets", "mask"):
            with pytest.raises(ValueError, match=f"`{name}` is .* but `x` is .*one place"):
                p.backward(gpu, **{name: device.Host(getattr(result, name))})


@given(
    sizes=st.tuples(*(st.integers(1, 9),) * 2),
    channels=st.tuples(*(st.sampled_from([1, 2, 3, 5]),) * 4),
    kernel=st.tuples(*(st.integers(1, 3),) * 2),
    geometry=st.tuples(*(st.tuples(st.integers(1, 3), st.integers(1, 3)),) * 2),
    flags=st.tuples(*(st.booleans(),) * 3),
    mask_scale=st.sampled_from([1, 2]),
    spread=st.sampled_from([0.0, 1.0, 5.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes(sizes, channels, kernel, geometry, flags, mask_scale, spread, dtype, seed):
    groups, offset_groups, inputs, outputs = channels
    stride, dilation = geometry
    padding = tuple((k * d) // 2 for k, d in zip(kernel, dilation, strict=True))
    case = Case(
        1 + seed % 2, groups * offset_groups * inputs, groups * outputs, sizes, kernel, stride, padding, dilation,
        groups, offset_groups, flags[0], flags[1], spread,
    )  # fmt: skip
    check_against_naive(of_y(LIBRARY), make(case, dtype, mask_scale, flags[2], seed))


# Offsets and mask: returned by the forward, passed to the backward.


@pytest.mark.parametrize("mask_scale", [0, 1, 2])
def test_backward_with_what_the_forward_returned_gives_the_same_bits(mask_scale):
    """Both, or either of them, in any memory layout; also when only some gradients are requested."""
    p = scaled(mask_scale, np.float32)
    g, result = p.backward(LIBRARY), p.forward(LIBRARY)
    made = {name: array for name, array in result._asdict().items() if name != "y" and array is not None}
    assert_same(p.backward(LIBRARY, **made), g)
    for name, array in made.items():
        assert_same(p.backward(LIBRARY, **{name: array}), g)
    for layout in LAYOUTS.values():
        assert_same(p.backward(LIBRARY, **{name: layout(array) for name, array in made.items()}), g)
    for names in (*((name,) for name in NAMES), ("x", "offset_b"), ("offset_w", "w"), ("bias", "x"), ()):
        for more in ({}, made):
            assert_same(p.backward(LIBRARY, wrt=names, **more), only(g, names))


def test_offsets_and_mask_that_are_given_count():
    """Whatever they are: here ones that the layer would not have predicted."""
    p, other = make(GROUPED), make(GROUPED, seed=1).forward(LIBRARY)
    want = expected(p, other)
    for name, gradient in p.backward(LIBRARY, offsets=other.offsets, mask=other.mask)._asdict().items():
        assert_close(gradient, *want[name], name)


def test_neither_out_nor_threads_change_offsets_and_mask():
    p, before = make(LARGE[0], np.float32), numdcn.get_num_threads()
    result = p.forward(LIBRARY)
    out = np.empty_like(result.y)
    again = p.forward(LIBRARY, out=out)
    assert again.y is out
    assert_same(again, result)
    try:
        for threads in (1, 2, 7):
            numdcn.set_num_threads(threads)
            assert_same(p.forward(LIBRARY), result)
    finally:
        numdcn.set_num_threads(before)


@pytest.mark.parametrize("case", [case for case in (*LARGE, *CASES) if case.batch > 1], ids=str)
def test_an_image_does_not_depend_on_the_batch(backend, case):
    assert_images_are_independent(backend, make(case, np.float32), ())


def test_given_results_are_not_written():
    p = make(GROUPED, np.float32)
    result = p.forward(LIBRARY)
    kept = type(result)(*(array.copy() for array in result))
    p.backward(LIBRARY, offsets=result.offsets, mask=result.mask)
    assert_same(result, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_weights_give_the_same_bits(dtype):
    p = make(GROUPED, dtype)
    result, g = p.forward(LIBRARY), p.backward(LIBRARY)
    prepared = {name: numdcn.prepare_weights(p[name], groups=n) for name, n in (("w", 2), ("offset_w", 1))}
    for names in (("w",), ("offset_w",), ("w", "offset_w")):
        other = p.holding(**{name: prepared[name] for name in names})
        assert_same(other.forward(LIBRARY), result)
        assert_same(other.backward(LIBRARY), g)
