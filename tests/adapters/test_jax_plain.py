"""The plain functions, called with JAX's arrays."""

import gc

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402 - after the skip
from jax_cases import NAMES, OPTIONS, arrays_of, plain  # noqa: E402

import numdcn  # noqa: E402
from numdcn.adapters._operators import operator  # noqa: E402


@pytest.mark.parametrize("name", NAMES)
def test_results_are_arrays_of_jax(name):
    arrays = {key: jnp.asarray(value) for key, value in arrays_of(name).items()}
    y = plain(name, arrays)
    assert isinstance(y, jax.Array)
    np.testing.assert_array_equal(y, plain(name, arrays_of(name)))
    given = {"offset_b": None} | arrays if name == "deform_conv_layer" else arrays
    for gradient in operator(name).backward(y, **given, **OPTIONS[name]):
        assert isinstance(gradient, jax.Array)


def test_results_are_not_copied_and_live_on():
    """Their memory is NumPy's, freed when the last array of JAX is gone."""
    x = jnp.asarray(arrays_of("conv")["x"])
    w = jnp.asarray(arrays_of("conv")["w"])
    results = [numdcn.conv_forward(x, w, padding=1) for _ in range(50)]
    gc.collect()
    expected = numdcn.conv_forward(np.asarray(x), np.asarray(w), padding=1)
    for result in results:
        assert result.unsafe_buffer_pointer() % 64 == 0
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(jax.jit(lambda a: 2 * a)(result), 2 * expected)


def test_arrays_on_the_way_and_arrays_gone():
    arrays = arrays_of("conv")
    x, w = jax.jit(lambda a: a + 1)(arrays["x"]), jnp.asarray(arrays["w"])  # x may not be computed yet
    np.testing.assert_array_equal(numdcn.conv_forward(x, w), numdcn.conv_forward(arrays["x"] + 1, arrays["w"]))
    x.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        numdcn.conv_forward(x, w)


def test_arguments_are_never_written():
    """What NumPy sees of them is read-only, so `out` cannot be an array of JAX."""
    arrays = {key: jnp.asarray(value) for key, value in arrays_of("conv").items()}
    y = numdcn.conv_forward(**arrays)
    with pytest.raises(ValueError, match="`out` is read-only"):
        numdcn.conv_forward(**arrays, out=y)


@pytest.mark.parametrize("dtype", ["int16", "int32", "bool"])
def test_other_types(dtype):
    arrays = {key: jnp.asarray(value).astype(dtype) for key, value in arrays_of("conv").items()}
    with pytest.raises(TypeError, match=f"`x` has dtype {dtype}, expected float16, bfloat16, float32 or float64; use"):
        numdcn.conv_forward(**arrays)


def test_traced_values():
    arrays = arrays_of("conv")
    with pytest.raises(TypeError, match="`x` is a traced JAX value, .* use numdcn.adapters.jax.conv"):
        jax.jit(numdcn.conv_forward)(arrays["x"], arrays["w"])
