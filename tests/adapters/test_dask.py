"""numdcn on Dask arrays: the bits of the plain functions, block by block, under every scheduler; the example."""

import collections
import pickle
import re

import numpy as np
import pytest
from checks import assert_same_bits, run_python

pytest.importorskip("dask.array", reason="dask is not installed: pip install 'dask[array,distributed]'")

import dask
import dask.array as da
from dask.array.utils import assert_eq
from dask_cases import (
    C_OUT,
    CHUNKS,
    GEOMETRY,
    HO,
    NAMES,
    TAPS,
    WO,
    arrays,
    backward,
    expected_gradients,
    gradient_of_y,
    lazy,
    options,
    plain,
)  # fmt: skip

import numdcn
from numdcn._cpu.threads import available_cpus
from numdcn.adapters import _operators
from numdcn.adapters import dask as adapter


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
        assert made.chunks[0] == (CHUNKS if isinstance(lazy(given)[key], da.Array) else (len(given[key]),))
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
        distributed.LocalCluster(2, threads_per_worker=2, dashboard_address=":0") as made,
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
        again = [dask.compute(*everything())]
    else:
        workers = (1, 3) if scheduler == "threads" else (2,)
        again = [dask.compute(*everything(), scheduler=scheduler, num_workers=count) for count in workers]
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


# The example.


@pytest.mark.full
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
