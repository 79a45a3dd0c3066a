"""numdcn.adapters.jax under JAX's transformations: vmap, scan, checkpoint, shard_map, export; donation, threads, interrupts."""

import threading

import numpy as np
import pytest
from checks import limit, run_python

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402 - after the skip
from jax_cases import NAMES, arrays_of, plain, plain_gradients  # noqa: E402
from test_jax import differentiable, enable_x64, function, same  # noqa: E402

import numdcn  # noqa: E402
import numdcn.adapters.jax as adapter  # noqa: E402
from numdcn.adapters._operators import operator  # noqa: E402
from numdcn.adapters.jax import _host, _traced  # noqa: E402


@pytest.fixture(params=["ffi", "callback"])
def way(request, monkeypatch):
    """Each way in which a compiled program can call Python."""
    if request.param == "callback":
        monkeypatch.setattr(_traced, "FFI", False)
        jax.clear_caches()
    yield request.param
    if request.param == "callback":
        jax.clear_caches()


def several(name, count=3):
    """The arrays of some calls; boxes are the same but for their corners."""
    calls = [arrays_of(name, seed=seed) for seed in range(count)]
    for i, arrays in enumerate(calls):
        if "rois" in arrays:
            arrays["rois"][:, 1:] += np.float32(0.25 * i)
    return calls


def stacked(calls, keys):
    """The arrays in `keys` of all calls, stacked; the others of the first."""
    return {key: np.stack([c[key] for c in calls]) if key in keys else calls[0][key] for key in calls[0]}


def subsets(name):
    """Which arrays to map: all, and each alone."""
    keys = list(arrays_of(name))
    return [tuple(keys), *((key,) for key in keys)]


@pytest.mark.parametrize("name, keys", [(n, keys) for n in NAMES for keys in subsets(n)], ids=str)
def test_vmap(name, keys):
    """y and gradients of each call, mapped along any of the arrays."""
    calls = several(name)
    given = stacked(calls, keys)
    axes = tuple(0 if key in keys else None for key in given)
    f = function(name, given)
    got = jax.jit(jax.vmap(f, in_axes=axes))(*given.values())
    places = differentiable(name, given)

    def gradients(*arrays):
        return jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=places)(*arrays)

    slopes = jax.vmap(gradients, in_axes=axes)(*given.values())
    for i, call in enumerate(calls):
        own = {key: call[key] if key in keys else calls[0][key] for key in given}
        y = plain(name, own)
        same(got[i], y)
        values = plain_gradients(name, 2 * y, own)
        for place, slope in zip(places, slopes):
            same(slope[i], values[list(given)[place]])


def test_vmap_within_vmap_along_other_axes(way):
    rng = np.random.default_rng(0)
    x, points = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 8, 9, 4), (2, 6, 2, 5)))
    inner = jax.vmap(adapter.bilinear_sample, in_axes=(-1, None), out_axes=1)  # over the 4
    outer = jax.vmap(inner, in_axes=(None, -1), out_axes=-1)  # over the 5
    got = jax.jit(outer)(x, points)
    assert got.shape == (2, 4, 3, 6, 5)
    for i in range(4):
        for j in range(5):
            same(got[:, i, :, :, j], numdcn.bilinear_sample_forward(x[..., i], points[..., j]))


def test_vmap_over_nothing():
    points = np.zeros((0, 2, 0, 2), np.float32)  # no calls, of no points
    x = np.zeros((0, 2, 3, 4, 5), np.float32)
    assert jax.vmap(adapter.bilinear_sample)(x, points).shape == (0, 2, 3, 0)
    assert jax.vmap(adapter.bilinear_sample)(np.zeros((3, 2, 3, 4, 5)), np.zeros((3, 2, 0, 2))).shape == (3, 2, 3, 0)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_one_call_where_batches_can_be_folded(name, monkeypatch):
    """Over images, where nothing else is mapped but weights; over boxes, where x is not mapped. Else one call each."""
    calls = []
    run = _host._run_one
    monkeypatch.setattr(_host, "_run_one", lambda *given: calls.append(0) or run(*given))
    lead = "R" if "rois" in arrays_of(name) else "N"
    table = {argument.name: argument for argument in operator(name).arrays}
    keys = tuple(key for key in arrays_of(name) if table[key].axes.startswith(f"({lead},"))
    given = stacked(several(name), keys)
    f = function(name, given)
    jax.block_until_ready(jax.vmap(f, in_axes=tuple(0 if key in keys else None for key in given))(*given.values()))
    assert len(calls) == 1
    calls.clear()
    given = stacked(several(name), (next(iter(given)),))
    jax.block_until_ready(jax.vmap(f, in_axes=(0, *[None] * (len(given) - 1)))(*given.values()))
    assert len(calls) == (1 if name in ("conv", "deform_conv_layer") else 3)


def test_gradients_of_weights_for_each_sample():
    """As in differential privacy: the gradient of each image, from one backward."""
    arrays = arrays_of("deform_conv")
    shared = ("w", "bias")
    f = function("deform_conv", arrays)

    def loss(*a):
        return (f(*a) ** 2).sum()

    images = {key: v if key in shared else v[:, None] for key, v in arrays.items()}
    axes = tuple(None if key in shared else 0 for key in images)
    got = jax.jit(jax.vmap(jax.grad(loss, argnums=2), in_axes=axes))(*images.values())
    for i in range(2):
        one = {key: v if key in shared else v[i] for key, v in images.items()}
        same(got[i], plain_gradients("deform_conv", 2 * plain("deform_conv", one), one)["w"])


def test_scan_and_checkpoint(way):
    """Three layers with the same shapes, forward and backward, with and without recomputing."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 6, 7)).astype(np.float32)
    offsets = rng.standard_normal((1, 18, 6, 7)).astype(np.float32)
    ws = rng.standard_normal((3, 4, 4, 3, 3)).astype(np.float32) / 6

    def loss(ws, body):
        return (jax.lax.scan(lambda x, w: (body(x, w), None), x, ws)[0] ** 2).sum()

    def layer(x, w):
        return adapter.deform_conv(x, offsets, w, padding=1)

    value, gradient = jax.jit(jax.value_and_grad(lambda ws: loss(ws, layer)))(ws)
    again, recomputed = jax.jit(jax.value_and_grad(lambda ws: loss(ws, jax.checkpoint(layer))))(ws)
    inputs = [x]
    for w in ws:
        inputs.append(numdcn.deform_conv_forward(inputs[-1], offsets, w, padding=1))
    grad, expected = 2 * inputs[-1], []
    for i in (2, 1, 0):
        g = numdcn.deform_conv_backward(grad, inputs[i], offsets, ws[i], padding=1)
        grad, expected = g.x, [g.w, *expected]
    same(gradient, np.stack(expected))
    same(recomputed, np.stack(expected))
    assert value == again == pytest.approx((inputs[-1].astype(float) ** 2).sum(), rel=1e-5)


def test_cond_and_while():
    x = arrays_of("conv")
    f = function("conv", x)
    got = jax.jit(lambda flag, *a: jax.lax.cond(flag, f, lambda *b: -f(*b), *a))(False, *x.values())
    same(got, -plain("conv", x))
    w = np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1) / 2

    def half(state):
        return state[0] + 1, adapter.conv(state[1], w)

    got = jax.jit(lambda a: jax.lax.while_loop(lambda s: s[0] < 5, half, (0, a))[1])(x["x"])
    same(got, x["x"] / 32)


def test_abstract_values():
    arrays = arrays_of("roi_pool")
    shapes = [jax.ShapeDtypeStruct(v.shape, jnp.bfloat16) for v in arrays.values()]
    made = jax.eval_shape(function("roi_pool", arrays), *shapes)
    assert (made.shape, made.dtype) == ((3, 3, 2, 3), jnp.bfloat16)


@pytest.mark.parametrize("enabled", [False, True])
def test_64_bits_on_and_off(enabled):
    """Off, float64 arrays of NumPy become float32, as everywhere in JAX."""
    arrays = arrays_of("deform_conv", np.float64)
    with enable_x64(enabled):
        y = jax.jit(function("deform_conv", arrays))(*arrays.values())
        same(y, plain("deform_conv", arrays if enabled else {k: v.astype(np.float32) for k, v in arrays.items()}))


def test_donated_arrays():
    """The memory of x may become that of y."""
    arrays = arrays_of("conv")
    w = arrays["w"] = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(np.float32)
    x = jnp.asarray(arrays["x"])
    f = jax.jit(lambda x: adapter.conv(adapter.conv(x, w, padding=1), w, padding=1), donate_argnums=0)
    y = f(x)
    assert x.is_deleted()
    once = numdcn.conv_forward(arrays["x"], w, padding=1)
    same(y, numdcn.conv_forward(once, w, padding=1))


def test_the_same_array_twice():
    x = np.random.default_rng(0).standard_normal((2, 2, 3, 3)).astype(np.float32)
    same(jax.jit(lambda a: adapter.conv(a, a))(x), numdcn.conv_forward(x, x))
    slope = jax.grad(lambda a: adapter.conv(a, a).sum())(x)
    g = numdcn.conv_backward(np.ones((2, 2, 1, 1), np.float32), x, x)
    same(slope, g.x + g.w)


def test_calls_from_many_threads():
    """Dispatched asynchronously, several at a time."""
    arrays = arrays_of("deform_conv")
    f = jax.jit(jax.value_and_grad(lambda *a: (function("deform_conv", arrays)(*a) ** 2).sum(), argnums=(0, 1, 2)))
    expected = jax.tree.map(np.asarray, f(*arrays.values()))
    wrong = []

    def work():
        results = [f(*arrays.values()) for _ in range(30)]
        for result in results:
            if not all(map(np.array_equal, jax.tree.leaves(result), jax.tree.leaves(expected))):
                wrong.append(result)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit(60))
        assert not thread.is_alive()
    assert not wrong


def test_export():
    """With sizes given, and with a symbol for the batch; written to bytes and read again."""
    export = pytest.importorskip("jax.export", reason="jax.export needs absl and flatbuffers")
    arrays = arrays_of("deform_conv")
    keys = ("x", "offsets", "mask")
    check = export.DisabledSafetyCheck.custom_call("numdcn")
    f = jax.jit(function("deform_conv", arrays))
    (b,) = export.symbolic_shape("b")
    fixed = {key: v.shape for key, v in arrays.items()}
    symbolic = {key: (b, *shape[1:]) if key in keys else shape for key, shape in fixed.items()}
    for shapes, sizes in ((fixed, (2,)), (symbolic, (1, 2, 5))):
        exported = export.export(f, disabled_checks=[check])(
            *(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes.values())
        )
        again = export.deserialize(exported.serialize(vjp_order=1))
        for size in sizes:
            own = {key: np.resize(v, (size, *v.shape[1:])) if key in keys else v for key, v in arrays.items()}
            y = plain("deform_conv", own)
            same(again.call(*own.values()), y)
            _, back = jax.vjp(again.call, *own.values())
            for slope, value in zip(back(y), plain_gradients("deform_conv", y, own).values()):
                same(slope, value)


def test_export_to_another_process(tmp_path):
    """It imports the adapter before it calls; else XLA says what is missing."""
    export = pytest.importorskip("jax.export", reason="jax.export needs absl and flatbuffers")
    x = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    check = export.DisabledSafetyCheck.custom_call("numdcn")
    exported = export.export(jax.jit(lambda x: adapter.conv(x, x)), disabled_checks=[check])(x)
    (tmp_path / "conv").write_bytes(exported.serialize())
    program = """
import sys
from jax import export
import numpy as np

if sys.argv[2]:
    import numdcn.adapters.jax
with open(sys.argv[1], "rb") as file:
    again = export.deserialize(bytearray(file.read()))
print(again.call(np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)))
"""
    assert run_python(program, tmp_path / "conv", "import").stdout.strip() == "[[[[204.]]]]"
    missing = run_python(program, tmp_path / "conv", "", check=False)
    assert missing.returncode == 1 and "numdcn" in missing.stderr


def test_jacobian():
    """Rows by vmap over the gradient of y alone."""
    arrays = arrays_of("roi_align")
    f = function("roi_align", arrays)
    got = np.asarray(jax.jit(jax.jacrev(f))(*arrays.values()))
    y = plain("roi_align", arrays)
    for index in ((0, 0, 0, 0), (2, 1, 1, 2), (1, 2, 0, 1)):
        unit = np.zeros_like(y)
        unit[index] = 1
        same(got[index], plain_gradients("roi_align", unit, arrays)["x"])


SHARDED = """
import jax, numpy as np, numdcn
from jax.sharding import Mesh, PartitionSpec as P
import numdcn.adapters.jax as adapter
shard_map = jax.shard_map


mesh = Mesh(np.array(jax.devices()), ("d",))
assert len(jax.devices()) == 2
rng = np.random.default_rng(0)
x, offsets, w = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3, 6, 7), (4, 18, 6, 7), (5, 3, 3, 3)))
f = lambda x, offsets, w: adapter.deform_conv(x, offsets, w, padding=1)
part = shard_map(f, mesh=mesh, in_specs=(P("d"), P("d"), P()), out_specs=P("d"))
y = numdcn.deform_conv_forward(x, offsets, w, padding=1)
assert np.array_equal(jax.jit(part)(x, offsets, w), y)
halves = [numdcn.deform_conv_backward(2 * y[i], x[i], offsets[i], w, padding=1) for i in (slice(0, 2), slice(2, 4))]
loss = lambda x, offsets, w: (part(x, offsets, w) ** 2).sum()
outside = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, offsets, w)
inside = jax.jit(shard_map(
    jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2)), mesh=mesh,
    in_specs=(P("d"), P("d"), P()), out_specs=(P("d"), P("d"), P()),
))(x, offsets, w)
for got in (outside, inside):
    for i, name in ((0, "x"), (1, "offsets")):
        assert np.array_equal(got[i], np.concatenate([getattr(half, name) for half in halves])), name
    assert np.array_equal(got[2], halves[0].w + halves[1].w)
# arrays spread over devices, without shard_map: XLA gathers them, and the result is right
spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("d")))
assert np.array_equal(jax.jit(f)(spread, offsets, w), y)
if hasattr(jax.sharding, "AxisType") and hasattr(jax, "set_mesh"):  # arrays whose types tell where they are
    with jax.set_mesh(jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))):
        spread = jax.device_put(x, P("d"))
        assert np.array_equal(jax.jit(f)(spread, offsets, w), y)
print("right")
"""


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has an older shard_map")
def test_shard_map():
    done = run_python(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.stdout.split() == ["right"], done.stderr
