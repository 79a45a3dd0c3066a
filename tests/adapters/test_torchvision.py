"""torchvision's operators, while numdcn.adapters.torchvision is installed: values, gradients, transforms, errors."""

import importlib.util
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)

import torchvision_cases  # noqa: E402
from torchvision_cases import BINARY, BOXES, LAYOUTS, OPERATORS, POOLINGS, arguments, numbers, ops, plain, same  # noqa: E402

import numdcn  # noqa: E402
from numdcn.adapters import torchvision as adapter  # noqa: E402


@pytest.fixture(autouse=True)
def installed():
    with torchvision_cases.installed():
        yield


@pytest.fixture
def calls(monkeypatch):
    return torchvision_cases.count_calls(monkeypatch)


# Values and gradients


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_gradients_are_those_of_the_plain_functions(name, dtype, layout):
    """Bit for bit, whatever the strides; and results are contiguous."""
    tensors, f = arguments(name, dtype)
    laid_out = [LAYOUTS[layout](tensor).requires_grad_() for tensor in tensors]
    y = f(*laid_out)
    same(y, plain(name, tensors))
    assert y.is_contiguous()
    grad = LAYOUTS[layout](numbers(*y.shape, seed=9, dtype=dtype))
    for gradient, expected in zip(torch.autograd.grad(y, laid_out, grad), plain(name, tensors, grad)):
        same(gradient, expected)
        assert gradient.is_contiguous()


def test_without_bias_and_mask():
    (x, offset, w, _, _), _ = arguments("deform_conv2d")
    keywords = {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}
    leaves = [tensor.requires_grad_() for tensor in (x, offset, w)]
    y = ops.deform_conv2d(*leaves, **keywords)
    arrays = [tensor.detach().numpy() for tensor in leaves]
    same(y, numdcn.deform_conv_forward(*arrays, **keywords))
    expected = numdcn.deform_conv_backward(np.ones(y.shape, np.float32), *arrays, **keywords)
    for gradient, array in zip(torch.autograd.grad(y.sum(), leaves), (expected.x, expected.offsets, expected.w)):
        same(gradient, array)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_those_of_differences(name):
    tensors, f = arguments(name, torch.float64)
    if name == "deform_conv2d":  # between pixels, where there is one slope
        tensors[1] = torch.floor(tensors[1]) + 0.1 + 0.8 * torch.sigmoid(tensors[1])
    assert torch.autograd.gradcheck(f, [tensor.requires_grad_() for tensor in tensors], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_half_types_are_computed_in_float32_and_rounded_once(name, dtype):
    tensors, f = arguments(name)
    halves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    floats = [tensor.detach().float().requires_grad_() for tensor in halves]
    y, expected = f(*halves), f(*floats)  # the boxes are exact in half types
    assert y.dtype == dtype and torch.equal(y, expected.to(dtype))
    grad = numbers(*y.shape, seed=9).to(dtype)
    gradients = torch.autograd.grad(y, halves, grad), torch.autograd.grad(expected, floats, grad.float())
    for half, full in zip(*gradients):
        assert half.dtype == dtype and torch.equal(half, full.to(dtype))


def test_second_results():
    """argmax as numdcn's; for position-sensitive poolings the channel that a bin reads, found here by marking channels."""
    x = numbers(2, 8, 9, 10)
    y, argmax = torch.ops.torchvision.roi_pool(x, BOXES, 0.75, 2, 2)
    expected = numdcn.roi_pool_forward(x.numpy(), BOXES.numpy(), (2, 2), 0.75, return_argmax=True)
    same(y, expected.y)
    same(argmax, expected.argmax)
    marked = torch.arange(8.0).view(1, 8, 1, 1).expand(2, 8, 9, 10)
    inside = torch.tensor([[0, 1, 1, 6, 7], [1, 2, 2, 8, 5.0]])
    for name, more in (("ps_roi_align", (2,)), ("ps_roi_pool", ())):
        y, mapping = getattr(torch.ops.torchvision, name)(marked, inside, 1.0, 2, 2, *more)
        assert mapping.dtype == torch.int32 and mapping.is_contiguous()
        torch.testing.assert_close(mapping.float(), y)  # a mean of equal numbers: 4 eps at most


@pytest.mark.parametrize("boxes", [0, 1])
@pytest.mark.parametrize("name", POOLINGS)
def test_no_boxes(name, boxes):
    x = numbers(2, 8, 9, 10).requires_grad_()
    y = getattr(ops, name)(x, BOXES[:boxes], (2, 2))
    assert y.shape == (boxes, 2 if name.startswith("ps") else 8, 2, 2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == x.shape and bool(gradient.any()) == bool(boxes)


def test_no_images():
    x, offset, w = torch.zeros(0, 4, 5, 5, requires_grad=True), torch.zeros(0, 18, 3, 3), torch.ones(2, 4, 3, 3)
    y = ops.deform_conv2d(x, offset, w.requires_grad_())
    assert y.shape == (0, 2, 3, 3)
    gradients = torch.autograd.grad(y.sum(), (x, w))
    assert gradients[0].shape == x.shape and not gradients[1].any() and gradients[1].shape == w.shape


if BINARY:

    @pytest.mark.parametrize("name", OPERATORS)
    def test_agrees_with_the_kernels_of_torchvision(name):
        """To rounding: sums of fewer than 300 products of numbers below 5, in another order: 300 * 25 * 2**-24 < 5e-4.
        ps_roi_pool on boxes inside the image: torchvision's forward leaves out the last row and column."""
        tensors, f = arguments(name)
        if name == "ps_roi_pool":
            boxes = torch.tensor([[0, 1, 1.5, 6.25, 7], [1, 2, 2, 8, 5.0]])
            f = lambda x: ops.ps_roi_pool(x, boxes, (2, 2))  # noqa: E731
        leaves = [tensor.requires_grad_() for tensor in tensors]
        results = []
        for switch in (adapter.install, adapter.uninstall):
            switch()
            y = f(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, numbers(*y.shape, seed=9))])
        for ours, theirs in zip(*results):
            assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)

    @pytest.mark.parametrize("name", ["roi_pool", "ps_roi_align", "ps_roi_pool"])
    def test_second_results_are_torchvision_s(name):
        x, more = numbers(2, 8, 9, 10), (2,) if name.endswith("align") else ()
        found = [getattr(torch.ops.torchvision, name)(x, BOXES, 0.75, 2, 2, *more)[1]]
        adapter.uninstall()
        found.append(getattr(torch.ops.torchvision, name)(x, BOXES, 0.75, 2, 2, *more)[1])
        assert torch.equal(*found) and found[0].dtype == found[1].dtype == torch.int32

    @pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
    def test_nms_keeps_the_boxes_that_torchvision_keeps(threshold):
        corners = torch.randint(0, 12, (300, 2, 2), generator=torch.Generator().manual_seed(0)).float().sort(1).values
        boxes, scores = corners.flatten(1), torch.rand(300, generator=torch.Generator().manual_seed(1))
        assert torch.equal(adapter._nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))


# What stays torchvision's


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    """Schema, autograd, fake kernels, and AOT autograd with dynamic shapes, as torch checks them."""
    x = numbers(2, 8, 9, 10).requires_grad_()
    given = {
        "roi_align": (0.75, 2, 2, 2, True), "ps_roi_align": (0.75, 2, 2, 2), "roi_pool": (0.75, 2, 2),
        "ps_roi_pool": (0.75, 2, 2),
    }  # fmt: skip
    if name == "deform_conv2d":
        (x, offset, w, bias, mask), _ = arguments(name)
        tensors = [tensor.requires_grad_() for tensor in (x, w, offset, mask, bias)]
        sample = (*tensors, 1, 2, 2, 1, 2, 1, 2, 2, True)
    else:
        sample = (x, BOXES, *given[name])
    torch.library.opcheck(getattr(torch.ops.torchvision, name).default, sample)


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_and_exported(name, calls):
    tensors, f = arguments(name)

    class Model(torch.nn.Module):
        def forward(self, *given):
            return f(*given) * 2

    expected = f(*tensors) * 2
    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    exported = torch.export.export(Model(), tuple(tensors)).module()
    for model in (compiled, exported):
        made = len(calls)
        assert torch.equal(model(*tensors), expected)
        assert len(calls) == made + 1


def test_scripted(calls):
    torch.manual_seed(0)
    tensors, _ = arguments("deform_conv2d")
    layer = ops.DeformConv2d(8, 6, 3, stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2)
    scripted = torch.jit.script(layer)
    given = tensors[0], tensors[1], tensors[4]
    assert torch.equal(scripted(*given), layer(*given)) and len(calls) == 2
    pool = ops.RoIAlign((2, 2), 0.75, 2)
    assert torch.equal(torch.jit.script(pool)(tensors[0], BOXES), pool(tensors[0], BOXES))


def test_autocast():
    """torchvision's rule: roi_align in float32, the result in the type of x."""
    x = numbers(2, 8, 9, 10).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.roi_align(x, BOXES, (2, 2), 0.75, 2)
    assert torch.equal(y, ops.roi_align(x.float(), BOXES, (2, 2), 0.75, 2).bfloat16())


def test_vmap():
    """torch calls the operator for one after another."""
    x = numbers(3, 1, 8, 9, 10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", category=UserWarning)
        y = torch.vmap(lambda x: ops.roi_align(x, BOXES[:1], 2))(x)
    assert torch.equal(y, torch.stack([ops.roi_align(one, BOXES[:1], 2) for one in x]))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_forward_mode_is_an_error(name, requires_grad):
    tensors, f = arguments(name)
    x = tensors[0].requires_grad_(requires_grad)
    with torch.autograd.forward_ad.dual_level():
        f(*tensors)
        with pytest.raises(NotImplementedError):
            f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), *tensors[1:])


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_are_an_error(name):
    tensors, f = arguments(name)
    x = tensors[0].requires_grad_()
    (gradient,) = torch.autograd.grad(f(*tensors).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backwards"):
        torch.autograd.grad(gradient.sum(), x)


# Errors


def test_channels_that_do_not_match():
    (x, offset, w, bias, mask), _ = arguments("deform_conv2d")
    given = 1, 2, 2, 1, 2, 1, 2, 2
    with pytest.raises(RuntimeError, match=r"offset.shape\[1\] is not valid: got: 35 expected: 36"):
        torch.ops.torchvision.deform_conv2d(x, w, offset[:, 1:], mask, bias, *given, False)
    with pytest.raises(RuntimeError, match=r"mask.shape\[1\] is not valid: got: 17 expected: 18"):
        torch.ops.torchvision.deform_conv2d(x, w, offset, mask[:, 1:], bias, *given, True)
    with pytest.raises(ValueError, match=r"`offsets` has shape \(2, 36, 8, 5\)"):
        torch.ops.torchvision.deform_conv2d(x, w, offset[:, :, 1:], mask, bias, *given, False)


def test_types_that_do_not_match():
    x = numbers(2, 8, 9, 10)
    with pytest.raises(RuntimeError, match="one dtype, got torch.float32 and torch.float64"):
        ops.roi_align(x, BOXES.double(), 2)
    with pytest.raises(TypeError, match=r"int32.*\.to\(torch\.float32\)"):
        ops.roi_align(x.int(), BOXES.int(), 2)


def test_a_box_of_no_image():
    boxes = BOXES.clone()
    boxes[1, 0] = 2
    with pytest.raises(ValueError, match="batch index"):
        ops.roi_align(numbers(2, 8, 9, 10), boxes, 2)
