"""How ms_deform_attn divides its work: into tiles and chunks of queries and bands of rows, none of which changes a bit."""

import numpy as np
import pytest
from checks import cpu
from family import assert_same
from test_ms_deform_attn import OPERATOR, Case, make

from numdcn._cpu.attention import run
from numdcn._cpu.simd import OVERRUN
from numdcn.ms_deform_attn.problem import problem

CASE = Case(2, 2, 5, ((33, 4), (2, 6), (1, 3)), (3, 2, 7), queries=200)


def sizes(case, dtype=np.float32):
    """The problem of a case."""
    p = make(case, dtype)
    arrays = run.AttentionArrays(*(p[name] for name in OPERATOR.arrays))
    return problem(arrays, case.levels, case.points if isinstance(case.points, tuple) else None)


def division(dtype):
    """How the work of the case is divided at present."""
    bands, _, rows = run._bands(sizes(CASE), dtype)
    return list(rows.memory), bands.chunk, run._sizes(sizes(CASE), dtype).tile


@pytest.fixture
def divided(monkeypatch):
    """A function that sets constants of the division of work; all are as before afterwards."""

    def forget():
        run._bands.cache_clear()
        run._sizes.cache_clear()

    def change(**constants):
        for name, value in constants.items():
            monkeypatch.setattr(run, name, value)
        forget()

    yield change
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "constants",
    [
        {"BAND_BYTES": 1},  # two rows
        {"BAND_POINTS": 100, "TILES": 40},
        {"POINTS": 1},  # chunks of one query
        {"POINTS": 16},
        {"TILES": 64},
        {"TILE": 1},
        {"TILES": 7, "POINTS": 30, "BAND_BYTES": 4000},
    ],
    ids=str,
)
def test_no_division_of_the_work_changes_a_bit(divided, constants, dtype):
    p = make(CASE, dtype)
    divided(BAND_BYTES=2**40, BAND_POINTS=2**40, POINTS=2**20, TILE=2**20, TILES=1)  # none
    y, g = p.forward(cpu("ms_deform_attn")), p.backward(cpu("ms_deform_attn"))
    whole = division(p.dtype)
    divided(**constants)
    assert division(p.dtype) != whole
    assert_same(p.forward(cpu("ms_deform_attn")), y)
    assert_same(p.backward(cpu("ms_deform_attn")), g)
    assert_same(p.backward(cpu("ms_deform_attn"), wrt="value"), type(g)(value=g.value))


@pytest.mark.parametrize("constants", [{}, {"BAND_BYTES": 1}, {"BAND_BYTES": 9999, "BAND_POINTS": 10}], ids=str)
def test_bands_cover_every_row_once(divided, constants):
    divided(**constants)
    bands, _, rows = run._bands(sizes(CASE), np.dtype(np.float32))
    seen = np.array(rows.memory).reshape(bands.bands, 3)
    for number, (height, _) in enumerate(CASE.levels):
        covered = [row for level, first, end in seen if level == number for row in range(first, end)]
        assert covered == list(range(height))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("points", range(1, 20))
def test_sums_of_bands_begin_at_cache_lines(points, dtype):
    """For any number of points: rows of a chunk are whole cache lines, and so are pixels."""
    p = sizes(Case(levels=((4, 4),), points=points, queries=1), dtype)
    bands = run._bands(p, np.dtype(dtype))[0]
    assert bands.pitch % OVERRUN == 0 and bands.padded * np.dtype(dtype).itemsize % 64 == 0
