"""numdcn.adapters.torch under torch.library's checks, torch.compile and torch.func."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch_cases import NAMES, function, leaves, operator_function  # noqa: E402

import numdcn.adapters.torch as adapter  # noqa: E402
from numdcn.adapters import _operators  # noqa: E402
from numdcn.adapters.torch._registered import REGISTERED  # noqa: E402

WAYS = {"function": function, "operator": operator_function}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def close(made, expected, exact=True):
    """Equal bit for bit; sums over images that are split differently only up to rounding."""
    for m, e in zip(made, expected, strict=True):
        if exact:
            assert torch.equal(m, e)
        else:
            torch.testing.assert_close(m, e, rtol=1e-12, atol=1e-12)  # float64: sums of fewer than 1000 terms near 1


# torch.library


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    registered = REGISTERED[name]
    given, _, options = leaves(name, np.float32)
    flat = registered.flat(options)
    torch.library.opcheck(registered.forward, (*given, *flat))
    half = [None if t is None else t.detach().bfloat16().requires_grad_(t.requires_grad) for t in given]
    torch.library.opcheck(registered.forward, (*half, *flat), test_utils=("test_schema", "test_faketensor"))
    last = [t if t is None or t.dim() != 4 else t.detach().to(memory_format=torch.channels_last) for t in given]
    torch.library.opcheck(registered.forward, (*last, *flat), test_utils=("test_schema", "test_faketensor"))
    results = registered.forward(*given, *flat)
    y, *residuals = results if registered.residuals else (results,)
    arrays = [t if a.saved or t is None else t.shape for a, t in zip(registered.operator.arrays, given)]
    arrays = [t.detach() if isinstance(t, torch.Tensor) else t and list(t) for t in arrays]
    for wanted in ([True] * len(registered.places), [False] + [True] * (len(registered.places) - 1)):
        for channels_last in (False, True):
            args = (torch.randn_like(y), *arrays, *residuals, *flat, channels_last, wanted)
            torch.library.opcheck(registered.backward, args, test_utils=("test_schema", "test_faketensor"))


# torch.compile


@pytest.mark.parametrize("backend, dynamic", [("eager", False), ("aot_eager", True)])
@pytest.mark.parametrize("name", NAMES)
def test_compiled(name, backend, dynamic):
    given, wanted, options = leaves(name, np.float32)
    call = function(name, options)

    def program(*tensors):
        return call(*tensors) * 2

    compiled = torch.compile(program, fullgraph=True, backend=backend, dynamic=dynamic)
    for _ in range(2):
        y, result = program(*given), compiled(*given)
        assert torch.equal(y, result) and y.stride() == result.stride()
        grad_y = torch.randn_like(y)
        close(torch.autograd.grad(result, wanted, grad_y), torch.autograd.grad(y, wanted, grad_y))
        given, wanted, _ = leaves(name, np.float32, batch=3)  # other sizes
    with torch.no_grad():
        assert torch.equal(compiled(*given), program(*given))


@pytest.mark.parametrize("name", ["deform_conv_layer", "roi_pool"])
def test_compiled_by_inductor(name):
    given, _, options = leaves(name, np.float32)
    last = [t if t is None or t.dim() != 4 else t.detach().to(memory_format=torch.channels_last) for t in given]
    last = [t if t is None else t.requires_grad_(g.requires_grad) for t, g in zip(last, given)]
    call = function(name, options)

    def program(x, *tensors):
        return call(x + 1, *tensors).relu()

    compiled = torch.compile(program, fullgraph=True)
    for tensors in (given, last):
        y, result = program(*tensors), compiled(*tensors)
        assert torch.equal(y, result) and y.stride() == result.stride()
        leaf = [t for t in tensors if t is not None and t.requires_grad]
        close(torch.autograd.grad(result.sum(), leaf), torch.autograd.grad(y.sum(), leaf))


def test_sizes_of_which_the_compiler_knows_nothing():
    """As of boxes that a detector keeps."""

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def program(x, boxes, scores):
        kept = boxes[(scores > 0.5).nonzero()[:, 0]]
        return adapter.roi_align(x, kept, 2, aligned=True)

    x, boxes = torch.randn(1, 2, 8, 8, requires_grad=True), torch.tensor([[0, 1.0, 2, 5, 6]] * 4)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for scores in (torch.tensor([0.1, 0.9, 0.7, 0.2]), torch.ones(4)):
            y = program(x, boxes, scores)
            assert torch.equal(y, adapter.roi_align(x, boxes[scores > 0.5], 2, aligned=True))
            y.sum().backward()


def test_modules_and_functions_compile_without_breaks():
    x, offset, mask = torch.randn(2, 4, 6, 6), torch.randn(2, 18, 6, 6), torch.rand(2, 9, 6, 6)
    boxes = [torch.tensor([[0.5, 1, 4, 5]]), torch.tensor([[0.5, 1, 4, 5], [1, 1, 3, 3]])]
    conv = adapter.DeformConv2d(4, 4, 3, padding=1)
    layer = adapter.DeformConvLayer(4, 4, 3, padding=1, modulated=True)
    programs = {
        "conv": (conv, (x, offset, mask)),
        "layer": (layer, (x,)),
        "align": (adapter.RoIAlign(2, 1.0, 2), (x, boxes)),
        "pool": (adapter.RoIPool((2, 1), 1.0), (x, boxes)),
        "ps align": (adapter.PSRoIAlign(2, 1.0, 2), (x, boxes)),
        "ps pool": (adapter.PSRoIPool(2, 1.0), (x, boxes)),
        "sample": (adapter.bilinear_sample, (x, torch.rand(2, 3, 2))),
        "roi": (lambda *a: adapter.deform_roi_pool(*a, output_size=2), (x, torch.nn.functional.pad(boxes[0], (1, 0)))),
        "psroi": (
            lambda *a: adapter.deform_ps_roi_pool(*a, output_size=2, group_size=2),
            (x, torch.nn.functional.pad(boxes[0], (1, 0)), torch.rand(1, 2, 2, 2)),
        ),
        "functional": (
            lambda x, w, o: adapter.deform_conv_layer(x, w, o, None, padding=((1, 1), (1, 1)), stride=(2, 1)),
            (x, conv.weight.detach(), layer.offset_weight.detach()[:18]),
        ),
    }
    for name, (program, arguments) in programs.items():
        with torch.no_grad():
            y = program(*arguments)
            assert torch.equal(torch.compile(program, fullgraph=True, backend="aot_eager")(*arguments), y), name


def test_autocast_compiled():
    given, wanted, options = leaves("deform_conv", np.float32)
    call = function("deform_conv", options)

    def program(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(tensors[0].bfloat16(), *tensors[1:])

    result, y = torch.compile(program, fullgraph=True, backend="aot_eager")(*given), program(*given)
    assert result.dtype == torch.bfloat16 and torch.equal(result, y)
    close(torch.autograd.grad(result.sum(), wanted), torch.autograd.grad(y.sum(), wanted))


def test_a_compiled_step_around_an_eager_call():
    """The backward of an eager call, run by compiled code, is not compiled."""
    given, wanted, options = leaves("deform_conv", np.float32)
    y = function("deform_conv", options)(*given)
    expected = torch.autograd.grad(y.sum(), wanted, retain_graph=True)

    @torch.compile(backend="eager")
    def step(y):
        (y.sum() * 1).backward()

    step(y)
    close([t.grad for t in wanted], expected)


# torch.func


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_torch_func(name, way):
    given, wanted, options = leaves(name)
    call, places = WAYS[way](name, options), [i for i, t in enumerate(given) if t is not None and t.requires_grad]
    expected = torch.autograd.grad((call(*given) ** 2).sum(), wanted)
    fixed = [None if t is None else t.detach() for t in given]
    close(torch.func.grad(lambda *a: (call(*a) ** 2).sum(), argnums=tuple(places))(*fixed), expected)
    y, pull = torch.func.vjp(lambda x: call(x, *fixed[1:]), fixed[0])
    assert torch.equal(pull(2 * y)[0], expected[0])
    rows = torch.func.jacrev(lambda x: call(x, *fixed[1:]))(fixed[0])
    assert rows.shape == (*y.shape, *fixed[0].shape)
    torch.testing.assert_close(
        (rows.flatten(0, y.dim() - 1) * (2 * y).flatten()[:, None, None, None, None]).sum(0), expected[0]
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_vmap(name, way):
    """Over everything, over the images alone, and over each of the others alone: as a loop does."""
    given, _, options = leaves(name)
    call = WAYS[way](name, options)
    fixed = [None if t is None else t.detach() for t in given]
    present = [i for i, t in enumerate(fixed) if t is not None]
    for mapped in (present, *([i] for i in present)):
        several = list(fixed)
        for i in mapped:
            several[i] = torch.stack([fixed[i], fixed[i].roll(1, 0), fixed[i]], dim=1)
        dims = tuple(1 if i in mapped else None for i in range(len(fixed)))
        y = torch.vmap(call, in_dims=dims)(*several)
        for n in range(3):
            one = [t.select(1, n) if i in mapped else t for i, t in enumerate(several)]
            assert torch.equal(y[n], call(*one))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_each_sample(name):
    """vmap(grad), the parameters unmapped; and grad(vmap)."""
    given, _, options = leaves(name)
    operator, call = _operators.operator(name), function(name, options)
    fixed = [None if t is None else t.detach() for t in given]
    several = list(fixed)
    mapped = [i for i, t in enumerate(fixed) if t is not None and operator.arrays[i].axes.startswith(("(N,", "(R,"))]
    for i in mapped:
        several[i] = torch.stack([fixed[i], fixed[i].roll(1, 0)])
    places = tuple(i for i, key in enumerate(operator.names) if key in operator.differentiable and fixed[i] is not None)

    def loss(*tensors):
        return (call(*tensors) ** 2).sum()

    dims = tuple(0 if i in mapped else None for i in range(len(fixed)))
    made = torch.vmap(torch.func.grad(loss, argnums=places), in_dims=dims)(*several)
    ones = [[several[i][n] if i in mapped else t for i, t in enumerate(fixed)] for n in range(2)]
    expected = [torch.func.grad(loss, argnums=places)(*one) for one in ones]
    for k, g in enumerate(made):
        close(g, [e[k] for e in expected])
    total = torch.func.grad(lambda *a: torch.vmap(loss, in_dims=dims)(*a).sum(), argnums=places)(*several)
    for k, (place, g) in enumerate(zip(places, total)):
        if place in mapped:
            close(g, [e[k] for e in expected], exact=False)
        else:
            close([g], [sum(e[k] for e in expected)], exact=False)


def test_vmap_joins_what_differs_only_in_its_images(monkeypatch):
    from numdcn.adapters.torch import _kernels

    calls = []
    for kernel in ("run", "run_backward"):
        real = getattr(_kernels, kernel)
        monkeypatch.setattr(_kernels, kernel, lambda *a, real=real, kernel=kernel: calls.append(kernel) or real(*a))
    x, points = torch.randn(5, 2, 3, 4, 4), torch.rand(5, 2, 6, 2)
    torch.vmap(adapter.bilinear_sample)(x, points)
    assert calls == ["run"]
    calls.clear()
    torch.vmap(torch.func.grad(lambda x, p: adapter.bilinear_sample(x, p).sum(), argnums=(0, 1)))(x, points)
    assert calls == ["run", "run_backward"]
    calls.clear()
    w = torch.randn(3, 3, 1, 1)
    torch.vmap(torch.func.grad(lambda w, x: adapter.deform_conv2d(x, x[:, :2], w).sum()), (None, 0))(w, x)
    assert calls == ["run"] + ["run_backward"] * 5  # a gradient of w for each


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_nothing(name):
    given, _, options = leaves(name)
    call = function(name, options)
    fixed = [None if t is None else t.detach() for t in given]
    y = torch.vmap(lambda x: call(x, *fixed[1:]))(fixed[0].new_empty(0, *fixed[0].shape))
    assert y.shape == (0, *call(*fixed).shape)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_and_second_gradients_are_refused(name):
    """By torch.func, compiled or not. Never zeros."""
    given, _, options = leaves(name)
    fixed = [None if t is None else t.detach() for t in given]
    for way in WAYS.values():
        call = way(name, options)

        def of_x(x, call=call):
            return call(x, *fixed[1:]).sum()

        for refused in (
            lambda x, f=of_x: torch.func.jvp(f, (x,), (x,)),
            lambda x, f=of_x: torch.func.jacfwd(f)(x),
        ):
            with pytest.raises(NotImplementedError, match="numdcn: forward-mode"):
                refused(fixed[0])

        def squares(x, call=call):
            return (call(x, *fixed[1:]) ** 2).sum()

        with pytest.raises(NotImplementedError, match="numdcn: forward-mode"):
            torch.func.hessian(squares)(fixed[0])
        inner = torch.func.grad(squares)
        with pytest.raises(NotImplementedError, match=r"numdcn: the gradient of \w+'s gradient"):
            torch.func.grad(lambda x: inner(x).sum())(fixed[0])  # noqa: B023
        with pytest.raises(NotImplementedError, match=r"numdcn: the gradient of \w+'s gradient"):
            inner(fixed[0].clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("name", ["deform_conv", "roi_pool"])
def test_forward_mode_is_refused_in_compiled_code(name):
    given, _, options = leaves(name)
    fixed = [None if t is None else t.detach() for t in given]
    call = function(name, options)
    program = torch.compile(lambda x: torch.func.jvp(lambda x: call(x, *fixed[1:]), (x,), (x,))[1], backend="aot_eager")
    with pytest.raises(Exception, match="numdcn: forward-mode"):
        program(fixed[0])


@pytest.mark.parametrize("name", ["deform_conv", "roi_align"])
def test_torch_func_in_compiled_code(name):
    given, _, options = leaves(name)
    fixed = [None if t is None else t.detach() for t in given]
    call = function(name, options)

    def loss(x):
        return (call(x, *fixed[1:]) ** 2).sum()

    several = torch.stack([fixed[0], 2 * fixed[0]])
    for program, x in (
        (torch.func.grad(loss), fixed[0]),
        (torch.vmap(loss), several),
        (torch.vmap(torch.func.grad(loss)), several),
    ):
        assert torch.equal(torch.compile(program, fullgraph=True, backend="aot_eager")(x), program(x))
