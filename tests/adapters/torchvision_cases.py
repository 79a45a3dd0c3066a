"""What the tests of numdcn.adapters.torchvision share: operators with arguments, and the state in which a test runs."""

import contextlib
import warnings

import numpy as np
import torch

import numdcn
from numdcn.adapters import torchvision as adapter

with adapter.install():
    from torchvision import ops
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


@contextlib.contextmanager
def installed():
    """A test begins with the kernels installed, and leaves nothing behind. One thread of torch: on a busy machine its
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


def count_calls(monkeypatch):
    """A list that grows by one with every call of a kernel of the adapter."""
    made, original = [], adapter._plain
    monkeypatch.setattr(adapter, "_plain", lambda *tensors: made.append(1) or original(*tensors))
    return made


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
