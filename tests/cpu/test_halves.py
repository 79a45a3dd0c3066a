"""float16 and bfloat16 to float32 and back: every number, every tie, at every SIMD width, with and without the
instructions of the processor."""

import ml_dtypes
import numpy as np
import pytest
from checks import assert_same_bits, run_python
from test_simd_widths import MACHINES, on_x86

from numdcn._cpu.widened import convert, widened

KINDS = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
CONVERTING = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c"}


@pytest.fixture(params=list(KINDS))
def kind(request):
    return KINDS[request.param]


def every(kind):
    """All numbers of a half type, NaN of every payload included."""
    return np.arange(2**16, dtype=np.uint16).view(kind)


def rounded(singles, kind):
    """float32 numbers, rounded by the library."""
    made = np.zeros(singles.shape, kind)
    convert(made, singles, back=True)
    return made


def assert_same_numbers(a, b):
    """The same bits, but for the sign and the payload of NaN."""
    nan = np.isnan(b.astype(np.float32))
    assert (np.isnan(a.astype(np.float32)) == nan).all()
    assert_same_bits(a[~nan], b[~nan])


def ties(kind):
    """Halfway between any two neighbours, and the float32 numbers next to them; where a type overflows, too."""
    bits = every(kind).view(np.int16)
    finite = every(kind)[(bits >= 0) & np.isfinite(every(kind).astype(np.float32))].astype(np.float64)
    last = 2 * finite[-1] - finite[-2]  # would be the next, if the exponent went on
    middle = ((np.append(finite, last)[1:] + finite) / 2).astype(np.float32).view(np.int32)  # exact in float32
    near = (middle[:, None] + np.array([-1, 0, 1], np.int32)).ravel().view(np.float32)
    return np.concatenate([near, -near])


def singles(seed=0):
    """float32 numbers of all kinds: any bits, zeros, the smallest and largest, infinities, NaN of any payload."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, 2**20 + 7, dtype=np.uint64).astype(np.uint32)
    info = np.finfo(np.float32)
    special = np.array(
        [0, info.smallest_subnormal, info.tiny, info.max, 2**-24, 2**-25, 65504, 65520, np.inf, np.nan], np.float32
    )
    signalling = np.array([0x7F800001, 0xFFBFFFFF, 0x7F802000, 0x7F810000], np.uint32).view(np.float32)
    return np.concatenate([bits.view(np.float32), special, -special, signalling])


def test_widening_is_exact(kind):
    made = widened(every(kind))
    assert made.dtype == np.float32
    with np.errstate(invalid="ignore"):
        assert_same_numbers(made, every(kind).astype(np.float32))


def test_there_and_back(kind):
    assert_same_numbers(rounded(widened(every(kind)), kind), every(kind))


@pytest.mark.parametrize("numbers", [ties, lambda kind: singles()], ids=["ties", "any"])
def test_rounding_is_that_of_numpy(kind, numbers):
    """To the nearest, ties to even; subnormal numbers are kept, overflow is infinite, NaN stays NaN."""
    with np.errstate(all="ignore"):
        assert_same_numbers(rounded(numbers(kind), kind), numbers(kind).astype(kind))


@pytest.mark.parametrize("count", [1, 7, 15, 16, 17, 31, 33, 2**14 - 1, 2**14, 2**14 + 1, 3 * 2**14 + 5])
def test_any_number_of_elements(kind, count):
    """At any address; nothing before or after them is written."""
    numbers = np.resize(every(kind)[:0x7000], count + 3)
    for start in (0, 1, 3):
        part = numbers[start : start + count]
        assert_same_numbers(widened(part), part.astype(np.float32))
        room = np.full(count + 5, 7, kind)
        convert(room[start : start + count], part.astype(np.float32), back=True)
        assert_same_bits(room[start : start + count], part)
        assert (room[:start] == 7).all() and (room[start + count :] == 7).all()


@pytest.mark.parametrize("shape, order", [((3, 5, 7), (2, 0, 1)), ((2, 3, 4, 5), (0, 2, 3, 1)), ((70000, 3), (1, 0))])
def test_arrays_with_gaps(kind, shape, order):
    """Both ways between memory orders, in pieces."""
    whole = np.resize(every(kind)[:0x7000], tuple(2 * n for n in shape))
    part = whole[(slice(None, None, 2),) * len(shape)].transpose(order)
    made = np.zeros(part.shape, np.float32)
    convert(part, made, back=False)
    assert_same_numbers(made, part.astype(np.float32))
    room = np.full_like(whole, 7)
    convert(room[(slice(None, None, 2),) * len(shape)].transpose(order), made, back=True)
    assert_same_bits(room[(slice(None, None, 2),) * len(shape)].transpose(order), part)
    assert (room == 7).sum() >= room.size - part.size


def assembly(**environment):
    """(whether the target is said to convert float16, the machine code of both conversions as text)"""
    code = (
        "from numba.core import types\nfrom numdcn._cpu import halves\n"
        "from numdcn._formulas.halves import converts_float16\n"
        "print(converts_float16())\n"
        "for name in ('widen_float16', 'round_to_float16', 'widen_bfloat16', 'round_to_bfloat16'):\n"
        "    kernel = getattr(halves, name)\n"
        "    signature = (types.float32, types.int64, types.int64, types.int64)\n"
        "    kernel.compile(signature)\n"
        "    print(kernel.overloads[signature].library.get_asm_str())\n"
    )
    first, text = run_python(code, **environment).stdout.split("\n", 1)
    return first == "True", text


@pytest.mark.full
@on_x86
def test_instructions_that_the_target_lacks_are_not_used(tmp_path):
    for number, machine in enumerate([*MACHINES.values(), CONVERTING, {}]):
        has, text = assembly(**machine, NUMBA_CACHE_DIR=tmp_path / str(number))
        assert has == ("f16c" in machine.get("NUMBA_CPU_FEATURES", "f16c")) or not machine
        assert ("vcvtph2ps" in text) == ("vcvtps2ph" in text) == has
        assert not any(word in text for word in ("extendhf", "truncsf", "gnu_h2f", "gnu_f2h", "vcvtneps2bf16"))


@pytest.mark.full
@on_x86
@pytest.mark.parametrize("machine", [*MACHINES.values(), CONVERTING], ids=["256", "128", "256 with instructions"])
def test_on_narrower_machines(machine, tmp_path):
    tests = ["tests/cpu/test_halves.py", "-k", "not instructions and not narrower"]
    done = run_python(
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests], NUMBA_CACHE_DIR=tmp_path, **machine
    )
    assert " passed" in done.stdout and "skipped" not in done.stdout
