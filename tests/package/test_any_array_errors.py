"""Arrays of other frameworks that the plain functions refuse, and in which words."""

import re
import textwrap

import numpy as np
import pytest
from array_kinds import OFFSETS, ROIS, Exporter, Lone, Shown, W, X, tensors
from checks import assert_same_bits, run_python

import numdcn


def refused(call, text, error=TypeError):
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error and re.search(text, str(raised.value)), str(raised.value)


TYPES = "float16, bfloat16, float32 or float64"
ADAPTER = "; use numdcn.adapters.torch.deform_conv2d"


def with_gradients(torch, x):
    return x.requires_grad_()


def fake(torch, x):
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


OF_TORCH = {  # how a tensor is spoilt, and the error
    "gradients": (with_gradients, f"requires gradients, which are not recorded here{ADAPTER}, or tensor.detach\\(\\)$"),
    "meta": (lambda torch, x: x.to("meta"), f"has no numbers{ADAPTER}$"),
    "fake": (fake, f"cannot be seen by NumPy .*{ADAPTER}$"),
    "sparse": (
        lambda torch, x: x.to_sparse(),
        "has the layout torch.sparse_coo, expected a dense tensor; use tensor.to_dense\\(\\)$",
    ),
    "negated": (
        lambda torch, x: torch.view_as_complex(torch.stack([x, x], dim=-1)).conj().imag,
        f"cannot be seen by NumPy .*resolve_neg.*{ADAPTER}$",
    ),
    "int": (
        lambda torch, x: x.int(),
        f"has dtype int32, expected {TYPES}; use {{}}.to\\(torch.float32\\)$",
    ),
    "bool": (
        lambda torch, x: x.bool(),
        f"has dtype bool, expected {TYPES}; use {{}}.to\\(torch.float32\\)$",
    ),
    "complex": (
        lambda torch, x: x.to(torch.complex64),
        "has dtype complex64, expected float16, bfloat16, float32 or float64$",
    ),
    "numpy": (
        lambda torch, x: x.numpy(),
        "is an ndarray .*, but `x` is a torch.Tensor; expected one kind for all arrays; use torch.from_numpy\\({}\\)$",
    ),
    "interface": (lambda torch, x: Shown(x.numpy()), "is .*Shown.*, but `x` is a torch.Tensor; expected one kind"),
    "list": (
        lambda torch, x: x.tolist(),
        "is .*\\(list\\), expected a torch.Tensor of shape .*; use torch.as_tensor\\({}, dtype=torch.float32\\)$",
    ),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("what", OF_TORCH)
def test_tensors_that_are_refused(torch, what, place):
    arrays, (spoil, text) = tensors(torch), OF_TORCH[what]
    if place == 0 and what in ("numpy", "interface", "list"):
        return  # then the call is not one with tensors
    arrays[place] = spoil(torch, arrays[place])
    name = ("x", "offsets", "w")[place]
    refused(lambda: numdcn.deform_conv_forward(*arrays), f"^`{name}` {text.format(name)}")


def test_gradients_of_other_functions(torch):
    """conv has none in the adapter, and prepared weights have none at all."""
    x, _, w = tensors(torch)
    w.requires_grad_()
    refused(lambda: numdcn.conv_forward(x, w), "; use torch.nn.functional.conv2d, or tensor.detach\\(\\)$")
    refused(lambda: numdcn.conv_backward(x, x, w), "; use torch.nn.functional.conv2d, or tensor.detach\\(\\)$")
    refused(lambda: numdcn.prepare_weights(w), "`w` requires gradients, .* here; use tensor.detach\\(\\)$")
    refused(lambda: numdcn.prepare_weights(w.to("meta").detach()), "`w` has no numbers$")


def test_half_types_among_others(torch):
    """In the words of torch."""
    x, offsets, w = tensors(torch)
    text = "`w` has dtype float32 but `x` has {}; expected one dtype for all arrays; use w.to\\(torch.{}\\)$"
    for kind in ("float16", "bfloat16"):
        half = x.to(getattr(torch, kind))
        refused(lambda: numdcn.deform_conv_forward(half, offsets, w), text.format(kind, kind))  # noqa: B023


def test_bfloat16_where_numpy_does_not_know_it(torch):
    """ml_dtypes is not imported for it."""
    program = """
        import sys, torch, numdcn
        x, w = torch.ones(1, 1, 4, 4, dtype=torch.bfloat16), torch.ones(1, 1, 3, 3, dtype=torch.bfloat16)
        assert "ml_dtypes" not in sys.modules
        try:
            numdcn.conv_forward(x, w)
        except TypeError as error:
            print(error)
        import ml_dtypes
        print(numdcn.conv_forward(x, w).dtype)
    """
    lines = run_python(textwrap.dedent(program)).stdout.splitlines()
    ways = "; use torch.nn.functional.conv2d, or tensor.float(), or import ml_dtypes"
    assert lines == [
        f"`x` has dtype torch.bfloat16, expected one that NumPy knows, as float16 or float32{ways}",
        "torch.bfloat16",
    ]


def test_parameters_without_gradients(torch):
    """As arguments, and to be written to."""
    x, offsets, w = tensors(torch)
    parameter = torch.nn.Parameter(w)
    want = numdcn.deform_conv_forward(X, OFFSETS, W)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = numdcn.deform_conv_forward(x, offsets, parameter)
        assert type(got) is torch.Tensor and not got.requires_grad
        assert_same_bits(got.numpy(), want)
    out = torch.nn.Parameter(torch.zeros(want.shape))
    refused(lambda: numdcn.deform_conv_forward(x, offsets, w, out=out), "`out` requires gradients")
    with torch.no_grad():
        assert numdcn.deform_conv_forward(x, offsets, w, out=out) is out
    assert_same_bits(out.detach().numpy(), want)
    out = numdcn.DeformConvGradients(w=torch.zeros(1, 4, 3, 3, requires_grad=True))
    refused(lambda: numdcn.deform_conv_backward(x, x, offsets, w, wrt="w", out=out), "`out.w` requires gradients")


def test_tensors_within_transforms(torch):
    """None of them is lost without a word."""
    x, offsets, w = tensors(torch)

    def function(x):
        return numdcn.deform_conv_forward(x, offsets, w).sum()

    refused(lambda: torch.func.grad(function)(x), f"`x` requires gradients.*{ADAPTER}")
    refused(lambda: torch.func.vmap(function)(x[None]), f"`x` cannot be seen by NumPy .*{ADAPTER}")
    refused(lambda: torch.func.jvp(function, (x,), (x,)), f"`x` has a tangent, .*{ADAPTER}, or tensor.detach")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        refused(lambda: function(dual), f"`x` has a tangent, which would be lost here{ADAPTER}, or tensor.detach")
        with torch.no_grad():
            refused(lambda: function(dual), "`x` has a tangent")
        assert function(x) == function(dual.detach())


def test_advice_for_tensors(torch):
    """In the words of torch, and right."""
    x, rois = torch.from_numpy(X), torch.from_numpy(ROIS)
    align, names = numdcn.roi_align_forward, {"torch": torch, "x": x}
    for given in (rois[:, 1:], [rois[:, 1:]], ROIS.tolist(), []):
        with pytest.raises((TypeError, ValueError)) as raised:
            align(x, given, 2)
        advice = re.sub(" for boxes of image n$", "", str(raised.value).rpartition("use ")[2])
        fixed = eval(advice, {**names, "rois": given, "n": 0})
        assert align(x, fixed, 2).shape == (len(fixed), 4, 2, 2)
    refused(lambda: align(x, rois.double(), 2), "; use rois.to\\(torch.float32\\)$")
    turned = torch.zeros(2, 28, 28, 3)
    refused(lambda: numdcn.conv_forward(turned, torch.zeros(8, 3, 3, 3)), "use x.permute\\(0, 3, 1, 2\\)", ValueError)


def test_mixtures(torch, jax):
    """Name both."""
    x, offsets, w = tensors(torch)
    j = jax.numpy.asarray(W)
    deform = numdcn.deform_conv_forward
    refused(lambda: deform(x, offsets, j), "`w` is an ArrayImpl .*, but `x` is a torch.Tensor; expected one kind")
    refused(lambda: deform(jax.numpy.asarray(X), offsets, w), "`offsets` is a Tensor .*, but `x` is a jax.Array; ")
    refused(lambda: deform(X, OFFSETS, w), "`w` is a Tensor .*, but `x` is a NumPy array; .*; use w.numpy\\(\\)$")
    refused(
        lambda: deform(X, OFFSETS, j), "`w` is an ArrayImpl .*, but `x` is a NumPy array; .*; use np.asarray\\(w\\)$"
    )
    refused(
        lambda: deform(X, OFFSETS, W, out=torch.zeros(1, 6, 6, 6)), "`out` is a Tensor .*, but `x` is a NumPy array"
    )
    refused(lambda: deform(x, offsets, Exporter(W)), "`w` is .*Exporter.*, but `x` is a torch.Tensor")
    refused(
        lambda: deform(Exporter(X), Exporter(OFFSETS), Lone(W)), "`w` is .*Lone.*, but `x` is an array_kinds.Exporter"
    )
    record = numdcn.DeformConvGradients(w=np.zeros_like(W))
    refused(
        lambda: numdcn.deform_conv_backward(torch.zeros(1, 6, 6, 6), x, offsets, w, wrt="w", out=record),
        "`out` is .*, but .*NumPy|`out.w` is an ndarray .*, but `grad_y` is a torch.Tensor",
    )


def test_values_of_jax_that_are_refused(jax):
    x, offsets, w = map(jax.numpy.asarray, (X, OFFSETS, W))
    deform, adapter = numdcn.deform_conv_forward, "numdcn.adapters.jax.deform_conv"
    refused(lambda: jax.jit(deform)(x, offsets, w), f"`x` is a traced JAX value, .*; use {adapter}$")
    refused(lambda: jax.jit(lambda w: deform(x, offsets, w))(w), f"`w` is a traced JAX value, .*; use {adapter}$")
    refused(lambda: jax.grad(lambda x: deform(x, offsets, w).sum())(x), f"`x` is a traced JAX value, .*{adapter}$")
    refused(
        lambda: deform(x.astype(int), offsets, w), "`x` has dtype int32, expected float16, bfloat16, float32 or float64"
    )
    refused(lambda: deform(x, offsets, w, out=jax.numpy.zeros((1, 6, 6, 6))), "`out` is read-only", ValueError)


def test_errors_of_arrays_with_dlpack():
    """Without advice that is about NumPy."""
    x, w = Exporter(X), Exporter(W)
    refused(
        lambda: numdcn.conv_forward(Exporter(X.astype(int)), w),
        "`x` has dtype int64, expected float16, bfloat16, float32 or float64$",
    )
    refused(lambda: numdcn.conv_forward(x, W.tolist()), "expected an array_kinds.Exporter of shape [^;]*$")
    refused(lambda: numdcn.conv_forward(Exporter(X[0]), w), "use x\\[None\\] for an image", ValueError)

    class Elsewhere(Exporter):
        def __dlpack__(self, **options):
            raise BufferError("not now")

    refused(lambda: numdcn.conv_forward(x, Elsewhere(W)), "`w` is .*Elsewhere.*, but `x` is an array_kinds.Exporter")
    refused(lambda: numdcn.conv_forward(Elsewhere(X), w), "`x` cannot be seen by NumPy \\(not now\\)")
