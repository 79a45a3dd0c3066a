"""Sizes of levels beside arrays of torch and JAX: as sequences, and as integer arrays of NumPy or of the framework."""

import numpy as np
import pytest

import numdcn

LEVELS = ((3, 4), (1, 3))
rng = np.random.default_rng(0)
VALUE = rng.standard_normal((2, 15, 2, 4), dtype=np.float32)
LOCATIONS, WEIGHTS = rng.random((2, 5, 2, 3, 2), dtype=np.float32), rng.random((2, 5, 2, 3), dtype=np.float32)
COUNTS = (2, 1)


def of_torch(array):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return torch.from_numpy(np.array(array))


def of_jax(array):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    return jax.numpy.asarray(np.array(array))


FORMS = {
    "tuples": lambda made, numbers: numbers,
    "lists": lambda made, numbers: [list(n) if isinstance(n, tuple) else n for n in numbers],
    "an array of NumPy": lambda made, numbers: np.array(numbers),
    "an array": lambda made, numbers: made(numbers),
    "numbers of arrays": lambda made, numbers: [made(n) if isinstance(n, int) else tuple(made(n)) for n in numbers],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("made", [np.array, of_torch, of_jax])
def test_levels_in_every_form(made, form):
    value, locations, weights = map(made, (VALUE, LOCATIONS, WEIGHTS))
    levels, counts = FORMS[form](made, LEVELS), FORMS[form](made, COUNTS)
    want = numdcn.ms_deform_attn_forward(VALUE, LEVELS, LOCATIONS, WEIGHTS, points_per_level=COUNTS)
    y = numdcn.ms_deform_attn_forward(value, levels, locations, weights, points_per_level=counts)
    assert type(y) is type(value) and np.array_equal(np.asarray(y), want)
    named = {"sampling_locations": locations, "attention_weights": weights, "spatial_shapes": levels, "value": value}
    g = numdcn.ms_deform_attn_backward(y, **named, points_per_level=counts)
    right = numdcn.ms_deform_attn_backward(want, VALUE, LEVELS, LOCATIONS, WEIGHTS, points_per_level=COUNTS)
    for got, expected in zip(g, right, strict=True):
        assert type(got) is type(value) and np.array_equal(np.asarray(got), expected)


def test_levels_of_torch_beside_arrays_of_numpy():
    """As they are beside tensors on a GPU."""
    y = numdcn.ms_deform_attn_forward(VALUE, of_torch(LEVELS), LOCATIONS, WEIGHTS, points_per_level=of_torch(COUNTS))
    assert type(y) is np.ndarray


@pytest.mark.parametrize("made", [of_torch, of_jax])
def test_levels_that_are_no_integers(made):
    with pytest.raises(TypeError, match="`spatial_shapes` is .*float.*expected a sequence of pairs"):
        numdcn.ms_deform_attn_forward(made(VALUE), np.array(LEVELS, np.float32), made(LOCATIONS), made(WEIGHTS))


def test_a_value_of_torch_in_the_wrong_order():
    with pytest.raises(ValueError, match=r"use value\.permute\(0, 3, 1, 2\) if value is \(N, M, D, S\)$"):
        numdcn.ms_deform_attn_forward(*map(of_torch, (VALUE.transpose(0, 2, 3, 1), LEVELS, LOCATIONS, WEIGHTS)))
