"""numdcn.adapters.torchvision: torchvision's operators are numdcn's functions while installed, and their own again afterwards.

Here torchvision's binary may or may not load; `BINARY` says. What differs then is tested in processes of their own too.
"""

import importlib
import importlib.util
import subprocess
import sys
import textwrap
import threading
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)

import numdcn  # noqa: E402
from numdcn.adapters import torchvision as adapter  # noqa: E402

with adapter.install():
    from torchvision import ops
    from torchvision.models import detection
    from torchvision.ops import poolers
BINARY = adapter._library is None
BOXES = torch.tensor([[0, 1, 1.5, 6.25, 7], [1, 0, 0, 8.5, 3], [0, 4, 2, 4.5, 2.5], [1, -3, 2, 12, 9]])
POOLINGS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")
OPERATORS = ("deform_conv2d", *POOLINGS)
LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.clone(),
    "transposed": lambda t: t.clone().transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "negated": lambda t: torch._neg_view(-t),
}


@pytest.fixture(autouse=True)
def installed():
    """Every test begins with the kernels installed, and leaves nothing behind. One thread of torch: on a busy machine its
    threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", ".*torch.jit.*deprecated", category=DeprecationWarning)
        adapter.install()
        yield
        adapter.uninstall()
    torch.set_num_threads(threads)


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def arguments(name, dtype=torch.float32):
    """Differentiable tensors of an operator, and a function of them that calls it."""
    x = numbers(2, 8, 9, 10, dtype=dtype)
    if name == "deform_conv2d":
        others = [
            numbers(*shape, seed=i, dtype=dtype)
            for i, shape in enumerate(((2, 36, 9, 5), (6, 4, 3, 3), (6,), (2, 18, 9, 5)))
        ]
        return [x, *others], lambda x, offset, w, bias, mask: ops.deform_conv2d(
            x, offset, w, bias, stride=(1, 2), padding=(2, 1), dilation=(2, 1), mask=mask
        )
    keywords = {"sampling_ratio": 2} if name.endswith("align") else {}
    return [x], lambda x: getattr(ops, name)(x, BOXES.to(x.dtype), (2, 2), spatial_scale=0.75, **keywords)


def plain(name, tensors, grad=None):
    """What numdcn's own functions make of the same arrays: y, or the gradients."""
    arrays = [tensor.detach().numpy() for tensor in tensors]
    if name == "deform_conv2d":
        op, keywords = "deform_conv", {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}
        arrays, keywords["mask"] = arrays[:4], arrays[4]
    else:
        op, keywords = name, {"sampling_ratio": 2} if name.endswith("align") else {}
        arrays = [*arrays, BOXES.numpy().astype(arrays[0].dtype), (2, 2), 0.75]
    if grad is None:
        return getattr(numdcn, f"{op}_forward")(*arrays, **keywords)
    return getattr(numdcn, f"{op}_backward")(grad.resolve_neg().numpy(), *arrays, **keywords)


def same(tensor, array):
    assert tensor.dtype == torch.from_numpy(array).dtype
    np.testing.assert_array_equal(tensor.detach().numpy(), array)


@pytest.fixture
def calls(monkeypatch):
    """Grows by one with every call of a kernel of the adapter."""
    made, original = [], adapter._plain
    monkeypatch.setattr(adapter, "_plain", lambda *tensors: made.append(1) or original(*tensors))
    return made


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


# Installing and uninstalling


def is_installed(calls):
    """Whether torchvision's operator runs numdcn's kernel: by its calls, and by what it does otherwise."""
    tensors, f = arguments("deform_conv2d")
    before = len(calls)
    try:
        f(*tensors)
    except RuntimeError as error:
        assert not BINARY and "install()" in str(error)
    else:
        assert BINARY or len(calls) == before + 1
    return len(calls) > before


def test_install_is_idempotent_and_reversible(calls):
    adapter.install()
    assert is_installed(calls)
    adapter.uninstall()
    assert not is_installed(calls)
    adapter.uninstall()
    assert not is_installed(calls)
    adapter.install()
    assert is_installed(calls)


def test_with_blocks(calls):
    """A block undoes what its install() did, and no more."""
    adapter.uninstall()
    with adapter.install():
        assert is_installed(calls)
        with adapter.install():
            assert is_installed(calls)
        assert is_installed(calls)
    assert not is_installed(calls)
    with pytest.raises(ZeroDivisionError), adapter.install():
        1 / 0  # noqa: B018
    assert not is_installed(calls)
    adapter.install()
    with adapter.install():
        pass
    assert is_installed(calls)


def test_uninstall_and_install_within_a_block(calls):
    adapter.uninstall()
    with adapter.install():
        adapter.uninstall()
        assert not is_installed(calls)
    assert not is_installed(calls)
    with adapter.install():
        adapter.install()
    assert is_installed(calls)


def test_a_block_may_be_entered_again(calls):
    adapter.uninstall()
    handle = adapter.install()
    for _ in range(2):
        with handle:
            assert is_installed(calls)
        assert not is_installed(calls)


def test_blocks_of_threads_may_overlap(calls):
    adapter.uninstall()
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with adapter.install():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    with adapter.install():
        thread.start()
        assert entered.wait(60)
    assert is_installed(calls)
    leave.set()
    thread.join()
    assert not is_installed(calls)


def test_other_threads_see_it(calls):
    found = []
    for switch in (adapter.install, adapter.uninstall):
        switch()
        thread = threading.Thread(target=lambda: found.append(is_installed(calls)))
        thread.start()
        thread.join()
    assert found == [True, False]


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_after_uninstalling(name, calls):
    """The backward is that of the moment, whichever kernel ran the forward."""
    tensors, f = arguments(name)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    y = f(*leaves)
    grad = numbers(*y.shape, seed=9)
    expected = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    adapter.uninstall()
    made = len(calls)
    if BINARY:
        for ours, theirs in zip(expected, torch.autograd.grad(y, leaves, grad, retain_graph=True)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)  # rounding, as above
    else:
        with pytest.raises(RuntimeError, match=rf"_{name}_backward has no kernel.*install\(\)"):
            torch.autograd.grad(y, leaves, grad, retain_graph=True)
    assert len(calls) == made
    adapter.install()
    for first, again in zip(expected, torch.autograd.grad(y, leaves, grad)):
        assert torch.equal(first, again)


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


# Without torchvision's binary


def by_definition(boxes, scores, threshold):
    """Non-maximum suppression, box by box."""

    def overlap(a, b):
        width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
        common = max(width, 0) * max(height, 0)
        union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - common
        return common / union if union else 0

    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(overlap(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("count", [0, 1, 200])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0])
def test_nms(threshold, count):
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 12, (count, 2, 2), generator=generator).double().sort(1).values  # some without area
    boxes = corners.flatten(1)
    scores = torch.randint(0, 50, (count,), generator=generator).double() / 50  # with ties
    kept = adapter._nms(boxes, scores, threshold)
    assert kept.dtype == torch.int64 and kept.tolist() == by_definition(boxes.tolist(), scores.tolist(), threshold)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # boxes are exact; no quotient is near a threshold
        assert torch.equal(adapter._nms(boxes.to(dtype), scores, threshold), kept)
    assert torch.equal(ops.nms(boxes, scores, threshold), kept)


def test_errors_of_nms():
    with pytest.raises(RuntimeError, match="boxes should be a 2d tensor"):
        adapter._nms(torch.zeros(3, 5), torch.zeros(3), 0.5)
    with pytest.raises(RuntimeError, match="scores should be a 1d tensor"):
        adapter._nms(torch.zeros(3, 4), torch.zeros(2), 0.5)


def test_a_detector_trains(monkeypatch, calls):
    """Losses and gradients are those of torchvision's own roi_align in terms of torch's indexing."""
    torch.manual_seed(0)
    small = {"min_size": 96, "max_size": 128, "rpn_post_nms_top_n_train": 8}
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, **small).train()
    images = [torch.rand(3, 96, 128), torch.rand(3, 128, 96)]
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 70]]), "labels": torch.tensor([1])} for _ in images]
    indexed = sys.modules["torchvision.ops.roi_align"]._roi_align
    rois = lambda x, boxes, output_size, spatial_scale, sampling_ratio: indexed(  # noqa: E731
        x, ops._utils.convert_boxes_to_roi_format(boxes) if isinstance(boxes, list) else boxes, spatial_scale,
        *output_size, sampling_ratio, False,
    )  # fmt: skip
    found = []
    for function in (None, rois):
        if function:
            monkeypatch.setattr(poolers, "roi_align", function)
        torch.manual_seed(1)
        model.zero_grad()
        losses = model(images, targets)
        sum(losses.values()).backward()
        found.append([*losses.values(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        if not function:
            assert calls
    assert len(found[0]) == len(found[1]) > 50 and all(value.isfinite().all() for value in found[0])
    for one, other in zip(*found):
        assert torch.linalg.vector_norm(one - other) <= 1e-3 * torch.linalg.vector_norm(other) + 1e-6
    model.eval()
    assert {"boxes", "labels", "scores"} == set(model(images)[0])


def run(program):
    """Run a program in a process of its own, in which torchvision's binary does not load."""
    hidden = """
        import torch

        def load_library(path):
            raise OSError("hidden")

        torch.ops.load_library = load_library
        torch.set_num_threads(1)
        from numdcn.adapters import torchvision as adapter
    """
    program = textwrap.dedent(hidden) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_binary():
    """install() after an import that failed; then torchvision works, until uninstall()."""
    run("""
        def message(function, *given):
            try:
                function(*given)
            except RuntimeError as error:
                return str(error)

        def import_torchvision():
            import torchvision

        assert "torchvision::nms does not exist" in message(import_torchvision)
        adapter.install()
        import numpy as np
        import torchvision
        import numdcn
        from torchvision import ops

        x = torch.rand(1, 4, 6, 6, requires_grad=True)
        layer = ops.DeformConv2d(4, 2, 3, padding=1)
        layer(x, torch.zeros(1, 18, 6, 6)).sum().backward()
        assert torch.allclose(x.grad, torch.autograd.grad(torch.conv2d(x, layer.weight, padding=1).sum(), x)[0], atol=1e-5)
        boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [2, 2, 5, 5]])
        assert ops.nms(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.5).tolist() == [1, 2]
        assert torch.export.export(layer, (x, torch.zeros(1, 18, 6, 6)))
        with torch.device("meta"):
            assert ops.roi_align(torch.empty(1, 4, 6, 6), torch.empty(7, 5), 2).shape == (7, 4, 2, 2)
        assert torchvision.extension._check_cuda_version() == -1
        assert "qnms has no kernel" in message(torch.ops.torchvision.qnms, boxes, boxes[:, 0], 0.5)
        adapter.uninstall()
        for function in (lambda: layer(x, torch.zeros(1, 18, 6, 6)), lambda: ops.nms(boxes, boxes[:, 0], 0.5)):
            assert "call numdcn.adapters.torchvision.install()" in message(function)
        with adapter.install():
            assert layer(x, torch.zeros(1, 18, 6, 6)).shape == (1, 2, 6, 6)
    """)


def test_imported_without_its_operators():
    """Some programs declare nms, so that the import succeeds: then it is too late."""
    run("""
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        try:
            adapter.install()
        except RuntimeError as error:
            assert "before the first `import torchvision`" in str(error)
        else:
            raise AssertionError
    """)


def test_too_old_to_be_used_without_its_binary(tmp_path):
    """Before 0.28 its gradients were in the binary."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from . import extension\n__version__ = '0.27.0'\n")
    (package / "extension.py").write_text("def _has_ops():\n    return False\n")
    run(f"""
        import sys

        sys.path.insert(0, {str(tmp_path)!r})
        for _ in range(2):
            try:
                adapter.install()
            except RuntimeError as error:
                assert "torchvision 0.27.0 has its gradients in its binary" in str(error)
            else:
                raise AssertionError
    """)
