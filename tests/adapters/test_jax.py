"""numdcn.adapters.jax: values, gradients, types, layouts and errors."""

import inspect
import json

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402 - after the skip
from jax_cases import CHANNELS_FIRST, NAMES, OPTIONS, arrays_of, plain, plain_gradients  # noqa: E402

import numdcn  # noqa: E402
import numdcn.adapters.jax as adapter  # noqa: E402
from numdcn.adapters._operators import PER_CALL, operator  # noqa: E402
from numdcn.adapters.jax import _host, _traced  # noqa: E402

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:
    from jax.experimental import enable_x64


@pytest.fixture(params=["ffi", "callback"])
def way(request, monkeypatch):
    """Each way in which a compiled program can call Python."""
    if request.param == "ffi":
        assert _traced.FFI, "this jaxlib has no FFI, or another"
    else:
        monkeypatch.setattr(_traced, "FFI", False)
        jax.clear_caches()
        yield
        jax.clear_caches()
        return
    yield


def function(name, keys, options=None):
    """The function of an operator, of arrays by position."""
    options = OPTIONS[name] if options is None else options
    absent = {"offset_b": None} if name == "deform_conv_layer" and "offset_b" not in keys else {}
    return lambda *arrays: getattr(adapter, name)(**dict(zip(keys, arrays)), **absent, **options)


def differentiable(name, arrays):
    """The positions of the arrays that have gradients."""
    return tuple(i for i, key in enumerate(arrays) if key in operator(name).differentiable)


def same(got, value):
    assert np.asarray(got).dtype == value.dtype
    np.testing.assert_array_equal(np.asarray(got), value)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, way):
    """Those of the plain functions, bit for bit."""
    arrays = arrays_of(name)
    f = function(name, arrays)
    y = plain(name, arrays)
    same(jax.jit(f)(*arrays.values()), y)
    same(f(*arrays.values()), y)
    got, back = jax.vjp(f, *arrays.values())
    same(got, y)
    weights = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    gradients = dict(zip(arrays, back(weights)))
    for key, value in plain_gradients(name, weights, arrays).items():
        same(gradients.pop(key), value)
    for key, value in gradients.items():  # boxes
        assert key == "rois"
        same(value, np.zeros_like(arrays[key]))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradients_that_are_asked_for(name, monkeypatch):
    """For each differentiable array alone; the others are not computed."""
    arrays = arrays_of(name)
    f, wanted = function(name, arrays), []
    run = _host.run

    def spy(text, inputs, outputs):
        wanted.append(json.loads(text)["outputs"])
        run(text, inputs, outputs)

    monkeypatch.setattr(_traced, "FFI", False)
    monkeypatch.setattr(_traced._host, "run", spy)
    jax.clear_caches()
    for place in differentiable(name, arrays):
        key = list(arrays)[place]
        got = jax.jit(jax.grad(lambda *given: (f(*given) ** 2).sum(), argnums=place))(*arrays.values())
        assert wanted.pop() == [key]
        y = plain(name, arrays)
        same(got, plain_gradients(name, 2 * y, arrays, wrt=key)[key])
    jax.clear_caches()


@pytest.mark.parametrize("name", [name for name in NAMES if any(a.optional for a in operator(name).arrays)])
def test_optional_arrays_may_be_absent(name):
    table = operator(name).arrays
    arrays = {
        key: value for key, value in arrays_of(name).items() if not next(a for a in table if a.name == key).optional
    }
    f = function(name, arrays)
    y = plain(name, arrays)
    got, back = jax.vjp(f, *arrays.values())
    same(got, y)
    gradients = dict(zip(arrays, back(y)))
    for key, value in plain_gradients(name, y, arrays).items():
        same(gradients[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_differences(name):
    """In float64, along a random direction through all differentiable arrays."""
    with enable_x64(True):
        arrays = arrays_of(name, np.float64)
        f = jax.jit(function(name, arrays))
        rng = np.random.default_rng(2)
        step = {
            k: rng.standard_normal(v.shape) if k in operator(name).differentiable else 0 * v for k, v in arrays.items()
        }
        y, back = jax.vjp(f, *arrays.values())
        weights = rng.standard_normal(y.shape)
        slope = sum(float((np.asarray(g) * step[k]).sum()) for k, g in zip(arrays, back(weights)))
        h = 1e-6  # no sample passes an integer within it, where slopes jump: `exact` would differ
        ends = [np.asarray(f(*(v + s * h * step[k] for k, v in arrays.items()))) for s in (1, -1)]
        exact = float((weights * (ends[0] - ends[1])).sum()) / (2 * h)
        # A central difference is off by h**2 times a third derivative, of some 10 here, and by eps/h times values of some 100.
        assert slope == pytest.approx(exact, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_computed_in_float32(name, dtype):
    """With one rounding of y and of each gradient."""
    arrays = {key: jnp.asarray(value, dtype) for key, value in arrays_of(name).items()}
    wide = {key: np.asarray(value.astype(np.float32)) for key, value in arrays.items()}
    f = function(name, arrays)
    y, back = jax.vjp(jax.jit(f), *arrays.values())
    exact = plain(name, wide)
    same(y, np.asarray(jnp.asarray(exact).astype(dtype)))
    grad_y = jnp.asarray(np.random.default_rng(3).standard_normal(y.shape), dtype)
    gradients = dict(zip(arrays, back(grad_y)))
    for key, value in plain_gradients(name, np.asarray(grad_y.astype(np.float32)), wide).items():
        same(gradients[key], np.asarray(jnp.asarray(value).astype(dtype)))


def test_coordinates_may_be_finer():
    arrays = arrays_of("deform_conv")
    narrow = {key: jnp.asarray(v, jnp.bfloat16) if key != "offsets" else jnp.asarray(v) for key, v in arrays.items()}
    wide = {key: np.asarray(v.astype(np.float32)) for key, v in narrow.items()}
    y = adapter.deform_conv(**narrow, **OPTIONS["deform_conv"])
    same(y, np.asarray(jnp.asarray(plain("deform_conv", wide)).astype(jnp.bfloat16)))
    narrow["w"] = jnp.asarray(arrays["w"])
    with pytest.raises(
        TypeError, match="`w` has dtype float32 but `x` has bfloat16; expected one dtype for all arrays"
    ):
        adapter.deform_conv(**narrow, **OPTIONS["deform_conv"])


def last(name, key, array):
    """An argument with layout="NHWC", written down by hand."""
    if key in ("w", "offset_w"):
        return array.transpose(2, 3, 1, 0)
    if key in ("x", "offsets", "mask", "trans"):
        return np.moveaxis(array, 1, -1)
    return array


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CHANNELS_FIRST])
def test_what_is_channels_last_by_nature(name):
    """There the layout makes no difference."""
    arrays = arrays_of(name)
    y, back = jax.vjp(function(name, arrays, {**OPTIONS[name], "layout": "NHWC"}), *arrays.values())
    same(y, plain(name, arrays))
    gradients = dict(zip(arrays, back(y)))
    for key, value in plain_gradients(name, np.asarray(y), arrays).items():
        same(gradients[key], value)


@pytest.mark.parametrize("name", CHANNELS_FIRST)
def test_channels_last(name, way):
    """The same numbers in other places, gradients too."""
    arrays = arrays_of(name)
    given = {key: np.ascontiguousarray(last(name, key, value)) for key, value in arrays.items()}
    f = jax.jit(function(name, arrays, {**OPTIONS[name], "layout": "NHWC"}))
    y, back = jax.vjp(f, *given.values())
    exact = plain(name, arrays)
    same(y, np.moveaxis(exact, 1, -1))
    gradients = dict(zip(arrays, back(np.moveaxis(exact, 1, -1))))
    for key, value in plain_gradients(name, exact, arrays).items():
        same(gradients[key], last(name, key, value))


def test_flax_weights_are_those_of_a_convolution():
    """As `jax.lax` has them with the same numbers of dimensions; in float64, so that rounding is small."""
    with enable_x64(True):
        rng = np.random.default_rng(0)
        x, w = rng.standard_normal((2, 8, 9, 4)), rng.standard_normal((3, 3, 2, 6))
        y = adapter.conv(x, w, padding=1, stride=2, layout="NHWC")
        dimensions = ("NHWC", "HWIO", "NHWC")
        lax = jax.lax.conv_general_dilated(
            x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=dimensions, feature_group_count=2
        )
        np.testing.assert_allclose(y, lax, rtol=0, atol=1e-13)  # sums of 18 products of size 1 to 10, eps 2e-16


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches(name):
    if "rois" in arrays_of(name):
        arrays = arrays_of(name)
        arrays = {key: v[:0] if key != "x" else v for key, v in arrays.items()}
    else:
        images = {argument.name for argument in operator(name).arrays if argument.axes.startswith("(N,")}
        arrays = {key: v[:0] if key in images else v for key, v in arrays_of(name).items()}
    y, back = jax.vjp(jax.jit(function(name, arrays)), *arrays.values())
    same(y, plain(name, arrays))
    assert 0 in y.shape
    for key, gradient in zip(arrays, back(y)):
        same(gradient, np.zeros_like(arrays[key]))


@pytest.mark.parametrize("name", NAMES)
def test_signature_and_documentation(name):
    f, forward = getattr(adapter, name), operator(name).forward
    own, others = (inspect.signature(g).parameters for g in (f, forward))
    assert [*own] == [key for key in others if key not in PER_CALL] + ["layout"]
    for key in others:
        if key in own:
            assert (own[key].default, own[key].kind) == (others[key].default, others[key].kind)
            assert f"    {key}: " in f.__doc__
    assert f.__name__ == name and name in adapter.__all__
    for word in (
        "GPU",
        "prepare_weights",
        "`out`",
        " out:",
        "check:",
        "allow_tf32",
        "return_argmax",
        "Result`",
    ):
        assert word not in f.__doc__, word


def test_options_may_be_numbers_of_numpy():
    arrays = arrays_of("roi_align")
    y = adapter.roi_align(**arrays, output_size=np.int64(2), spatial_scale=np.float32(0.5), aligned=np.True_)
    same(y, numdcn.roi_align_forward(**arrays, output_size=2, spatial_scale=0.5, aligned=True))


def test_errors_while_tracing():
    """Those of the plain functions, as far as they depend on shapes, types and options."""
    arrays = arrays_of("deform_conv")
    x, offsets, w = (jnp.asarray(arrays[key]) for key in ("x", "offsets", "w"))
    f = adapter.deform_conv
    for given, options in (
        ((x, offsets[:, :4], w), {}),
        ((x, offsets, w), {"padding": -1}),
        ((x, offsets, w), {"stride": 1.5}),
        ((x[0], offsets, w), {}),
        ((x.astype(np.int32), offsets, w), {}),
    ):
        numpy = [np.asarray(a) for a in given]
        with pytest.raises((TypeError, ValueError)) as plainly:
            numdcn.deform_conv_forward(*numpy, **options)
        with pytest.raises(plainly.type) as traced:
            jax.eval_shape(lambda *a: f(*a, **options), *given)  # noqa: B023 - called at once
        assert str(traced.value) == str(plainly.value)
    with pytest.raises(ValueError, match=r"order of layout='NCHW'"):
        f(x, offsets, w, layout="NHWC")
    with pytest.raises(ValueError, match="`layout` is 'HWC'"):
        f(x, offsets, w, layout="HWC")
    with pytest.raises(TypeError, match=r"`x` is .*\(list\), expected a jax.Array, \(N, C, H, W\)"):
        f(x.tolist(), offsets, w)
    with pytest.raises(TypeError, match="`w` is a PreparedWeights"):
        f(x, offsets, numdcn.prepare_weights(arrays["w"]))
    with pytest.raises(TypeError, match=r"deform_conv\(\): got an unexpected keyword argument 'out'"):
        f(x, offsets, w, out=x)
    with pytest.raises(TypeError, match="`stride` is"):
        jax.jit(lambda s: f(x, offsets, w, stride=s))(1)
    with pytest.raises(TypeError, match="`w` has dtype float16 but `x` has float32"):
        f(x, offsets, w.astype(np.float16))


def test_errors_at_run_time(way):
    """Boxes are numbers: they are checked when a program runs, and its error has the words of the plain function."""
    arrays = arrays_of("roi_align")
    f = jax.jit(lambda x, rois: adapter.roi_align(x, rois, 2))
    arrays["rois"][1, 0] = 7
    with pytest.raises(ValueError) as plainly:
        numdcn.roi_align_forward(**arrays, output_size=2)
    with pytest.raises(jax.errors.JaxRuntimeError) as traced:
        jax.block_until_ready(f(**arrays))
    assert f"ValueError: {plainly.value}" in str(traced.value)
    arrays["rois"][1, 0] = 1
    same(f(**arrays), numdcn.roi_align_forward(**arrays, output_size=2))


def test_never_silent_zeros(way):
    """Forward mode and second derivatives are errors."""
    arrays = arrays_of("deform_conv")
    f = function("deform_conv", arrays)
    given = tuple(map(jnp.asarray, arrays.values()))

    def loss(*a):
        return (f(*a) ** 2).sum()

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(f, given, given)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(jax.jacfwd(loss))(*given)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.linearize(loss, *given)[1](*given)
    for place in range(len(given)):
        with pytest.raises((TypeError, ValueError)):
            jax.hessian(loss, argnums=place)(*given)
        with pytest.raises(ValueError, match="JVP|differentiated"):
            jax.grad(lambda *a: sum((g**2).sum() for g in jax.grad(loss, argnums=place)(*a)))(*given)  # noqa: B023
