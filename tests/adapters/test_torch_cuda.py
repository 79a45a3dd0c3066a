"""numdcn.adapters.torch for tensors on a GPU, without one: what torch dispatches there, and what numdcn is given. Stand-in
tensors say that they are on a GPU; no kernel runs."""

import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch_cases import NAMES, case, function, tensors  # noqa: E402

from numdcn.adapters import _operators  # noqa: E402
from numdcn.adapters.torch import _kernels  # noqa: E402
from numdcn.adapters.torch._registered import REGISTERED  # noqa: E402


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cpu, is_cuda = False, True
    device = torch.device("cuda", 1)


def on_gpu(tensor):
    return None if tensor is None else tensor.as_subclass(OnGPU)


def spied(name, monkeypatch):
    """An operator whose functions note their arguments and return what they would on a GPU; and the notes."""
    operator, notes = _operators.operator(name), []

    def noted(real, *args, **keywords):
        notes.append((args, keywords))
        plain = {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        for extra in ("out", "deterministic", "allow_tf32"):
            plain.pop(extra, None)
        result = real(*(a.detach().numpy() for a in args), **plain)
        parts = result if isinstance(result, tuple) else (result,)
        made = [None if part is None else on_gpu(torch.from_numpy(part)) for part in parts]
        if keywords.get("out") is not None:
            rooms = (
                keywords["out"] if isinstance(keywords["out"], tuple) else (keywords["out"], *[None] * len(made[1:]))
            )
            for room, part in zip(rooms, made):
                if room is not None:
                    room.copy_(part)
            made = [part if room is None else room for room, part in zip(rooms, made)]
        return type(result)(*made) if isinstance(result, tuple) else made[0]

    def forward(**keywords):
        return noted(operator.forward, **keywords)

    def backward(grad_y, **keywords):
        return noted(operator.backward, grad_y, **keywords)

    forward.__signature__ = inspect.signature(operator.forward)
    backward.__signature__ = inspect.signature(operator.backward)
    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: on_gpu(real_empty(*a, **k)))
    return operator._replace(forward=forward, backward=backward), notes


@pytest.mark.parametrize("name", NAMES)
def test_the_same_functions_are_registered_for_cuda(name):
    for suffix in ("", "_backward"):
        for key in ("CPU", "CUDA", "Meta", "Autograd", "FuncTorchBatched"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"numdcn::{name}{suffix}", key)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"numdcn::{name}", "AutocastCUDA")


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_of_a_gpu(name):
    """Half types stay what they are, the residuals too: numdcn's kernels take them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    arrays, options = case(name, np.float32)
    registered = REGISTERED[name]
    with FakeTensorMode():
        given = [None if a is None else torch.empty(a.shape, device="cuda", dtype=torch.float16) for a in arrays]
        y = function(name, options)(*given)
        assert (y.device.type, y.dtype) == ("cuda", torch.float16)
        results = registered.forward(*given, *registered.flat(options))
        for residual in results[1:] if registered.residuals else ():
            assert residual.dtype in (torch.float16, torch.int32)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_numdcn_is_given(name, deterministic, monkeypatch):
    """The tensors themselves, and torch's settings."""
    operator, notes = spied(name, monkeypatch)
    arrays, options = case(name, np.float32)
    given = [on_gpu(t) for t in tensors(arrays)]
    for tensor, key in zip(given, operator.names):
        if key in operator.differentiable and tensor is not None:
            tensor.requires_grad_()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = deterministic
    torch.use_deterministic_algorithms(deterministic)
    try:
        y, *residuals = _kernels.run(operator, given, options)
        wanted = [True] * len(operator.differentiable)
        shapes = [a if s.saved or a is None else a.shape for s, a in zip(operator.arrays, given)]
        grads = _kernels.run_backward(operator, torch.ones_like(y), shapes, residuals, options, wanted, False)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32 = before
    (_, forward), ((grad_y,), backward) = notes
    for keywords, accepted in ((forward, operator.forward), (backward, operator.backward)):
        for argument, tensor in zip(operator.arrays, given):
            seen = keywords[argument.name]
            if tensor is None:
                assert seen is None
                continue
            assert isinstance(seen, torch.Tensor) and seen.is_cuda and seen.shape == tensor.shape
            assert not seen.requires_grad  # numdcn refuses tensors whose gradients it would not record
            if argument.saved or keywords is forward:
                assert seen.data_ptr() == tensor.data_ptr()
            else:
                assert seen.untyped_storage().nbytes() == seen.element_size()  # only the shape is there
        for setting in ("deterministic", "allow_tf32"):
            known = setting in _kernels._accepted(accepted)
            assert keywords.get(setting) == (deterministic if known else None)
    assert isinstance(grad_y, OnGPU)
    assert all(g is None or isinstance(g, OnGPU) for g in grads)


@pytest.mark.parametrize("name", NAMES)
def test_results_lie_as_the_arrays_do(name, monkeypatch):
    operator, notes = spied(name, monkeypatch)
    arrays, options = case(name, np.float32)
    last = torch.channels_last
    given = [t if t is None or t.dim() != 4 else t.to(memory_format=last) for t in tensors(arrays)]
    given = [on_gpu(t) for t in given]
    y, *residuals = _kernels.run(operator, given, options)
    assert y.dim() != 4 or (y.is_contiguous(memory_format=last) and notes[0][1]["out"] is y)
    shapes = [a if s.saved or a is None else a.shape for s, a in zip(operator.arrays, given)]
    wanted = [True] * len(operator.differentiable)
    grads = _kernels.run_backward(operator, torch.ones_like(y), shapes, residuals, options, wanted, True)
    assert grads[operator.differentiable.index(operator.names[0])].is_contiguous(memory_format=last)
