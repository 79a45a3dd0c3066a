"""numdcn on Dask arrays: the bits of the plain functions, block by block, under every scheduler; rules and errors."""

import collections
import inspect
import pickle
import re

import numpy as np
import pytest
from checks import assert_same_bits, run_python

dask = pytest.importorskip("dask", reason="dask is not installed: pip install 'dask[array,distributed]'")
da = pytest.importorskip("dask.array", reason="dask is not installed: pip install 'dask[array,distributed]'")
from dask.array.utils import assert_eq  # noqa: E402 - after the check that it is there

import numdcn  # noqa: E402
from numdcn._cpu.threads import available_cpus  # noqa: E402
from numdcn.adapters import _operators  # noqa: E402
from numdcn.adapters import dask as adapter  # noqa: E402

NAMES = [op.name for op in adapter.OPERATORS]
CHUNKS = (2, 1, 3, 1)  # of a batch of 7
N, C, H, W, C_OUT = sum(CHUNKS), 4, 5, 6, 3
TAPS = 9
GEOMETRY = {"stride": (1, 2), "padding": ((1, 0), (2, 1)), "dilation": 1}
HO, WO = 4, 4  # of GEOMETRY


def arrays(name, dtype=np.float32):
    """The arrays of a call by name."""
    rng = np.random.default_rng(0)
    modulated = 3 * TAPS  # offset channels of a modulated layer
    shapes = {
        "bilinear_sample": {"x": (N, C, H, W), "points": (N, 8, 2)},
        "conv": {"x": (N, C, H, W), "w": (C_OUT, C, 3, 3), "bias": (C_OUT,)},
        "deform_conv": {
            "x": (N, C, H, W), "offsets": (N, 2 * TAPS, HO, WO), "w": (C_OUT, C, 3, 3), "bias": (C_OUT,), "mask": (N, TAPS, HO, WO),
        },
        "deform_conv_layer": {
            "x": (N, C, H, W), "w": (C_OUT, C, 3, 3), "offset_w": (modulated, C, 3, 3), "offset_b": (modulated,), "bias": (C_OUT,),
        },
    }  # fmt: skip
    return {key: rng.standard_normal(shape).astype(dtype) for key, shape in shapes[name].items()}


def options(name):
    """The other arguments of a call."""
    more = {"modulated": True, "mask_scale": 2} if name == "deform_conv_layer" else {}
    return {} if name == "bilinear_sample" else {**GEOMETRY, **more}


def lazy(given):
    """Arrays as the adapter takes them. Those beside x have other chunks, along all axes."""
    made = {}
    for key, array in given.items():
        if array.shape[0] != N or key == "w":
            made[key] = array
        else:
            made[key] = da.from_array(array, chunks=(CHUNKS, 3, 2, 4)[: array.ndim] if key == "x" else 2)
    return made


def plain(name, way, *args, **keywords):
    return getattr(numdcn, f"{name}_{way}")(*args, **keywords)


def first(result):
    """y of a forward's result."""
    return getattr(result, "y", result)


def gradient_of_y(name, given):
    y = first(plain(name, "forward", **given, **options(name)))
    return np.random.default_rng(1).standard_normal(y.shape).astype(y.dtype)


def backward(name, given, grad_y, **more):
    """The lazy gradients."""
    return getattr(adapter, f"{name}_backward")(da.from_array(grad_y, chunks=3), **lazy(given), **options(name), **more)


def tree(parts):
    """A sum of neighbours, then of those sums, and so on."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2])] + parts[len(parts) - len(parts) % 2 :]
    return parts[0]


def expected_gradients(name, given, grad_y):
    """Those of the plain function, for each chunk: joined where there is a batch axis, else added up."""
    ends = np.cumsum(CHUNKS)
    split = {key for key, array in lazy(given).items() if isinstance(array, da.Array)}
    parts = []
    for start, end in zip(ends - CHUNKS, ends):
        block = {key: array[start:end] if key in split else array for key, array in given.items()}
        parts.append(plain(name, "backward", grad_y[start:end], **block, **options(name)))
    kind = type(parts[0])
    return kind(
        *(
            (np.concatenate if key in split else tree)([getattr(part, key) for part in parts]) for key in kind._fields
        )  # all are given
    )


def tasks(*collections_):
    """How often a task of each kind runs in a computation of them all, by the beginning of its key."""
    ran = collections.Counter()

    class Watch(dask.callbacks.Callback):
        def _pretask(self, key, dsk, state):
            ran[re.sub("-[0-9a-f]{32}.*", "", key[0] if isinstance(key, tuple) else key)] += 1

    with Watch():
        dask.compute(*collections_, scheduler="synchronous")
    return ran


def test_every_operator_over_images_is_there():
    every = {op.name: {argument.name for argument in op.arrays} for op in _operators.operators()}
    assert {*NAMES} == {name for name, names in every.items() if "rois" not in names} != set()
    for name in every:
        assert hasattr(adapter, name) == hasattr(adapter, f"{name}_backward") == (name in NAMES)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_forward(name, dtype):
    given = arrays(name, dtype)
    result = getattr(adapter, name)(**lazy(given), **options(name))
    value = plain(name, "forward", **given, **options(name))
    assert type(result) is (type(value) if isinstance(value, tuple) else da.Array)
    for made, right in zip(result, value) if isinstance(value, tuple) else [(result, value)]:
        assert made.chunks == (CHUNKS, *((size,) for size in right.shape[1:]))
        assert_eq(made, right, scheduler="synchronous")  # also compares dtypes and shapes of meta and of all chunks
        assert_same_bits(made.compute(scheduler="synchronous"), right)


@pytest.mark.parametrize("name", NAMES)
def test_backward(name):
    given = arrays(name)
    grad_y = gradient_of_y(name, given)
    result, right = backward(name, given, grad_y), expected_gradients(name, given, grad_y)
    assert type(result) is type(right)
    for key, made, value in zip(result._fields, result, right, strict=True):
        assert made.chunks[0] == (CHUNKS if key in ("x", "offsets", "mask", "points") else (len(given[key]),))
        assert_eq(made, value, scheduler="synchronous")
        assert_same_bits(made.compute(scheduler="synchronous"), value, key)


def test_without_a_mask_the_layer_has_none():
    given = arrays("deform_conv_layer")
    given |= {"offset_w": given["offset_w"][: 2 * TAPS], "offset_b": None}
    made = adapter.deform_conv_layer(
        **{**lazy({"x": given["x"]}), **{k: v for k, v in given.items() if k != "x"}}, **GEOMETRY
    )
    right = numdcn.deform_conv_layer_forward(**given, **GEOMETRY)
    assert made.mask is right.mask is None
    assert_same_bits(made.offsets.compute(), right.offsets)


def test_the_layer_reuses_its_residuals():
    given = arrays("deform_conv_layer")
    grad_y = gradient_of_y("deform_conv_layer", given)
    forward = adapter.deform_conv_layer(**lazy(given), **options("deform_conv_layer"))
    other = forward.offsets + 0.25  # so that it shows whether they are used
    right = numdcn.deform_conv_layer_backward(
        grad_y, **given, **options("deform_conv_layer"), offsets=other.compute(), mask=forward.mask.compute(), wrt="x"
    )
    made = backward("deform_conv_layer", given, grad_y, offsets=other, mask=forward.mask, wrt="x")
    assert_same_bits(made.x.compute(), right.x)


@pytest.mark.parametrize("name", NAMES)
def test_wrt(name):
    given = arrays(name)
    grad_y = gradient_of_y(name, given)
    everything = backward(name, given, grad_y)
    for key in everything._fields:
        only = backward(name, given, grad_y, wrt=key)
        assert [field for field, made in zip(only._fields, only) if made is not None] == [key]
        pair = dask.compute(getattr(only, key), getattr(everything, key), scheduler="synchronous")
        assert_same_bits(*pair, key)
    assert not any(backward(name, given, grad_y, wrt=()))


def test_arrays_that_are_absent():
    given = {key: array for key, array in arrays("deform_conv").items() if key not in ("bias", "mask")}
    grad_y = gradient_of_y("deform_conv", given)
    made = backward("deform_conv", given, grad_y)
    assert made.bias is made.mask is None
    right = numdcn.deform_conv_backward(grad_y, **given, **GEOMETRY)
    assert_same_bits(made.offsets.compute(scheduler="synchronous"), right.offsets)


def test_a_block_is_computed_once_for_all_results():
    given = arrays("deform_conv_layer")
    forward = adapter.deform_conv_layer(**lazy(given), **options("deform_conv_layer"))
    assert tasks(*forward)["deform_conv_layer"] == len(CHUNKS)
    gradients = backward("deform_conv_layer", given, gradient_of_y("deform_conv_layer", given))
    assert tasks(*gradients)["deform_conv_layer-backward"] == len(CHUNKS)


def test_weights_are_in_the_graph_once():
    """And tasks refer to them, so that each worker receives them once."""
    given = arrays("deform_conv")
    (y,) = dask.optimize(adapter.deform_conv(**lazy(given), **GEOMETRY))
    holding = [key for key, task in dict(y.dask).items() if given["w"].tobytes() in pickle.dumps(task)]
    assert len(holding) == 1


def test_weights_are_taken_as_they_were():
    given = arrays("conv")
    right = numdcn.conv_forward(**given)
    y = adapter.conv(**lazy(given))
    given["w"][...] = 0
    assert_same_bits(y.compute(scheduler="synchronous"), right)


def test_weights_may_be_lazy():
    given = arrays("deform_conv")
    weights = {key: da.from_array(given[key], chunks=2) for key in ("w", "bias")}
    grad_y = gradient_of_y("deform_conv", given)
    call = {**lazy(given), **weights, **GEOMETRY}
    y = adapter.deform_conv(**call)
    g = adapter.deform_conv_backward(da.from_array(grad_y, chunks=2), **call)
    assert_same_bits(y.compute(), numdcn.deform_conv_forward(**given, **GEOMETRY))
    assert_same_bits(g.w.compute(), expected_gradients("deform_conv", given, grad_y).w)


def test_no_images():
    given = arrays("deform_conv")
    empty = {key: array[:0] if key in ("x", "offsets", "mask") else array for key, array in given.items()}
    call = {key: da.from_array(array, chunks=-1) for key, array in empty.items()}
    y = adapter.deform_conv(**call, **GEOMETRY)
    g = adapter.deform_conv_backward(y, **call, **GEOMETRY)
    assert y.compute().shape == (0, C_OUT, HO, WO)
    assert not g.w.compute().any()


def test_chains_of_operators():
    """One result is the other's argument; the last is reduced."""
    given = arrays("deform_conv")
    y = adapter.deform_conv(**lazy(given), **GEOMETRY)
    z = adapter.conv(y, given["w"][:, :3], padding=1)
    right = numdcn.conv_forward(numdcn.deform_conv_forward(**given, **GEOMETRY), given["w"][:, :3], padding=1)
    assert_same_bits(z.compute(), right)
    assert z.max().compute() == right.max()


# Schedulers: whatever runs the tasks, and in whatever order.


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip(
        "distributed", reason="distributed is not installed: pip install 'dask[distributed]'"
    )
    with (
        distributed.LocalCluster(2, threads_per_worker=2, dashboard_address=None) as made,
        distributed.Client(made) as client,
    ):
        yield client


def everything():
    """Results of all kinds, lazily."""
    given = arrays("deform_conv")
    grad_y = gradient_of_y("deform_conv", given)
    # a chunk for each image: a tree of three levels
    call = {key: array.rechunk({0: 1}) if isinstance(array, da.Array) else array for key, array in lazy(given).items()}
    y = adapter.deform_conv(**call, **GEOMETRY)
    return y, *adapter.deform_conv_backward(da.from_array(grad_y, chunks=2), **call, **GEOMETRY)


@pytest.mark.parametrize("scheduler", ["threads", "processes", "distributed"])
def test_the_same_bits_under_every_scheduler(scheduler, request):
    once = dask.compute(*everything(), scheduler="synchronous")
    if scheduler == "distributed":
        request.getfixturevalue("cluster")  # becomes the default
        again = [dask.compute(*everything()), dask.compute(*everything())]
    else:
        again = [dask.compute(*everything(), scheduler=scheduler, num_workers=workers) for workers in (1, 3)]
    for results in again:
        for one, other in zip(once, results, strict=True):
            assert_same_bits(one, other)


def test_threads_of_workers(cluster):
    """Workers on one machine share its CPUs, those that come later too."""
    adapter.set_worker_threads(cluster, 3)
    assert {*cluster.run(numdcn.get_num_threads).values()} == {3}
    adapter.set_worker_threads(cluster)
    here = max(1, available_cpus() // 4)  # two workers with two threads each
    assert {*cluster.run(numdcn.get_num_threads).values()} == {here}
    cluster.cluster.scale(3)
    cluster.wait_for_workers(3)
    counts = cluster.run(numdcn.get_num_threads)
    assert len(counts) == 3 and {*counts.values()} == {here}


@pytest.mark.parametrize("n, error", [(0, ValueError), (1025, ValueError), (1.5, TypeError)])
def test_no_number_of_threads(n, error):
    with pytest.raises(error, match="`n` is"):
        adapter.set_worker_threads(None, n)


# Errors come while the graph is built.

X, OFFSETS, WEIGHTS = (N, C, H, W), (N, 2 * TAPS, HO, WO), (C_OUT, C, 3, 3)
WRONG = [  # shapes of x, offsets, w, and other arguments
    (X, OFFSETS, WEIGHTS, {"padding": 1}),
    (X, OFFSETS, WEIGHTS, {"padding": -1}),
    (X, OFFSETS, WEIGHTS, {**GEOMETRY, "stride": 0.5}),
    (X, (N - 1, *OFFSETS[1:]), WEIGHTS, GEOMETRY),
    (X, (N, 17, HO, WO), WEIGHTS, GEOMETRY),
    (X[1:], OFFSETS, WEIGHTS, GEOMETRY),
    ((), OFFSETS, WEIGHTS, GEOMETRY),
    (X, OFFSETS, (C_OUT, 3, 3, 3), GEOMETRY),
    (X, WEIGHTS, OFFSETS, GEOMETRY),
    (X, OFFSETS, WEIGHTS, {**GEOMETRY, "mask": (N, TAPS, HO, WO + 1)}),
    (X, OFFSETS, WEIGHTS, {**GEOMETRY, "bias": (C_OUT + 1,)}),
]


@pytest.mark.parametrize("x, offsets, w, more", WRONG)
def test_errors_are_those_of_the_plain_function(x, offsets, w, more):
    given = {"x": x, "offsets": offsets, "w": w, **more}
    of_arrays = {"x", "offsets", "w", "mask", "bias"}
    plain_call = {key: np.zeros(value, np.float32) if key in of_arrays else value for key, value in given.items()}
    call = {
        key: da.zeros(value, dtype=np.float32, chunks=2) if key in of_arrays else value for key, value in given.items()
    }
    for way in ("forward", "backward"):
        grad_y = {"grad_y": np.zeros((N, C_OUT, HO, WO), np.float32)} if way == "backward" else {}
        with pytest.raises((TypeError, ValueError)) as right:
            plain("deform_conv", way, **grad_y, **plain_call)
        grad_y = {key: da.from_array(array) for key, array in grad_y.items()}
        with pytest.raises(type(right.value)) as made:
            getattr(adapter, {"forward": "deform_conv", "backward": "deform_conv_backward"}[way])(**grad_y, **call)
        assert str(made.value) == str(right.value)


@pytest.mark.parametrize("name", [op.name for op in _operators.operators()])
def test_the_checks_of_every_operator_need_no_numbers(name):
    from numdcn.warm import _small_calls

    op = _operators.operator(name)
    args, more = _small_calls(np.dtype(np.float32))[name]
    bound = inspect.signature(op.forward).bind(*args, **more)
    bound.apply_defaults()
    given = [bound.arguments[argument.name] for argument in op.arrays]
    shapes = [None if a is None else _operators.shaped(a.shape, a.dtype) for a in given]
    op.check(shapes, op.full_options(bound.arguments))
    for place, array in enumerate(shapes):
        if array is None:
            continue
        wrong = [*shapes]
        wrong[place] = _operators.shaped(array.shape[:-1], array.dtype)
        with pytest.raises(ValueError, match=f"`({'|'.join(argument.name for argument in op.arrays)})` has shape"):
            op.check(wrong, op.full_options(bound.arguments))


def test_grad_y_and_wrt_are_checked_at_once():
    given = arrays("deform_conv")
    call = {**lazy(given), **GEOMETRY}
    grad_y = da.zeros((N, C_OUT, HO, WO), dtype=np.float32)
    with pytest.raises(ValueError, match=r"`grad_y` has shape \(7, 3, 4, 3\), expected \(7, 3, 4, 4\)"):
        adapter.deform_conv_backward(grad_y[..., 1:], **call)
    with pytest.raises(TypeError, match="`grad_y` has dtype float64 but `x` has float32"):
        adapter.deform_conv_backward(grad_y.astype(float), **call)
    with pytest.raises(
        ValueError, match="`wrt` holds 'weight', expected one or more of x, offsets, w, bias, mask; use 'w'"
    ):
        adapter.deform_conv_backward(grad_y, **call, wrt="weight")
    with pytest.raises(ValueError, match="`wrt` holds 'bias', which was not given"):
        adapter.deform_conv_backward(grad_y, **{**call, "bias": None}, wrt="bias")


def test_unknown_sizes():
    given = lazy(arrays("conv"))
    some = given["x"][da.from_array(np.arange(N) % 2 == 0, chunks=2)]
    with pytest.raises(
        ValueError, match=r"`x` has shape \(nan, 4, 5, 6\), expected known sizes; use x.compute_chunk_sizes\(\)"
    ):
        adapter.conv(some, given["w"])
    some.compute_chunk_sizes()
    assert adapter.conv(some, given["w"]).shape[0] == 4


def test_arrays_of_the_wrong_kind():
    given = arrays("deform_conv")
    call = {**lazy(given), **GEOMETRY}
    with pytest.raises(
        TypeError, match=r"`offsets` is an ndarray .* expected a Dask array .* use dask.array.from_array\(offsets"
    ):
        adapter.deform_conv(**{**call, "offsets": given["offsets"]})
    with pytest.raises(TypeError, match=r"`w` is a PreparedWeights .* expected a NumPy or Dask array .*; use w.array"):
        adapter.deform_conv(**{**call, "w": numdcn.prepare_weights(given["w"])})
    with pytest.raises(TypeError, match="`w` is None, expected a NumPy or Dask array"):
        adapter.deform_conv(**{**call, "w": None})


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_plain_functions_name_the_adapter(way):
    given = arrays("conv")
    x, w = lazy(given)["x"], given["w"]
    message = r"is a Dask array, which has no numbers yet; use numdcn.adapters.dask.conv, or array.compute\(\)"
    for args in ((x, w), (x, da.from_array(w)), (given["x"], da.from_array(w))):
        with pytest.raises(TypeError, match=rf"`(grad_y|x|w)` {message}"):
            plain("conv", way, *args[: way == "backward"], *args)


def test_plain_functions_over_boxes_have_no_adapter():
    with pytest.raises(TypeError, match=r"`x` is a Dask array, which has no numbers yet; use array.compute\(\)"):
        numdcn.roi_align_forward(lazy(arrays("conv"))["x"], np.zeros((1, 5), np.float32), 2)


def test_calls_that_do_not_fit():
    x, w = lazy(arrays("conv"))["x"], arrays("conv")["w"]
    with pytest.raises(TypeError, match="`groups` is not an argument of conv: it is inferred"):
        adapter.conv(x, w, groups=1)
    with pytest.raises(TypeError, match="`out` is not an argument of conv"):
        adapter.conv(x, w, out=None)
    with pytest.raises(TypeError, match="conv takes 3 arguments by position"):
        adapter.conv(x, w, None, 1)
    with pytest.raises(TypeError, match="conv: missing a required argument: 'w'"):
        adapter.conv(x)


@pytest.mark.parametrize("name", NAMES)
def test_functions_look_like_the_plain_ones(name):
    for function, own in ((getattr(adapter, name), "forward"), (getattr(adapter, f"{name}_backward"), "backward")):
        there = inspect.signature(getattr(numdcn, f"{name}_{own}")).parameters
        here = inspect.signature(function).parameters
        assert [(p.name, p.kind, p.default) for p in here.values()] == [
            (p.name, p.kind, p.default) for p in there.values() if p.name not in ("out", "allow_tf32", "deterministic")
        ]
        assert pickle.loads(pickle.dumps(function)) is function
        for parameter in here:
            assert re.search(rf"\b{parameter}\b.*: ", function.__doc__), f"{parameter} is not documented"


# The example.


def test_the_example(tmp_path):
    """On two workers, with more data than one may hold."""
    pytest.importorskip("distributed", reason="distributed is not installed: pip install 'dask[distributed]'")
    pytest.importorskip("sklearn", reason="the examples need the demo extra")
    pytest.importorskip("tqdm", reason="the examples need the demo extra")
    out = tmp_path / "strengths.npy"
    done = run_python(["examples/tiles_dask.py"], "--quick", "--out", out, timeout=180, PYTHONSAFEPATH=None)
    tiles, data, limit = map(int, re.search(r"(\d+) tiles, (\d+) MB; two workers of (\d+) MB", done.stdout).groups())
    peaks = [int(peak) for peak in re.findall(r"peak memory of worker \d+: (\d+) MB", done.stdout)]
    assert len(peaks) == 2 and max(peaks) < limit < data
    assert "all checks passed" in done.stdout
    assert "100%" in done.stderr, "no progress is shown"
    assert np.load(out).shape == (tiles, 4)
