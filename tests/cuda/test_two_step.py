"""deform_conv in two steps, columns in memory and a product by the arrays' framework: against the naive reference, in Numba's
simulator or on a GPU. The framework is a stand-in for torch (standin_torch.py), whose product is NumPy's.

The simulator's patches are 2 x 2 pixels and 2 combinations of a tap and an offset group.
"""

import device
import family
import numpy as np
import pytest
from checks import assert_close, assert_same_bits
from conv_cases import Case
from halves import HALVES, expected_of_narrow, halved
from test_deform_conv import make

CASES = {  # slabs of a row, of some rows, of all; images and patches that end within a slab
    "plain": Case(2, 8, 5, (3, 5), (1, 3), padding=(0, 1), bias=True),
    "masked": Case(1, 16, 6, (5, 3), (2, 2), padding=1, mask=True),
    "odd channels": Case(2, 13, 3, (3, 3), (2, 1), padding=(1, 0), mask=True, bias=True),
    "groups": Case(1, 16, 6, (3, 4), (1, 2), groups=2, mask=True),
    "offset groups": Case(1, 24, 4, (3, 3), (2, 1), padding=(1, 0), offset_groups=3, mask=True, bias=True),
    "both": Case(2, 24, 4, (2, 3), (1, 2), padding=(0, 1), groups=2, offset_groups=3, mask=True),
    "four channels": Case(1, 12, 7, (2, 4), (1, 3), padding=(0, 1), offset_groups=3, mask=True),
    "strided": Case(2, 8, 4, (7, 6), (2, 3), (2, 1), (1, 0), (3, 2), bias=True),
    "many channels": Case(1, 72, 3, (2, 2), (1, 1), mask=True),
}
TWO_PIXELS = Case(1, 8, 2, (1, 2), (1, 1), bias=True, spread=0.0)
SLABS = {"a row": 1, "some": 3, "all": 10**6}  # output rows


@pytest.fixture(params=device.KINDS)
def run(request):
    reason = device.missing(request.param)
    if reason:
        pytest.skip(reason)
    return lambda name, *arguments: device.program(request.param, "two_step_programs", name, *arguments)


def given(p, direction):
    more = {"grad_y": p.grad_y} if direction == "backward" else {}
    return {**more, **p.arrays}, p.params


def parts(p, rows):
    """The number of slabs of so many rows."""
    return -(-len(p["x"]) * p.grad_y.shape[2] // rows)


def against(want, p, got):
    for name, array in got.items():
        assert array.dtype == (p.dtype if name == "y" else p[name].dtype), name
        assert_close(array.astype(np.float64), *want[name], name)


def both(run, p, want, way=None, module=None, **keywords):
    """Compares forward and backward; returns the products of each."""
    told = []
    for direction in ("forward", "backward"):
        arrays, params = given(p, direction)
        got, products = run("call", direction, arrays, {**params, **keywords}, way, module)
        assert set(got) == ({"y"} if direction == "forward" else set(p.wanted()))
        against(want, p, got)
        told.append(products)
    return told


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [pytest.param("float32", marks=pytest.mark.full), "float16"])
def test_against_the_reference(run, name, kind):
    """With slabs of some rows."""
    p = make(CASES[name], np.float32)
    want = family.expected(p)
    if kind != "float32":
        p, wide = halved(p, HALVES[kind], HALVES[kind])
        want = expected_of_narrow(p, wide, True)
    forward, backward = both(run, p, want, {"rows": 3})
    assert len(forward) == parts(p, 3) and len(backward) == 2 * len(forward)


@pytest.mark.full
@pytest.mark.parametrize("rows", SLABS.values(), ids=SLABS)
@pytest.mark.parametrize(
    "half, coordinates", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_half_types(run, half, coordinates, rows):
    kinds = {**HALVES, "float32": np.dtype(np.float32)}
    for name in ("masked", "four channels"):
        p, wide = halved(make(CASES[name], np.float32), kinds[half], kinds[coordinates])
        forward, _ = both(run, p, expected_of_narrow(p, wide, True), {"rows": rows})
        assert len(forward) == parts(p, rows)


@pytest.mark.full
def test_tf32(run):
    """Factors are rounded to nearest before the product, which cuts them: within 2**-11 each, as in the fused kernels."""
    for name in ("masked", "odd channels", "groups"):
        p = make(CASES[name], np.float32)
        sizes = family.magnitudes(p)
        want = {n: (value, bound + 2.0**-10 * sizes[n]) for n, (value, bound) in family.expected(p).items()}
        both(run, p, want, {"rows": 3}, {"tf32": True}, allow_tf32=True)


def test_tf32_is_rounded_to_nearest(run):
    """Sums of few numbers are exact, and the product cuts what is not rounded."""
    low, high = np.float32(1 + 2.0**-10 - 2.0**-20), np.float32(1 + 2.0**-10)
    p = make(Case(1, 8, 8, (2, 2), (1, 1), mask=True, spread=0.0), np.float32)
    p = p.map(lambda name, a: np.full_like(a, 0 if name == "offsets" else 1))
    for name, result in (("x", "y"), ("w", "y"), ("x", "w"), ("grad_y", "w"), ("grad_y", "x"), ("w", "x")):
        spoilt = p.having(**{name: np.full_like(p[name], low)})
        arrays, params = given(spoilt, "forward" if result == "y" else "backward")
        direction = "forward" if result == "y" else "backward"
        got, _ = run("call", direction, arrays, {**params, "allow_tf32": True}, None, {"tf32": True})
        assert (got[result] == (4 if result == "w" else 8) * high).all(), (name, result)


def test_float32_keeps_its_digits(run):
    """Without allow_tf32 nothing is rounded to tf32."""
    low = np.float32(1 + 2.0**-20)
    p = make(Case(1, 8, 8, (2, 2), (1, 1), spread=0.0), np.float32)
    p = p.map(lambda name, a: np.full_like(a, 0 if name == "offsets" else 1))
    for name, result in (("x", "y"), ("w", "y"), ("x", "w"), ("grad_y", "w"), ("grad_y", "x"), ("w", "x")):
        direction = "forward" if result == "y" else "backward"
        arrays, params = given(p.having(**{name: np.full_like(p[name], low)}), direction)
        got, products = run("call", direction, arrays, params)
        assert products and (got[result] == (4 if result == "w" else 8) * low).all(), (name, result)


def test_y_is_rounded_once(run):
    """The bias is added to the float32 product: 2048 + 0.75 + 0.75 is 2050 in float16, 2048 with another rounding."""
    p = make(Case(1, 8, 1, (2, 2), (1, 1), spread=0.0, bias=True), np.float32)
    narrow, _ = halved(p, HALVES["float16"], HALVES["float16"])
    x = np.zeros_like(narrow["x"])
    x[:, 0], x[:, 1] = 2048, 0.75
    ones = {"w": np.ones_like(narrow["w"]), "bias": np.full_like(narrow["bias"], 0.75), "x": x}
    arrays, params = given(narrow.having(**ones), "forward")
    got, products = run("call", "forward", arrays, params)
    assert products and (got["y"] == 2050).all()


@pytest.mark.full
@pytest.mark.parametrize("name", ["x", "w", "grad_y", "mask", "offsets"])
def test_one_nan(run, name):
    """It affects what the formulas say: not the padding of channels, not another group, patch or slab."""
    for case in ("odd channels", "both"):
        p = make(CASES[case], np.float32)
        for at in (0, p[name].size // 2, p[name].size - 1):
            array = p[name].copy()
            array.reshape(-1)[at] = np.nan
            spoilt = p.having(**{name: array})
            narrow, wide = halved(spoilt, HALVES["float16"], HALVES["float16"])
            want = expected_of_narrow(narrow, wide, True)
            both(run, narrow, want, {"rows": 3})


def test_infinity_does_not_reach_the_padding(run):
    """An infinite mask, or gradient, times the zeros after the last channel would be NaN."""
    single = make(Case(1, 5, 3, (2, 2), (1, 1), mask=True, spread=0.0), np.float32)
    single = single.having(x=np.abs(single["x"]) + 1, w=np.abs(single["w"]) + 1)
    half, _ = halved(single, HALVES["float16"], HALVES["float16"])
    for p in (single, half):
        for name, result in (("mask", "y"), ("grad_y", "mask")):
            direction = "forward" if result == "y" else "backward"
            arrays, params = given(p.having(**{name: np.full_like(p[name], np.inf)}), direction)
            got, products = run("call", direction, arrays, params)
            assert products and (got[result] == np.inf).all(), (p.dtype, name)


def test_wrt(run):
    p = make(CASES["masked"], np.float32)
    want = family.expected(p)
    arrays, params = given(p, "backward")
    counts = {"x": 1, "offsets": 1, "mask": 1, "w": 1}
    for name, count in counts.items():
        got, products = run("call", "backward", arrays, {**params, "wrt": name})
        assert list(got) == [name] and len(products) == count
        against(want, p, got)


@pytest.mark.full
def test_layouts_and_out(run):
    """Arrays with gaps between their elements, as inputs and as results."""
    p = make(CASES["both"], np.float32)
    want = family.expected(p)
    both(run, p, want, {"gap": 3})
    both(run, p, want, {"gap": 2, "out": True})


@pytest.mark.full
def test_prepared_weights(run):
    """Packed by the first call, and right in the next."""
    for name in ("odd channels", "groups"):
        p = make(CASES[name], np.float32)
        groups = p["x"].shape[1] // p["w"].shape[1]
        forward, backward = both(run, p, family.expected(p), {"prepared": groups, "calls": 2})
        assert forward and backward


@pytest.mark.parametrize("forced", [True, False], ids=["two steps", "fused"])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_prepared_weights_of_calls_that_pack_in_different_ways(run, kind, forced):
    """With and without tf32, and for vectors of 8 and of 4 channels, of 12 channels in a group: each call has the bits that
    plain weights give, whatever came before."""
    calls, ys = [], []
    for offset_groups, tf32 in ((1, False), (1, True), (3, True), (2, True), (1, False), (3, False)):
        case = Case(1, 12, 3, (2, 2), (1, 1), offset_groups=offset_groups)
        p = make(case, np.float32).map(lambda _, a: a.astype(kind))
        calls.append(({"x": p["x"], "offsets": p["offsets"]}, {"allow_tf32": tf32}))
    told = run("in_turn", p["w"], calls, forced)
    for (prepared, plain, products), (arrays, _) in zip(told, calls, strict=True):
        assert_same_bits(prepared, plain)
        assert products == 2 * (forced and arrays["offsets"].shape[1] != 4), "but not of 6 channels"
        ys.append(plain)
    if kind == "float32":
        assert (ys[0] != ys[1]).any(), "tf32 shows"


def test_the_same_bits_for_any_slabs(run):
    """But for the gradient of x and sums over pixels: each number is computed from one pixel's columns."""
    p = make(CASES["masked"], np.float32)
    p = p.map(lambda name, a: np.round(a * 8) / 8)  # exact sums, since NumPy's own order of summation depends on sizes
    found = []
    for rows in SLABS.values():
        way = {"rows": rows}
        results = [run("call", direction, *given(p, direction), way)[0] for direction in ("forward", "backward")]
        found.append({"y": results[0]["y"], "mask": results[1]["mask"], "offsets": results[1]["offsets"]})
    for other in found[1:]:
        for name, array in other.items():
            assert_same_bits(array, found[0][name])


@pytest.mark.full
def test_no_images(run):
    p = make(Case(0, 8, 4, (3, 3), padding=1, mask=True, bias=True), np.float32)
    for direction in ("forward", "backward"):
        got, products = run("call", direction, *given(p, direction))
        assert not products and all(not a.any() for a in got.values())


# Which form.


def taken(run, p, direction="forward", module=None, **keywords):
    """Whether a call takes two steps, forced to where it can."""
    arrays, params = given(p, direction)
    return bool(run("call", direction, arrays, {**params, **keywords}, None, module)[1])


def test_where_two_steps_are_impossible(run):
    p = make(TWO_PIXELS, np.float32)
    half, _ = halved(p, HALVES["float16"], HALVES["float16"])
    assert taken(run, p) and taken(run, half) and taken(run, half, "backward")
    assert not taken(run, half, "backward", deterministic=True)
    assert not taken(run, make(TWO_PIXELS, np.float64))
    assert not taken(run, p, module={"tf32": True}), "torch would round float32"
    assert not taken(run, p, allow_tf32=True), "torch would not"
    assert taken(run, p, module={"tf32": True}, allow_tf32=True)
    assert taken(run, half, module={"tf32": True}), "a half type has nothing to do with it"
    assert not taken(run, half, module={"widens": False}) and taken(run, p, module={"widens": False})
    few = make(Case(1, 6, 1, (1, 1), (1, 1), offset_groups=2), np.float32)
    assert not taken(run, few), "no vectors of three channels"


def test_the_benchmarks_switch(run):
    """It runs the form that is not chosen, and leaves nothing behind: in tf32, not torch's switch either."""
    p = make(TWO_PIXELS, np.float32)
    half, _ = halved(p, HALVES["float16"], HALVES["float16"])
    for problem, dtype, more in ((half, "float16", {}), (p, "float32", {}), (p, "tf32", {"allow_tf32": True})):
        arrays, params = given(problem, "forward")
        assert run("forms", arrays, {**params, **more}, dtype) == ("two steps", [0, 1], True, True)
    impossible = make(Case(1, 6, 1, (1, 1), (1, 1), offset_groups=2), np.float32)
    assert run("forms", *given(impossible, "forward"), "float32") == (None,)


def test_no_framework_is_imported(run):
    """Nor is there a product for arrays of numba.cuda."""
    p = make(Case(1, 8, 2, (1, 1), (1, 1)), np.float32)
    for direction in ("forward", "backward"):
        assert run("without_frameworks", direction, *given(p, direction)) == ([], 0)
