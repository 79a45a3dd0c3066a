"""deform_conv on tensor cores: several tiles of everything, rounding, NaN. In Numba's simulator, or on a GPU.

The simulator's tiles are 16 x 16 or 32 x 32, 8 or 16 words deep (`warp_tiles`, `weight_warps`, `column_warps`).
"""

import family
import family_gpu
import numpy as np
import pytest
import test_deform_conv
from checks import assert_close
from conv_cases import Case
from test_deform_conv import OPERATOR, make  # noqa: F401 - OPERATOR tells the fixtures what `gpu` is

TILES = {  # more than one of everything in the simulator; taps that do not divide evenly among three blocks
    "channels and outputs": Case(3, 30, 35, (2, 3), (1, 5), padding=(0, 2), offset_groups=2, mask=True, bias=True),
    "groups": Case(2, 30, 68, (1, 3), (1, 2), padding=(0, 1), groups=2, mask=True, bias=True),
    "few outputs": Case(2, 18, 9, (2, 3), (1, 4), padding=(0, 1), mask=True, bias=True),
    "pixels": Case(2, 16, 2, (5, 14), (1, 1), groups=2, mask=True),
}


@pytest.mark.full
@pytest.mark.parametrize("kind", [np.float16, np.float32], ids=["half", "tf32"])
@pytest.mark.parametrize("case", TILES.values(), ids=TILES)
def test_many_tiles_of_tensor_cores(gpu, case, kind):
    """Several chunks of channels, outputs and pixels, several plans, images that end within a chunk, odd numbers of
    taps."""
    narrow, wide = family_gpu.halved(make(case, np.float32), np.dtype(kind), np.dtype(kind))
    want = family_gpu.expected_of_narrow(narrow, wide, True)
    if kind is np.float32:
        sizes = family.magnitudes(wide)
        want = {name: (value, bound + 2.0**-10 * sizes[name]) for name, (value, bound) in want.items()}
    for result in (narrow.forward(gpu, allow_tf32=True), narrow.backward(gpu, allow_tf32=True)):
        for name, array in family.outputs(result).items():
            assert_close(array.astype(np.float64), *want[name], name)


def test_tf32_is_rounded_to_nearest(gpu):
    """Halfway and above rounds away from zero, in each operand: sums of few such numbers are exact."""
    low, high = np.float32(1 + 2.0**-10 - 2.0**-20), np.float32(1 + 2.0**-10)
    case = Case(1, 8, 8, (2, 2), (1, 1), mask=True, spread=0.0)
    p = make(case, np.float32).map(lambda name, a: np.full_like(a, 0 if name == "offsets" else 1))
    for name, result in (("x", "y"), ("w", "y"), ("x", "w"), ("grad_y", "w"), ("grad_y", "x"), ("w", "x")):
        spoilt = p.having(**{name: np.full_like(p[name], low)})
        run = spoilt.forward if result == "y" else spoilt.backward
        got = family.outputs(run(gpu, allow_tf32=True))[result]
        length = 4 if result == "w" else 8
        assert (got == length * high).all(), (name, result, got)


@pytest.mark.full
@pytest.mark.parametrize("kind", [np.float16, np.float32], ids=["half", "tf32"])
@pytest.mark.parametrize("name", ["x", "w", "grad_y", "mask"])
def test_nan_with_tensor_cores(gpu, name, kind):
    """One NaN affects what the formulas say and no other tile, group or padding."""
    p = test_deform_conv.TestGPU.usual(np.float32)
    for at in (p[name][0].size // 2 - 1, p[name][0].size // 2, p[name].size - 1):
        array = p[name].copy()
        array.reshape(-1)[at] = np.nan
        spoilt = p.having(**{name: array})
        narrow, wide = family_gpu.halved(spoilt, np.dtype(kind), np.dtype(kind))
        names = [n for n in p.wanted() if n != "offsets" or name != "grad_y"]
        results = {
            **family.outputs(narrow.forward(gpu, allow_tf32=True)),
            **family.outputs(narrow.backward(gpu, wrt=names, allow_tf32=True)),
        }
        want = family.expected(wide)
        for n, got in results.items():
            assert np.array_equal(np.isnan(got.astype(np.float32)), np.isnan(want[n][0])), (n, at)
