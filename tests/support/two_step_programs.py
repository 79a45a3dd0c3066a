"""Programs for the device server: convolutions of the stand-in's tensors, by products of the stand-in."""

import sys
import types

import numpy as np
from standin_torch import Tensor, installed, tensor

import numdcn
from numdcn._cuda import replay
from numdcn._cuda.conv import two_step


def call(direction, arrays, keywords, way=None, module=None):
    """(results by name, the shapes of the products) of deform_conv, for NumPy arrays by name. `way`: attributes of
    `two_step` to set; `rows`: of output pixels in a slab; `gap`: of the tensors' elements; `prepared`: into how many groups
    w is; `calls`: how many, of which the last counts; `out`: whether into memory of the caller."""
    way = dict(way or {})
    gap, prepared, calls, out = way.pop("gap", 1), way.pop("prepared", 0), way.pop("calls", 1), way.pop("out", False)
    rows = way.pop("rows", None)
    if rows is not None:
        way["slabs"] = lambda p, size, what: _slabs(p.batch * p.out_size[0], rows)
    before = {name: getattr(two_step, name) for name in way}
    for name, value in way.items():
        setattr(two_step, name, value)
    replay.forced = True
    try:
        with installed(**(module or {})) as torch:
            given = {name: None if a is None else tensor(a, gap) for name, a in arrays.items()}
            if prepared:
                given["w"] = numdcn.prepare_weights(given["w"], groups=prepared)
            function = getattr(numdcn, f"deform_conv_{direction}")
            for _ in range(calls):
                torch.products.clear()
                if out:
                    keywords = {**keywords, "out": _blank(function(**given, **keywords), gap)}
                    torch.products.clear()
                made = function(**given, **keywords)
            return _plain(made), list(torch.products)
    finally:
        replay.forced = None
        for name, value in before.items():
            setattr(two_step, name, value)


def in_turn(w, calls, forced):
    """[(y with prepared weights, y with plain ones, the number of products), ...] of forwards that share the prepared
    weights. `calls`: (arrays by name, keywords); `forced`: whether in two steps."""
    replay.forced = forced
    try:
        with installed() as torch:
            plain, told = tensor(w), []
            ready = numdcn.prepare_weights(plain)
            for arrays, keywords in calls:
                torch.backends.cuda.matmul.allow_tf32 = keywords.get("allow_tf32", False)
                given = {name: tensor(a) for name, a in arrays.items()}
                torch.products.clear()
                ys = [numdcn.deform_conv_forward(w=weights, **given, **keywords).numpy() for weights in (ready, plain)]
                told.append((*ys, len(torch.products)))
            return told
    finally:
        replay.forced = None


def _slabs(total, rows):
    return [(first, min(rows, total - first)) for first in range(0, total, rows)]


def _blank(result, gap):
    if isinstance(result, Tensor):
        return tensor(np.full(result.shape, np.nan, result.kind), gap)
    return type(result)(*(None if t is None else _blank(t, gap) for t in result))


def _plain(result):
    if isinstance(result, Tensor):
        return {"y": result.numpy()}
    return {name: t.numpy() for name, t in result._asdict().items() if t is not None}


def without_frameworks(direction, arrays, keywords):
    """Whether torch or CuPy is imported after a call with arrays of numba.cuda, and its products."""
    from numba import cuda

    before = two_step.forward, two_step.backward
    taken = []
    replay.forced = True
    two_step.forward = two_step.backward = lambda *args: taken.append(args)
    try:
        given = {name: None if a is None else cuda.to_device(a) for name, a in arrays.items()}
        getattr(numdcn, f"deform_conv_{direction}")(**given, **keywords)
        return [name for name in ("torch", "cupy") if name in sys.modules], len(taken)
    finally:
        two_step.forward, two_step.backward = before
        replay.forced = None


def forms(arrays, keywords, dtype):
    """What the benchmark's switch (benchmarks/gpu/forms.py) finds: (the name of the other form, products of the call as it
    chooses and in the other form, whether both agree, whether all is as before); the name alone if there is none."""
    from benchmarks.gpu.forms import other, takes_two_steps

    with installed() as torch:
        device = types.SimpleNamespace(on_torch=True, torch=torch)
        given = {name: None if a is None else tensor(a) for name, a in arrays.items()}
        call = lambda: numdcn.deform_conv_forward(**given, **keywords)  # noqa: E731
        found = other(device, call, dtype)
        if found is None:
            return (None,)
        name, run = found
        torch.products.clear()
        own = call().numpy().astype(float)
        counts = [len(torch.products)]
        others = run().numpy().astype(float)
        counts.append(len(torch.products) - counts[0])
        as_before = replay.forced is None and not torch.backends.cuda.matmul.allow_tf32
        return (
            name,
            counts,
            bool(np.allclose(own, others, rtol=1e-2, atol=1e-1)),
            as_before and not takes_two_steps(call),
        )
