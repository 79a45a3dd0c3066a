"""Convolutions in bfloat16 by the dot products of AVX512-BF16, where the processor has them: y within the bounds of
rounded columns, and its bits where no rounding can show; elsewhere the bits of float32.

Tests of arithmetic run on every machine; those that need the instructions, or a machine that can do without them, say
so.
"""

import numpy as np
import pytest
import test_conv
import test_deform_conv
from checks import LAYOUTS, assert_close, assert_same_bits, cpu, run_python, with_threads
from conv_cases import Case
from family import assert_images_are_independent, magnitudes
from family_halves import assert_rounded
from halves import HALVES, expected_of_narrow, halved, multiplies_pairs

import numdcn
from numdcn._call.scratch import Scratch
from numdcn._cpu import program
from numdcn._cpu.pairs import has_dot_products

BFLOAT16 = HALVES["bfloat16"]
LEAST = 2.0**-126  # of the normal numbers of float32 and of bfloat16
BACKENDS = {"conv": cpu("conv"), "deform_conv": cpu("deform_conv")}
MAKE = {"conv": test_conv.make, "deform_conv": test_deform_conv.make}
needs_dot_products = pytest.mark.skipif(not has_dot_products(), reason="this machine has no AVX512-BF16")

# Around the widths of vectors, tiles and chunks of pairs; groups and offset groups that divide pairs or do not.
CASES = [
    Case(channels=2, c_out=1, size=(4, 5), kernel=(1, 1)),
    Case(2, 6, 5, (7, 6), padding=1, mask=True, bias=True),
    Case(1, 14, 16, (9, 8), padding=1, bias=True),
    Case(1, 30, 17, (9, 8), (3, 2), (2, 1), padding=1, mask=True),
    Case(1, 32, 33, (7, 9), padding=1, bias=True),
    Case(2, 34, 64, (6, 7), (4, 5), padding=2, dilation=2, mask=True),
    Case(1, 62, 70, (7, 5), (1, 1), bias=True),
    Case(1, 130, 34, (8, 9), padding=1),
    Case(1, 390, 20, (5, 6), (2, 2), mask=True),
    Case(1, 800, 35, (3, 4), (1, 3)),
    Case(1, 12, 24, (7, 5), padding=1, groups=3, offset_groups=2, mask=True),
    Case(2, 16, 8, (7, 5), padding=1, groups=2, offset_groups=4, mask=True, bias=True),
    Case(1, 72, 40, (9, 8), padding=1, groups=4, offset_groups=3),
    Case(1, 64, 64, (6, 7), padding=1, groups=32, offset_groups=8, bias=True),
    Case(1, 8, 40, (40, 41), padding=1, stride=(2, 1), bias=True),
    Case(1, 7, 16, (9, 8), padding=1),
    Case(1, 12, 16, (9, 8), padding=1, offset_groups=4, mask=True),
    Case(1, 10, 10, (9, 8), padding=1, groups=10),
    Case(1, 6, 12, (9, 8), padding=1, groups=2),
    Case(1, 6, 3, (9, 8), padding=1, groups=3, bias=True),
    Case(2, 6, 6, (9, 8), padding=1, groups=3, mask=True),
    Case(1, 2, 1, (9, 8), padding=1, mask=True),
]
LARGE = [Case(2, 34, 40, (33, 31), padding=1, mask=True, bias=True), Case(1, 300, 70, (17, 18), padding=1)]


@pytest.fixture(params=[pytest.param("conv", marks=pytest.mark.full), "deform_conv"])
def operator(request):
    return request.param


def narrowed(problem):
    """(the problem in bfloat16, the same numbers as float32)"""
    return halved(problem, BFLOAT16, BFLOAT16)


def exact(operator, case, seed=0):
    """A problem whose columns bfloat16 holds and whose sums float32 holds, in any order.

    x is a multiple of 16 up to 112 and offsets are multiples of 1/4, so samples are whole numbers up to 112; the mask
    is a power of two. So columns have 7 bits, products with w below 8 are multiples of 1/2 below 2^11, and as many as
    there are here, at most 2400, stay below 2^22.
    """
    rng, p = np.random.default_rng(seed), MAKE[operator](case, np.float32)
    whole = {
        "x": lambda a: 16.0 * rng.integers(-7, 8, a.shape),
        "w": lambda a: rng.integers(-7, 8, a.shape).astype(float),
        "offsets": lambda a: rng.integers(-12, 13, a.shape) / 4,
        "mask": lambda a: 2.0 ** rng.integers(-1, 2, a.shape),
        "bias": lambda a: rng.integers(-9, 10, a.shape).astype(float),
    }
    return narrowed(p.map(lambda name, a: whole.get(name, lambda a: a)(a).astype(np.float32)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_sums(operator, case):
    """Nothing is rounded but the result, so it has the bits of float32, rounded: no term is missing, none is another's."""
    narrow, wide = exact(operator, case)
    assert_rounded(narrow.forward(BACKENDS[operator]), wide.forward(BACKENDS[operator]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
def test_arrays_of_any_layout(operator, layout, kernel):
    narrow, wide = exact(operator, Case(2, 36, 34, (7, 6), kernel, mask=True, bias=True))
    laid = narrow.map(lambda _, array: LAYOUTS[layout](array))
    assert_rounded(laid.forward(BACKENDS[operator]), wide.forward(BACKENDS[operator]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prepared_weights(operator, case):
    narrow, _ = narrowed(MAKE[operator](case, np.float32))
    prepared = narrow.holding(w=numdcn.prepare_weights(narrow["w"], groups=case.groups))
    for _ in range(2):
        assert_same_bits(prepared.forward(BACKENDS[operator]), narrow.forward(BACKENDS[operator]))


@pytest.mark.parametrize("operator", ["deform_conv"], indirect=True)
def test_columns_are_rounded_to_the_nearest(operator):
    """An output that is one column has the bits of float32, rounded; 31 pairs are sampled 16, 8, 4 and 1 at a time."""
    narrow, wide = narrowed(MAKE[operator](Case(1, 62, 62, (19, 18), (1, 1), mask=True), np.float32))
    one = np.eye(62, dtype=np.float32).reshape(62, 62, 1, 1)
    narrow, wide = narrow.holding(w=one.astype(BFLOAT16)), wide.holding(w=one)
    assert_rounded(narrow.forward(BACKENDS[operator]), wide.forward(BACKENDS[operator]))


def test_within_the_bounds(operator):
    """Columns that are rounded, for deform_conv; conv copies them."""
    for case in CASES:
        narrow, wide = narrowed(MAKE[operator](case, np.float32))
        rounds = operator == "deform_conv" and multiplies_pairs(narrow)
        y = narrow.forward(BACKENDS[operator]).astype(np.float64)
        assert_close(y, *expected_of_narrow(narrow, wide, rounds_terms=rounds)["y"], str(case))


def test_numbers_that_are_not_finite(operator):
    """NaN and infinity come out where they do in float32: a column stays NaN or infinite when it is rounded."""
    for case in CASES[1:12:2]:
        narrow, wide = narrowed(MAKE[operator](case, np.float32))
        for name in ("x", "w"):
            rng = np.random.default_rng(1)
            odd = rng.random(wide[name].shape) < 2 / wide["w"][0].size
            values = rng.choice(np.array([np.inf, -np.inf, np.nan], np.float32), odd.sum())
            spoilt = wide[name].copy()
            spoilt[odd] = values
            few, many = narrow.holding(**{name: spoilt.astype(BFLOAT16)}), wide.holding(**{name: spoilt})
            y, right = (p.forward(BACKENDS[operator]).astype(np.float32) for p in (few, many))
            for kind in (np.isnan, np.isposinf, np.isneginf):
                assert np.array_equal(kind(y), kind(right)), (case, name, kind.__name__)


@pytest.mark.parametrize("scales", [(2.0**-130, 1.0), (2.0**-130, 2.0**100), (1.0, 2.0**-132), (2.0**-70, 2.0**-58)])
def test_subnormal_numbers(operator, scales):
    """An operand below 2^-126 may be taken as 0, which loses less than 2^-126 times the other factor; so may a sum after
    each addition, of which there are as many as terms. Results are rounded to a subnormal number, by half of the least
    at most."""
    case = Case(1, 36, 20, (7, 6), padding=1, mask=True)
    p = MAKE[operator](case, np.float64)
    scaled = {"x": scales[0], "w": scales[1]}
    narrow, wide = narrowed(p.map(lambda name, a: a * scaled.get(name, 1.0)))
    y = narrow.forward(BACKENDS[operator]).astype(np.float64)
    value, bound = expected_of_narrow(narrow, wide, rounds_terms=True)["y"]
    terms = wide["w"][0].size
    ones = wide.map(lambda name, a: np.ones_like(a) if name in ("x", "w", "mask") else a)
    factors = [
        magnitudes(wide.holding(**{name: ones[name] for name in names}))["y"] for names in (("x", "mask"), ("w",))
    ]
    lost = LEAST * (factors[0] + factors[1] + terms)
    assert_close(y, value, bound + lost, "y")


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_bits_do_not_depend_on_threads_or_other_images(operator, case):
    narrow, _ = narrowed(MAKE[operator](case, np.float32))
    first, *others = with_threads(lambda: narrow.forward(BACKENDS[operator]), (1, 2, 7))
    assert all(y.tobytes() == first.tobytes() for y in others)
    if case.batch > 1:
        assert_images_are_independent(BACKENDS[operator], narrow, ("offsets", "mask") if operator != "conv" else ())


@needs_dot_products
def test_images_and_weights_take_half_the_memory(operator, monkeypatch):
    """Of the scratch memory, images come first and packed weights second."""
    sizes = []
    monkeypatch.setattr(program, "Scratch", lambda *asked: sizes.append(asked[:2]) or Scratch(*asked))
    narrow, wide = narrowed(MAKE[operator](Case(2, 64, 64, (30, 31), padding=1), np.float32))
    narrow.forward(BACKENDS[operator])
    wide.forward(BACKENDS[operator])
    (images, weights), (wide_images, wide_weights) = sizes
    assert images <= wide_images / 2 + 256 and weights <= wide_weights / 2 + 256


WITHOUT = """
import llvmlite.binding as llvm
print(llvm.get_host_cpu_name())
print(llvm.get_host_cpu_features().flatten().replace("+avx512bf16", "-avx512bf16"))
"""
PROGRAM = """
import numpy as np
from checks import cpu
from conv_cases import Case
from halves import HALVES, halved
from test_deform_conv import make
from numdcn._cpu.conv import forward
from numdcn._cpu.pairs import has_dot_products
kind, backend = HALVES["bfloat16"], cpu("deform_conv")
narrow, wide = halved(make(Case(1, 34, 64, (9, 8), padding=1, mask=True), np.float32), kind, kind)
rounded = wide.forward(backend).astype(kind)
same = rounded.tobytes() == narrow.forward(backend).tobytes()
text = "".join(code.library.get_asm_str() for name in ("forward_sampled", "forward_sampled_pairs")
               for code in getattr(forward, name).overloads.values())
print(has_dot_products(), same, "vdpbf16ps" in text, "vcvtne2ps2bf16" in text)
"""


@pytest.fixture
def machine_without(tmp_path):
    """Environment of a process that compiles for this processor without AVX512-BF16."""
    name, features = run_python(WITHOUT).stdout.split("\n")[:2]
    return {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": tmp_path}


@pytest.mark.full
def test_instructions_that_the_target_lacks_are_not_used(machine_without):
    """There y has the bits of float32, rounded."""
    assert run_python(PROGRAM, **machine_without).stdout.split() == ["False", "True", "False", "False"]


@pytest.mark.full
@needs_dot_products
def test_the_instructions_are_used(tmp_path):
    """The rounding of columns shows: without it bits would be those of float32."""
    assert run_python(PROGRAM, NUMBA_CACHE_DIR=tmp_path).stdout.split() == ["True", "False", "True", "True"]


@pytest.mark.full
@needs_dot_products
def test_on_a_machine_without(machine_without):
    """The tests of half types, and those here, on this processor without its dot products."""
    tests = [
        *("tests/cpu/test_dot_products.py", "tests/ops/test_conv.py", "tests/ops/test_deform_conv.py"),
        *("-k", "(Half or dot_products) and not instructions and not without"),
    ]
    done = run_python(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests], timeout=400, **machine_without)
    assert " passed" in done.stdout
