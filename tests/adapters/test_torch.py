"""numdcn.adapters.torch: values, gradients, dtypes, memory formats and odd tensors, against the plain functions."""

import gc
import threading
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch_cases import NAMES, case, function, leaves, operator_function, plain, same, tensors  # noqa: E402

import numdcn.adapters.torch as adapter  # noqa: E402
from numdcn.adapters import _operators  # noqa: E402
from numdcn.adapters.torch import _kernels  # noqa: E402
from numdcn.adapters.torch._registered import REGISTERED  # noqa: E402

WAYS = {"function": function, "operator": operator_function}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_plain_functions(name, dtype, way):
    arrays, options = case(name, dtype)
    y, grad_y, grads = plain(name, arrays, options)
    given, wanted, _ = leaves(name, dtype)
    result = WAYS[way](name, options)(*given)
    same(result, y)
    made = torch.autograd.grad(result, wanted, torch.from_numpy(grad_y))
    for tensor, expected in zip(made, (g for g in grads if g is not None), strict=True):
        same(tensor, expected)
    with torch.no_grad():
        same(WAYS[way](name, options)(*given), y)
    with torch.inference_mode():
        same(WAYS[way](name, options)(*given), y)


@pytest.mark.parametrize("name", NAMES)
def test_optional_arrays_may_be_absent(name):
    operator = _operators.operator(name)
    arrays, options = case(name, np.float32)
    arrays = [None if argument.optional else array for argument, array in zip(operator.arrays, arrays)]
    y, grad_y, grads = plain(name, arrays, options)
    for way in WAYS.values():
        given = [None if a is None else torch.tensor(a) for a in arrays]
        wanted = [
            t.requires_grad_()
            for key, t in zip(operator.names, given)
            if key in operator.differentiable and t is not None
        ]
        result = way(name, options)(*given)
        same(result, y)
        made = torch.autograd.grad(result, wanted, torch.from_numpy(grad_y))
        for tensor, expected in zip(made, (g for g in grads if g is not None), strict=True):
            same(tensor, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_differences(name, way):
    given, _, options = leaves(name)
    call = WAYS[way](name, options)
    if name == "deform_conv_layer":  # its samples shall stay between pixels: small weights, a bias of a half
        given[2].data *= 0.01
        given[3].data = 0.5 + 0.01 * given[3].data
    assert torch.autograd.gradcheck(call, given)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradients_that_are_needed_are_computed(name, monkeypatch):
    operator, asked = _operators.operator(name), []
    real = _kernels.run_backward

    def spy(operator, grad_y, arrays, residuals, options, wanted, channels_last):
        asked.append([key for key, want in zip(operator.differentiable, wanted) if want])
        return real(operator, grad_y, arrays, residuals, options, wanted, channels_last)

    monkeypatch.setattr(_kernels, "run_backward", spy)
    arrays, options = case(name, np.float32)
    for way in WAYS.values():
        for key in operator.differentiable:
            given = tensors(arrays)
            one = given[operator.names.index(key)].requires_grad_()
            result = way(name, options)(*given)
            result.sum().backward()
            assert asked.pop() == [key] and one.grad.shape == one.shape
            assert all(t.grad is None for t in given if t is not one)


@pytest.mark.parametrize("name", [name for name in NAMES if "conv" not in name or name == "conv"])
def test_what_the_backward_does_not_read_is_not_kept(name):
    """A pooling over boxes does not keep the features alive."""
    operator = _operators.operator(name)
    for way in WAYS.values():
        given, _, options = leaves(name)
        source = given[0]
        x = source * 2
        result = way(name, options)(x, *given[1:])
        alive = weakref.ref(x.untyped_storage())
        del x
        gc.collect()
        assert (alive() is None) == (not operator.arrays[0].saved)
        result.sum().backward()
        assert source.grad.shape == source.shape


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_types_are_computed_in_float32_and_rounded_once(name, dtype, way):
    kind = getattr(torch, dtype)
    given, wanted, options = leaves(name, np.float32)
    with torch.no_grad():
        for tensor in given:
            if tensor is not None:
                tensor.copy_(tensor.to(kind))
    half = [None if t is None else t.detach().to(kind).requires_grad_(t.requires_grad) for t in given]
    call = WAYS[way](name, options)
    y, result = call(*given), call(*half)
    assert result.dtype == kind
    assert torch.equal(result, y.to(kind))
    grad_y = torch.randn_like(result)
    exact = torch.autograd.grad(y, wanted, grad_y.float())
    made = torch.autograd.grad(result, [t for t in half if t is not None and t.requires_grad], grad_y)
    for g, e in zip(made, exact, strict=True):
        assert g.dtype == kind and torch.equal(g, e.to(kind))


def test_half_types_with_finer_coordinates():
    x, rois = torch.randn(1, 2, 6, 6).bfloat16().requires_grad_(), torch.tensor([[0, 0.123, 0.456, 4.567, 4.321]])
    y = adapter.roi_align(x, rois, 2)
    assert torch.equal(y, adapter.roi_align(x.float(), rois, 2).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"`boxes` has dtype torch.float64 .*expected one dtype.*or torch.float32"):
        adapter.roi_align(x, rois.double(), 2)
    with pytest.raises(TypeError, match=r"`w` has dtype torch.float32 but `x` has torch.float16; expected one dtype"):
        adapter.deform_conv_layer(x.half(), torch.ones(1, 2, 1, 1), torch.zeros(2, 2, 1, 1).half(), None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_computes_in_float32(name, way):
    given, wanted, options = leaves(name, np.float32)
    call = WAYS[way](name, options)
    mixed = [given[0].detach().bfloat16().requires_grad_(), *given[1:]]  # as from a convolution under autocast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(*mixed)
    exact = call(mixed[0].detach().float().requires_grad_(), *given[1:])
    assert y.dtype == torch.bfloat16 and torch.equal(y, exact.bfloat16())
    y.sum().backward()
    assert mixed[0].grad.dtype == torch.bfloat16 and all(t.grad.dtype == torch.float32 for t in wanted[1:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_channels_last_in_and_out(name, way, dtype):
    kind, last = getattr(torch, dtype), torch.channels_last
    given, wanted, options = leaves(name, np.float32)
    given = [None if t is None else t.detach().to(kind).requires_grad_(t.requires_grad) for t in given]
    wanted = [t for t in given if t is not None and t.requires_grad]
    call = WAYS[way](name, options)
    turned = [None if t is None else t.detach() for t in given]
    turned = [t if t is None or t.dim() != 4 else t.to(memory_format=last) for t in turned]
    turned = [t if t is None else t.requires_grad_(s.requires_grad) for t, s in zip(turned, given)]
    y, result = call(*given), call(*turned)
    assert result.dim() != 4 or (result.is_contiguous(memory_format=last) and not result.is_contiguous())
    assert torch.equal(y, result)
    grad_y = torch.randn_like(y)
    exact = torch.autograd.grad(y, wanted, grad_y)
    made = torch.autograd.grad(result, [t for t in turned if t is not None and t.requires_grad], grad_y)
    for tensor, g, e in zip((t for t in turned if t is not None and t.requires_grad), made, exact, strict=True):
        assert torch.equal(g, e)
        if tensor.dim() == 4:
            assert g.is_contiguous(memory_format=last)


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_does_not_fit_says_so_with_channels_last_too(name):
    given, _, options = leaves(name, np.float32)
    x = given[0].detach()[:, :, :1].to(memory_format=torch.channels_last)
    wrong = [x, *(None if t is None else t.detach()[..., :0] for t in given[1:])]
    with pytest.raises(ValueError, match=r"`\w+` has") as last:
        function(name, options)(*wrong)
    with pytest.raises(ValueError) as first:
        function(name, options)(x.contiguous(), *wrong[1:])
    assert str(last.value) == str(first.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_any_strides_and_sign_bits(name, way):
    arrays, options = case(name, np.float32)
    given, wanted, _ = leaves(name, np.float32)
    y = WAYS[way](name, options)(*given)
    made = torch.autograd.grad(y.sum(), wanted)
    odd = []
    for tensor, leaf in zip(tensors(arrays), given):
        if tensor is None:
            odd.append(None)
            continue
        wide = torch.stack([tensor, tensor], -1)[..., 0]
        negative = torch.complex(torch.zeros_like(tensor), -wide).conj().imag  # the neg bit is set
        assert negative.is_neg() and torch.equal(negative, tensor)
        odd.append(negative.requires_grad_(leaf.requires_grad))
    result = WAYS[way](name, options)(*odd)
    assert torch.equal(y, result)
    for g, e in zip(torch.autograd.grad(result.sum(), [t for t in odd if t is not None and t.requires_grad]), made):
        assert torch.equal(g, e)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_no_images_and_no_boxes(name, way):
    given, wanted, options = leaves(name, np.float32, batch=0)
    y = WAYS[way](name, options)(*given)
    assert y.numel() == 0 and y.shape[1] > 0
    for tensor, g in zip(wanted, torch.autograd.grad(y.sum(), wanted)):
        assert g.shape == tensor.shape and not g.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors(name, way):
    given, wanted, options = leaves(name, np.float32)
    y = WAYS[way](name, options)(*given)
    on_meta = [None if t is None else t.detach().to("meta").requires_grad_(t.requires_grad) for t in given]
    result = WAYS[way](name, options)(*on_meta)
    assert (result.device.type, result.shape, result.stride()) == ("meta", y.shape, y.stride())
    for tensor, g in zip(
        wanted, torch.autograd.grad(result.sum(), [t for t in on_meta if t is not None and t.requires_grad])
    ):
        assert g.device.type == "meta" and g.shape == tensor.shape


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_second_gradients_are_refused(name, way):
    given, wanted, options = leaves(name)
    y = WAYS[way](name, options)(*given)
    (g, *_) = torch.autograd.grad((y**2).sum(), wanted, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"numdcn: the gradient of {name}'s gradient"):
        g.sum().backward()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(name, way):
    """For a tensor that requires gradients and for one that does not."""
    for requires_grad in (False, True):
        given, _, options = leaves(name)
        given = [None if t is None else t.detach().requires_grad_(requires_grad) for t in given]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(given[0], torch.ones_like(given[0]))
            with pytest.raises(NotImplementedError, match=f"numdcn: forward-mode differentiation of {name}"):
                WAYS[way](name, options)(dual, *given[1:])
            plain = WAYS[way](name, options)(*given)  # nothing to differentiate
            assert torch.isfinite(plain).all()


@pytest.mark.parametrize("name", NAMES)
def test_saved_tensors_may_be_moved_and_recomputed(name):
    given, wanted, options = leaves(name, np.float32)
    call = function(name, options)
    expected = torch.autograd.grad(call(*given).sum(), wanted)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t) or t.numpy(force=True).copy(), torch.from_numpy
    ):
        y = call(*given)
    assert packed
    moved = torch.autograd.grad(y.sum(), wanted)
    again = torch.autograd.grad(checkpoint(call, *given, use_reentrant=False).sum(), wanted)
    for e, *others in zip(expected, moved, again):
        assert all(torch.equal(e, other) for other in others)


def test_a_saved_tensor_that_changed_is_noticed():
    given, _, options = leaves("deform_conv", np.float32)
    y = function("deform_conv", options)(*given)
    with torch.no_grad():
        given[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_many_gradients_at_once(name):
    """Batched gradients come by another road than the functions of torch.func."""
    given, wanted, options = leaves(name)
    y = function(name, options)(*given)
    several = torch.stack([torch.ones_like(y), torch.randn_like(y)])
    made = torch.autograd.grad(y, wanted, several, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        for g, e in zip(made, torch.autograd.grad(y, wanted, several[i], retain_graph=True)):
            assert torch.equal(g[i], e)


def test_threads_share_the_functions():
    given, wanted, options = leaves("deform_conv", np.float32)
    call, results = function("deform_conv", options), []
    expected = torch.autograd.grad(call(*given).sum(), wanted)

    def work():
        results.extend(torch.autograd.grad(call(*given).sum(), wanted) for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 20
    assert all(torch.equal(g, e) for made in results for g, e in zip(made, expected))


def test_plain_tensors_go_the_short_way(monkeypatch):
    """Without torch's dispatcher; anything that watches goes the long way."""
    given, _, options = leaves("deform_conv", np.float32)
    registered, long = REGISTERED["deform_conv"], []
    for way in ("forward", "backward"):
        real = getattr(registered, way)
        monkeypatch.setattr(registered, way, lambda *args, way=way, real=real: long.append(way) or real(*args))
    call = function("deform_conv", options)
    y = call(*given)
    y.sum().backward(retain_graph=True)
    assert not long
    torch.autograd.grad(y.sum(), given[0], create_graph=True)
    assert long == ["backward"]
    call(*(None if t is None else t.detach().half() for t in given))
    assert long.pop() == "forward"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(*given)
    assert long == ["backward", "forward", "forward"]  # with autocast, and by autocast
