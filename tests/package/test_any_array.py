"""The plain functions with arrays of other frameworks in host memory: the same results, of the caller's kind, without copies."""

import importlib.util
import sys
import textwrap
import types
import warnings

import numpy as np
import pytest
from array_kinds import KINDS, OFFSETS, Shown, W, X, tensors
from checks import assert_same_bits, run_python
from halves import HALVES

import numdcn
from numdcn._call.door import door
from numdcn._call.host_frameworks import host_framework_of
from numdcn.adapters._operators import operators
from numdcn.warm import _small_calls

SMALL_CALLS = _small_calls(np.dtype(np.float32))
OPERATORS = {operator.name: operator for operator in operators()}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]()


def each(make, values):
    """Arrays made into others; None, and what is no array, as it is."""
    return [make(value) if isinstance(value, np.ndarray) else value for value in values]


def small(name):
    """(operator, its arrays in order, its options in full) of a small call, with random numbers but for boxes"""
    operator, rng = OPERATORS[name], np.random.default_rng(0)
    arrays, more = SMALL_CALLS[name]
    names = [argument.name for argument in operator.arrays]
    given = {**dict(zip(names, arrays)), **{key: value for key, value in more.items() if key in names}}
    for key, array in given.items():
        if key != "rois":
            given[key] = rng.standard_normal(array.shape).astype(array.dtype)
    options = operator.full_options({key: value for key, value in more.items() if key not in names})
    return operator, [given.get(key) for key in names], options


def same(got, want, kind):
    """Whether results are of a kind, and have the bits of NumPy's."""
    assert len(got) == len(want)
    for result, array in zip(got, want):
        if array is None:
            assert result is None
        else:
            assert isinstance(result, kind.kind)
            assert_same_bits(np.asarray(kind.see(result)), array)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator(name, kind):
    """By keyword, forward and backward, for all gradients."""
    operator, arrays, options = small(name)
    results = operator.run(arrays, options)
    made = each(kind.make, arrays)
    got = operator.run(made, options)
    same(got, results, kind)
    y, residuals = results[0], results[1:]
    grad_y, wanted = np.random.default_rng(1).standard_normal(y.shape).astype(y.dtype), [True] * 9
    wanted = wanted[: len(operator.differentiable)]
    want = operator.run_backward(grad_y, arrays, residuals, options, wanted)
    same(operator.run_backward(kind.make(grad_y), made, each(kind.make, residuals), options, wanted), want, kind)


@pytest.mark.parametrize("name", OPERATORS)
def test_by_position(name, kind):
    operator, arrays, options = small(name)
    if name == "ms_deform_attn":  # whose second argument is no array
        arrays = [arrays[0], options.pop("spatial_shapes"), *arrays[1:]]
    want = operator.forward(*arrays, **options) if name != "deform_conv" else None
    if want is None:  # whose mask is given by keyword
        arrays, options = arrays[:4], {**options, "mask": arrays[4]}
        want = operator.forward(*arrays, **options)
    made = dict(zip(options, each(kind.make, options.values())))
    got = operator.forward(*each(kind.make, arrays), **made)
    fields = (lambda result: tuple(result)) if isinstance(want, tuple) else (lambda result: (result,))
    assert type(got) is type(want) or not isinstance(want, tuple)
    same(fields(got), fields(want), kind)


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_types(framework, dtype, request):
    """Results in the type and the bits that NumPy's arrays give, into memory of the caller too."""
    module = request.getfixturevalue(framework)
    if framework == "torch":
        make = lambda array: module.from_numpy(array.astype(np.float32)).to(getattr(module, dtype))  # noqa: E731
    else:
        make = lambda array: module.numpy.asarray(array.astype(np.float32)).astype(dtype)  # noqa: E731
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(array.shape).astype(HALVES[dtype]) for array in (X, OFFSETS, W)]
    y = numdcn.deform_conv_forward(*arrays)
    want = [y, *numdcn.deform_conv_backward(y, *arrays)]
    made = [make(array) for array in arrays]
    got = numdcn.deform_conv_forward(*made)
    results = [got, *numdcn.deform_conv_backward(got, *made)]
    if framework == "torch":
        out = module.zeros(y.shape, dtype=got.dtype)
        assert numdcn.deform_conv_forward(*made, out=out) is out
        results, want = [*results, out], [*want, y]
    for result, right in zip(results, want):
        if right is not None:
            assert str(result.dtype).removeprefix("torch.") == dtype
            seen = result.float().numpy() if framework == "torch" else np.asarray(result, np.float32)
            assert_same_bits(seen, right.astype(np.float32))


WRITABLE = [name for name in KINDS if name != "jax"]  # whose arrays never change


@pytest.mark.parametrize("kind", [pytest.param(name, id=name) for name in WRITABLE], indirect=True)
@pytest.mark.parametrize("name", OPERATORS)
def test_results_are_written_where_the_caller_says(name, kind):
    """And the caller's own objects are returned."""
    operator, arrays, options = small(name)
    results = operator.run(arrays, options)
    made, memory = each(kind.make, arrays), np.full_like(results[0], np.nan)
    out = kind.make(memory)
    got = operator.forward(**dict(zip((a.name for a in operator.arrays), made)), **options, out=out)
    assert (got[0] if isinstance(got, tuple) else got) is out
    assert_same_bits(memory, results[0])

    wanted, names = [True] * len(operator.differentiable), operator.differentiable
    by_name = {a.name: array for a, array in zip(operator.arrays, arrays)}
    grad_y = np.random.default_rng(1).standard_normal(results[0].shape).astype(np.float32)
    want = operator.run_backward(grad_y, arrays, results[1:], options, wanted)
    memories = [None if by_name[key] is None else np.full_like(by_name[key], np.nan) for key in names]
    record = operator.gradients(*each(kind.make, memories))
    got = operator.run_backward(kind.make(grad_y), made, each(kind.make, results[1:]), options, wanted, out=record)
    for key, given, result, filled, gradient in zip(names, record, got, memories, want):
        assert result is given, key
        if given is not None:
            assert_same_bits(filled, gradient, key)


# Nothing is copied on the way in or out. The functions here are doors as the operators have them, and keep what they were given.


def probe(make=lambda x: x):
    """(a door that returns `make` of its first argument, what it was given)"""
    given = []

    @door
    def probe_forward(x, w=None, *, out=None):
        given.extend([x, w, out])
        return make(x)

    return probe_forward, given


@pytest.fixture(params=WRITABLE[:4])
def shared(request):
    return KINDS[request.param]()


def test_nothing_is_copied(shared):
    memory, result = np.ones((2, 3), np.float32), np.full(4, 7, np.float32)
    function, given = probe(lambda x: result)
    got = function(shared.make(memory), w=shared.make(memory[:, 1:]))
    assert np.shares_memory(given[0], memory) and given[0].strides == memory.strides
    assert given[1].ctypes.data == memory.ctypes.data + 4 and given[1].shape == (2, 2)
    assert np.shares_memory(shared.see(got), result)


def test_tensors_are_not_copied(torch):
    """Nor those with strides of any kind, nor parameters without gradients, nor results."""
    x = torch.zeros(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)[:, ::2]
    result = np.zeros(5)
    function, given = probe(lambda x: result)
    got = function(x, torch.nn.Parameter(torch.ones(3)).detach())
    assert given[0].ctypes.data == x.data_ptr()
    assert [step // 4 for step in given[0].strides] == list(x.stride())
    assert got.data_ptr() == result.ctypes.data and got.dtype == torch.float64
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        function(parameter, out=parameter)
    assert given[3].ctypes.data == given[5].ctypes.data == parameter.data_ptr()


def test_arrays_of_jax_are_not_copied(jax):
    x = jax.numpy.arange(5.0)
    function, given = probe()
    function(x)
    assert given[0].ctypes.data == x.unsafe_buffer_pointer() and not given[0].flags.writeable


def test_an_array_interface_is_not_copied():
    """And it may be read-only, be met anywhere, and stand beside NumPy's arrays."""
    operator, arrays, options = small("deform_conv")
    want = operator.run(arrays, options)[0]
    for place, array in enumerate(arrays):
        mixed = list(arrays)
        array.flags.writeable = False
        mixed[place] = Shown(array)
        got = operator.run(mixed, options)[0]
        assert type(got) is np.ndarray
        assert_same_bits(got, want)
    memory = np.empty_like(want)
    assert np.asarray(Shown(memory)).ctypes.data == memory.ctypes.data
    memory.flags.writeable = False
    with pytest.raises(ValueError, match="`out` is read-only"):
        operator.run(arrays, options, out=Shown(memory))


@pytest.mark.parametrize("data", [b"\0" * 256, None, (1, 2, 3)])
def test_an_array_interface_that_shows_no_memory(data):
    """As that of PIL's images, which is a copy; or that is broken."""
    x = types.SimpleNamespace(__array_interface__={"shape": (1, 1, 8, 8), "typestr": "<f4", "version": 3, "data": data})
    with pytest.raises(TypeError, match="`x`"):
        numdcn.conv_forward(x, np.ones((1, 1, 3, 3), np.float32))


def test_images_of_pil_are_refused():
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed").new("F", (8, 8))
    with pytest.raises(TypeError, match=r"`x` is .*Image.*expected a NumPy array .*; use np.asarray\(x, np.float32\)$"):
        numdcn.conv_forward(image, np.ones((1, 1, 3, 3), np.float32))


def test_prepared_weights(kind):
    """Of any kind go with arrays of any kind."""
    want = numdcn.deform_conv_forward(X, OFFSETS, W)
    prepared = numdcn.prepare_weights(kind.make(W))
    assert type(prepared.array) is np.ndarray and not np.shares_memory(prepared.array, W)
    got = numdcn.deform_conv_forward(kind.make(X), kind.make(OFFSETS), prepared)
    assert isinstance(got, kind.kind)
    assert_same_bits(np.asarray(kind.see(got)), want)
    assert_same_bits(numdcn.deform_conv_forward(X, OFFSETS, prepared), want)


def test_compiled_around(torch):
    """torch.compile leaves the plain functions alone, and says where to look if it must not."""
    importlib.import_module("torch._dynamo")
    x, offsets, w = tensors(torch)

    def broken(x):
        return numdcn.deform_conv_forward(x * 2, offsets, w) + 1

    def whole(x):
        return numdcn.deform_conv_forward(x * 2, offsets, w) + 1

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = torch.compile(broken, backend="eager")(x)
        assert_same_bits(got.numpy(), numdcn.deform_conv_forward(X * 2, OFFSETS, W) + 1)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="numdcn.adapters.torch has the operators"):
            torch.compile(whole, backend="eager", fullgraph=True)(x)
        assert_same_bits(numdcn.conv_forward(x, w).numpy(), numdcn.conv_forward(X, W))
    finally:
        torch._dynamo.reset()


def test_a_framework_that_is_imported_anew(monkeypatch):
    """Each module's arrays are handled by that module, not by one that was in its place before."""

    def module_with_a_tensor():
        Tensor = type("Tensor", (), {"is_cpu": True})
        kinds = [Tensor, type("Parameter", (Tensor,), {})]
        autograd = types.SimpleNamespace(forward_ad=None)
        return types.SimpleNamespace(Tensor=Tensor, from_numpy=None, autograd=autograd), [kind() for kind in kinds]

    for _ in range(2):
        module, values = module_with_a_tensor()
        monkeypatch.setitem(sys.modules, "torch", module)
        tensor, parameter = map(host_framework_of, values)
        assert tensor.module is module and parameter is tensor


def test_no_framework_is_imported():
    """By importing numdcn, nor by a call with NumPy arrays."""
    frameworks = [
        name for name in ("torch", "jax", "onnx", "dask", "mmcv", "torchvision") if importlib.util.find_spec(name)
    ]
    program = f"""
        import sys
        import numpy as np
        import numdcn
        found = [name for name in {frameworks} if name in sys.modules]
        assert not found, found
        x, w = np.ones((1, 1, 4, 4), np.float32), np.ones((1, 1, 3, 3), np.float32)
        numdcn.conv_forward(x, w)
        try:
            numdcn.conv_forward(x, [w])
        except TypeError:
            pass
        found = [name for name in {frameworks} if name in sys.modules]
        assert not found, found
    """
    run_python(textwrap.dedent(program))
