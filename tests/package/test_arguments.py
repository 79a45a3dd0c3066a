"""What is accepted as an array or a number, for all operators alike."""

import datetime
import decimal
import fractions

import numpy as np
import pytest
from checks import assert_message, assert_same_bits
from family import blank, outputs

import numdcn
from numdcn.warm import _small_calls

CALLS = _small_calls(np.dtype(np.float32))
WAYS = ("forward", "backward")
rng = np.random.default_rng(0)


def random_like(array):
    """Random numbers, which are valid boxes if the array holds boxes."""
    return array.copy() if array.shape[-1] == 5 else rng.normal(size=array.shape).astype(array.dtype)


def call(operator, way, arrays, more, **others):
    """A small call of an operator; a backward has grad_y first."""
    return getattr(numdcn, f"{operator}_{way}")(*arrays, **more, **others)


def problem(operator, way):
    """(arrays by position, those by keyword, the other arguments, the result of the call with plain arrays)"""
    arrays, more = CALLS[operator]
    arrays = [random_like(array) for array in arrays]
    named = {name: random_like(value) for name, value in more.items() if isinstance(value, np.ndarray)}
    more = {name: value for name, value in more.items() if name not in named}
    y = outputs(call(operator, "forward", arrays, {**named, **more}))["y"]
    arrays = [random_like(y), *arrays] if way == "backward" else arrays
    return arrays, named, more, call(operator, way, arrays, {**named, **more})


class Hostile(np.ndarray):
    """Rejects every operation that a subclass can intercept."""

    def refuse(self, *_, **__):
        raise AssertionError("an operation of a subclass was used")

    __getitem__ = __setitem__ = __array_ufunc__ = __array_function__ = __len__ = __iter__ = __eq__ = refuse
    view = reshape = astype = copy = sum = transpose = __add__ = __mul__ = __array__ = __array_wrap__ = refuse
    __hash__ = None
    shape = dtype = strides = ndim = size = flags = ctypes = itemsize = nbytes = base = property(refuse)


class Single(np.ndarray):
    """A subclass of which no new instance, such as a view, can be made."""

    may_be_made = False

    def __array_finalize__(self, other):
        assert Single.may_be_made, "another array of a subclass was made"


def hostile(array, path):
    return np.ndarray.view(array, Hostile)


def single(array, path):
    Single.may_be_made = True
    try:
        return array.view(Single)
    finally:
        Single.may_be_made = False


def mapped(array, path):
    made = np.memmap(path / f"{len(list(path.iterdir()))}", array.dtype, "w+", shape=array.shape)
    made[...] = array
    return made


def records(array, path):
    return array.view(np.recarray)


KINDS = {"hostile": hostile, "single": single, "memmap": mapped, "recarray": records}


def assert_plain(result, want):
    result, want = outputs(result), outputs(want)
    assert result.keys() == want.keys()
    for name, array in result.items():
        assert type(array) is np.ndarray, name
        assert_same_bits(array, want[name], name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", CALLS)
def test_subclasses_are_the_arrays_that_they_hold(operator, way, kind, tmp_path):
    arrays, named, more, want = problem(operator, way)
    change = KINDS[kind]
    arrays, named = [change(a, tmp_path) for a in arrays], {name: change(a, tmp_path) for name, a in named.items()}
    assert_plain(call(operator, way, arrays, {**named, **more}), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", CALLS)
def test_an_out_of_a_subclass_is_filled_and_returned_itself(operator, way, kind, tmp_path):
    arrays, named, more, want = problem(operator, way)
    result = want
    if operator == "deform_conv_layer" and way == "forward":
        out = given = KINDS[kind](np.full_like(want.y, np.nan), tmp_path)
        assert call(operator, way, arrays, {**named, **more}, out=out).y is given
        assert_same_bits(np.ndarray.view(given, type=np.ndarray), want.y)
        return
    out = blank(result, layout=lambda array: KINDS[kind](array, tmp_path))
    got = call(operator, way, arrays, {**named, **more}, out=out)
    if way == "forward":
        got, out, want = {"y": got}, {"y": out}, {"y": want}
    else:
        got, out, want = got._asdict(), out._asdict(), want._asdict()
    for name, given in out.items():
        assert got[name] is given, name
        if given is not None:
            assert_same_bits(np.ndarray.view(given, type=np.ndarray), want[name], name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", [name for name in CALLS if "roi" in name])
def test_boxes_that_are_a_matrix(operator, way):
    arrays, named, more, want = problem(operator, way)
    at = 2 if way == "backward" else 1
    assert arrays[at].shape == (1, 5)
    arrays[at] = np.asmatrix(arrays[at])
    assert_plain(call(operator, way, arrays, {**named, **more}), want)


def test_points_and_results_that_are_matrices():
    x, points = rng.normal(size=(3, 4, 5, 6)).astype(np.float32), np.ones((3, 2), np.float32)
    want = numdcn.bilinear_sample_forward(x, points)
    assert_plain(numdcn.bilinear_sample_forward(x, np.asmatrix(points)), want)
    out = np.asmatrix(np.empty((3, 4), np.float32))
    assert numdcn.bilinear_sample_forward(x, points, out=out) is out
    assert_same_bits(np.asarray(out), want)
    grads = numdcn.bilinear_sample_backward(np.asmatrix(want), x, points)
    assert_plain(grads, numdcn.bilinear_sample_backward(want, x, points))


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_weights_of_a_subclass(kind, tmp_path):
    w, x = rng.normal(size=(3, 4, 2, 2)).astype(np.float32), rng.normal(size=(1, 4, 5, 6)).astype(np.float32)
    prepared = numdcn.prepare_weights(KINDS[kind](w, tmp_path))
    assert type(prepared.array) is np.ndarray
    assert_same_bits(numdcn.conv_forward(x, prepared), numdcn.conv_forward(x, w))


@pytest.mark.parametrize("kind", KINDS)
def test_an_argmax_of_a_subclass(kind, tmp_path):
    x, rois = rng.normal(size=(1, 3, 5, 6)).astype(np.float32), np.array([[0, 1, 1, 4, 3]], np.float32)
    y, argmax = numdcn.roi_pool_forward(x, rois, 2, return_argmax=True)
    want = numdcn.roi_pool_backward(y, x, rois, 2, argmax=argmax)
    assert_plain(numdcn.roi_pool_backward(y, x, rois, 2, argmax=KINDS[kind](argmax, tmp_path)), want)
    with pytest.raises(TypeError) as raised:
        numdcn.roi_pool_backward(y, x, rois, 2, argmax=np.ma.masked_array(argmax))
    assert_message(raised, "argmax", "MaskedArray", "int32")


# Numbers: what the doors accept, and what they reject.

INTS = {
    **dict.fromkeys(("conv", "deform_conv", "deform_conv_layer"), ("stride", "padding", "dilation")),
    **dict.fromkeys(("roi_align", "ps_roi_align", "deform_roi_pool"), ("output_size", "sampling_ratio")),
    **dict.fromkeys(("roi_pool", "ps_roi_pool"), ("output_size",)),
    "deform_ps_roi_pool": ("output_size", "group_size", "sample_per_part"),
    "dcnv3": ("kernel_size", "stride", "padding", "dilation"),
    "dcnv4": ("groups", "kernel_size", "stride", "padding", "dilation"),
}
FLOATS = {
    **dict.fromkeys(("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool"), ("spatial_scale",)),
    "deform_roi_pool": ("spatial_scale", "gamma"),
    "deform_ps_roi_pool": ("spatial_scale", "trans_std"),
    **dict.fromkeys(("dcnv3", "dcnv4"), ("offset_scale",)),
}
NO_NUMBERS = [
    np.timedelta64(1),
    np.timedelta64(1, "s"),
    np.datetime64(1, "s"),
    datetime.timedelta(seconds=1),
    datetime.date(2000, 1, 1),
    True,
    np.True_,
    1j,
    np.complex64(1),
    decimal.Decimal(1),
    "1",
    None,
    np.array([1]),
]
NO_INTS = [1.0, np.float32(1), fractions.Fraction(1)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "operator, name, value",
    [(o, n, v) for o, names in INTS.items() for n in names for v in NO_NUMBERS + NO_INTS]
    + [(o, n, v) for o, names in FLOATS.items() for n in names for v in NO_NUMBERS]
    + [("deform_conv_layer", "mask_scale", v) for v in NO_NUMBERS],
    ids=repr,
)
def test_what_is_no_number_is_refused(operator, name, value, way):
    arrays, named, more, _ = problem(operator, way)
    with pytest.raises(TypeError) as raised:
        call(operator, way, arrays, {**named, **more, name: value})
    assert_message(raised, name, "None" if value is None else type(value).__name__, "number|int|1 or 2")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator, name", [(o, n) for o, names in FLOATS.items() for n in names])
def test_numbers_of_all_kinds_are_taken(operator, name, way):
    arrays, named, more, _ = problem(operator, way)
    want = call(operator, way, arrays, {**named, **more, name: 0.5})
    for value in (np.float32(0.5), np.float64(0.5), np.float16(0.5), fractions.Fraction(1, 2)):
        assert_plain(call(operator, way, arrays, {**named, **more, name: value}), want)


@pytest.mark.parametrize("value", [np.timedelta64(1), np.True_, 1j, decimal.Decimal(1)], ids=repr)
def test_settings_are_numbers(value):
    for set_it in (
        numdcn.set_num_threads,
        numdcn.set_scratch_limit,
        lambda seed: numdcn.deform_conv_layer_init(2, 2, 3, seed=seed),
        lambda size: numdcn.deform_conv_layer_init(size, 2, 3),
        lambda groups: numdcn.prepare_weights(np.ones((1, 1, 1, 1), np.float32), groups=groups),
    ):
        with pytest.raises(TypeError, match=type(value).__name__):
            set_it(value)
