"""prepare_weights returns an object that can replace w: the same results, a snapshot, picklable, with clear errors."""

import copy
import pickle

import numpy as np
import pytest
from checks import LAYOUTS, assert_same_bits, cpu, run_python
from conv_cases import Case
from family import assert_same
from halves import HALVES
from test_deform_conv import make

import numdcn

BACKEND = cpu("deform_conv")
CASES = {
    "plain": Case(2, 33, 17, (9, 8), padding=1, bias=True),
    "grouped": Case(1, 12, 6, (9, 8), padding=1, groups=3, offset_groups=4, mask=True),
    "depthwise": Case(1, 20, 40, (9, 8), padding=1, groups=20, bias=True),
    "one": Case(1, 1, 1, (5, 4), (1, 1)),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, *HALVES.values()])
def test_the_same_bits_as_plain_weights(case, dtype):
    problem = make(case, dtype)
    prepared = problem.holding(w=numdcn.prepare_weights(problem["w"], groups=case.groups))
    for _ in range(2):
        assert_same_bits(prepared.forward(BACKEND), problem.forward(BACKEND), "y")
        assert_same(prepared.backward(BACKEND), problem.backward(BACKEND))


def test_shape_dtype_and_groups_are_told(case):
    w = make(case, np.float32)["w"]
    prepared = numdcn.prepare_weights(w, groups=case.groups)
    assert isinstance(prepared, numdcn.PreparedWeights)
    assert prepared.shape == w.shape and prepared.dtype == w.dtype and prepared.groups == case.groups
    assert numdcn.prepare_weights(make(CASES["one"])["w"]).groups == 1
    for name in ("shape", "dtype", "groups"):
        assert name in repr(prepared) or str(getattr(prepared, name)) in repr(prepared)


def test_it_is_a_snapshot(case):
    problem = make(case, np.float32)
    want_y, want_g = problem.forward(BACKEND), problem.backward(BACKEND)
    w = problem["w"].copy()
    prepared = problem.holding(w=numdcn.prepare_weights(w, groups=case.groups))
    w[...] = np.nan
    assert_same_bits(prepared.forward(BACKEND), want_y, "y")
    assert_same(prepared.backward(BACKEND), want_g)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_any_layout(case, layout):
    problem = make(case, np.float32)
    prepared = numdcn.prepare_weights(LAYOUTS[layout](problem["w"]), groups=case.groups)
    assert_same_bits(problem.holding(w=prepared).forward(BACKEND), problem.forward(BACKEND), "y")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_it_pickles_as_the_plain_weights(case, protocol):
    problem = make(case, np.float32)
    prepared = numdcn.prepare_weights(problem["w"], groups=case.groups)
    problem.forward(BACKEND)  # what it packs here is not pickled
    problem.holding(w=prepared).backward(BACKEND)
    data = pickle.dumps(prepared, protocol)
    assert len(data) < len(pickle.dumps(problem["w"], protocol)) + 200, "more than the plain weights is pickled"
    again = pickle.loads(data)
    assert isinstance(again, numdcn.PreparedWeights)
    assert (again.shape, again.dtype, again.groups) == (prepared.shape, prepared.dtype, prepared.groups)
    assert_same_bits(problem.holding(w=again).forward(BACKEND), problem.forward(BACKEND), "y")
    assert_same(problem.holding(w=again).backward(BACKEND), problem.backward(BACKEND))


@pytest.mark.parametrize("dtype", [np.float32, *HALVES.values()])
def test_copies_work(case, dtype):
    problem = make(case, dtype)
    prepared = numdcn.prepare_weights(problem["w"], groups=case.groups)
    for again in (copy.copy(prepared), copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert_same_bits(problem.holding(w=again).forward(BACKEND), problem.forward(BACKEND), "y")


def test_an_unpickled_object_works_in_a_process_that_never_packed(tmp_path):
    problem = make(CASES["plain"], np.float32)
    np.savez(
        tmp_path / "arrays.npz",
        x=problem["x"],
        offsets=problem["offsets"],
        y=problem.forward(BACKEND),
        bias=problem["bias"],
    )
    (tmp_path / "w.pickle").write_bytes(pickle.dumps(numdcn.prepare_weights(problem["w"])))
    code = (
        "import pathlib, pickle, sys; import numpy as np; import numdcn\n"
        "a = np.load(sys.argv[1] + '/arrays.npz')\n"
        "w = pickle.loads((pathlib.Path(sys.argv[1]) / 'w.pickle').read_bytes())\n"
        "y = numdcn.deform_conv_forward(a['x'], a['offsets'], w, a['bias'], padding=1)\n"
        "print('equal', np.array_equal(y, a['y']))"
    )
    assert "equal True" in run_python(code, tmp_path).stdout


def test_the_array_cannot_be_changed_through_it(case):
    prepared = numdcn.prepare_weights(make(case, np.float32)["w"], groups=case.groups)
    for name in ("shape", "dtype", "groups"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(prepared, name, None)


@pytest.mark.parametrize(
    "w, groups, error, words",
    [
        ([[1.0]], 1, TypeError, ["w", "list"]),
        (None, 1, TypeError, ["w", "None"]),
        (np.zeros((2, 2, 3, 3), np.uint16), 1, TypeError, ["w", "uint16", "bfloat16", "float32"]),
        (np.zeros((2, 2, 3, 3), np.int32), 1, TypeError, ["w", "int32", "float32"]),
        (np.zeros((2, 2, 3), np.float32), 1, ValueError, ["w", "(2, 2, 3)"]),
        (np.zeros((2, 2, 0, 3), np.float32), 1, ValueError, ["w", "(2, 2, 0, 3)"]),
        (np.zeros((5, 2, 3, 3), np.float32), 2, ValueError, ["groups", "2", "5"]),
        (np.zeros((4, 2, 3, 3), np.float32), 0, ValueError, ["groups", "0"]),
        (np.zeros((4, 2, 3, 3), np.float32), -1, ValueError, ["groups", "-1"]),
        (np.zeros((4, 2, 3, 3), np.float32), 1.0, TypeError, ["groups", "1.0"]),
        (np.zeros((4, 2, 3, 3), np.float32), True, TypeError, ["groups", "True"]),
    ],
)
def test_what_cannot_be_prepared(w, groups, error, words):
    with pytest.raises(error) as raised:
        numdcn.prepare_weights(w, groups=groups)
    for word in words:
        assert word in str(raised.value)


def test_prepared_weights_must_fit_the_call():
    """Prepared weights must match the call as plain weights must: groups, dtype."""
    problem = make(CASES["grouped"], np.float32)
    for groups in (1, 2):
        prepared = numdcn.prepare_weights(problem["w"], groups=groups)
        for direction in ("forward", "backward"):
            with pytest.raises(ValueError, match=r"\bw\b") as raised:
                getattr(problem.holding(w=prepared), direction)(BACKEND)
            assert "3" in str(raised.value) or "12" in str(raised.value)
    other = numdcn.prepare_weights(problem["w"].astype(np.float64), groups=3)
    with pytest.raises(TypeError, match=r"\bw\b.*float"):
        problem.holding(w=other).forward(BACKEND)
