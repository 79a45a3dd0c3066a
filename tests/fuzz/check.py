"""What is checked for each problem. Error bounds are those of checks.py and family.py; there are no other tolerances
here."""

import re
import sys

import numpy as np
import test_deform_conv_layer
from checks import LAYOUTS, Backend, assert_close, assert_same_bits, cpu, reference
from family import assert_same, blank, check_against_naive, expected, main, only, outputs
from family_errors import WRONG_KINDS, wrong_outs
from guard_pages import KEPT, guarded
from halves import HALVES, expected_of_narrow, halved, multiplies_pairs

import numdcn
from fuzz.draw import COORDINATES, Dice, draw

OUT_LAYOUTS = [LAYOUTS[name] for name in LAYOUTS if name != "read_only"]


def check(operator, seed):
    """Draws the problem of this seed and raises an AssertionError that describes it unless everything about it is
    right."""
    dice, threads = Dice(operator, seed), numdcn.get_num_threads()
    with np.errstate(all="ignore"):  # most problems are about non-finite numbers
        p = draw(operator, dice)
        hostile = dice.chance(0.25) and not dice.large
        try:
            (misuse if hostile else use)(dice, backend_of(operator), p)
        except Exception as error:
            error.add_note(described(p) + dice.told)
            raise
        finally:
            numdcn.set_num_threads(threads)
            KEPT.clear()


def backend_of(operator):
    backend = cpu(operator)
    return test_deform_conv_layer.of_y(backend) if operator == "deform_conv_layer" else backend


def described(p):
    arrays = ", ".join(f"{name} {p[name].shape}" for name in ("grad_y", *p.given()))
    return f"{p.dtype}: {arrays}, {p.params}"


def use(dice, backend, p):
    """Against the reference, then again in another way, with the same bits. Large problems skip the reference."""
    if not dice.large:
        against_reference(backend, p.map(lambda _, array: dice.one(*LAYOUTS.values())(array)))
    numdcn.set_num_threads(1)
    result, g = p.forward(backend), p.backward(backend)
    another_way(dice, backend, p, result, g)
    if p.operator.name in MORE:
        MORE[p.operator.name](dice, backend, p, g)
    if p.dtype == np.float32 and p.operator.name != "deform_conv_layer" and dice.chance(0.3):
        in_a_half_type(dice, backend, p)


def in_a_half_type(dice, backend, p):
    """The bits of float32, rounded, unless dot products give others; a result of the layer, which rounds in between,
    has others anyway."""
    kind, single = dice.one(*HALVES.values()), np.dtype(np.float32)
    finer = "rois" in p.given() or dice.chance(0.5)  # corners of boxes must stay finite
    narrow, wide = halved(p, kind, single if finer else kind)
    placed = narrow.map(lambda _, array: dice.one(*LAYOUTS.values())(array))
    pairs = multiplies_pairs(narrow)
    for direction in ("forward", "backward"):
        right, made = getattr(wide, direction)(backend), getattr(placed, direction)(backend)
        if pairs and direction == "forward":
            by_dot_products(backend, narrow, wide, made)
            continue
        rounded = {name: array.astype(outputs(made)[name].dtype) for name, array in outputs(right).items()}
        assert_same(made, rounded["y"] if isinstance(right, np.ndarray) else type(right)(**rounded))


def by_dot_products(backend, narrow, wide, y):
    """The bits of contiguous arrays, and within the bounds of the reference, blurred as below."""
    assert_same(y, narrow.forward(backend))
    if narrow.grad_y.size <= 2000:
        value, bound = expected_of_narrow(narrow, wide, rounds_terms=True)["y"]
        y, value = (np.where(np.isfinite(a), a, np.nan).astype(np.float64) for a in (y.astype(np.float32), value))
        assert_close(y, value, bound, "y in bfloat16")


def against_reference(backend, p):
    odd = [name for name in ("grad_y", *p.given()) if name not in COORDINATES]
    infinite = p.operator.name != "roi_pool" and any(np.isinf(p[name]).any() for name in odd)
    check_against_naive(*blurred(backend, p) if infinite else (backend, p))


def blurred(backend, p):
    """The same, with NaN for infinities in all results: inf*a + inf*b - inf*b is one or the other, depending on the
    order."""

    def blur(result):
        for array in outputs(result).values():
            array[~np.isfinite(array)] = np.nan
        return result

    def expected_of(q):
        exact = expected(q._replace(operator=p.operator))
        return {name: (np.where(np.isfinite(value), value, np.nan), bound) for name, (value, bound) in exact.items()}

    forward, backward = (lambda *a, run=run, **k: blur(run(*a, **k)) for run in (backend.forward, backend.backward))
    return Backend(backend.name, forward, backward), p._replace(operator=p.operator._replace(expected=expected_of))


def another_way(dice, backend, p, result, g):
    """Other memory layouts, another number of threads, some of the gradients, prepared weights: the same bits."""
    end = dice.one(None, "before", "after") if sys.platform.startswith("linux") else None

    def placed(array, layouts):
        return guarded(array, end) if end and array.size else dice.one(*layouts)(array)

    other = p.map(lambda _, array: placed(array, [*LAYOUTS.values()]))
    kept = other.map(lambda _, array: array.copy())
    call, names = other, dice.some(p.wanted())
    if "w" in p.given() and dice.chance(0.3):
        weights = numdcn.prepare_weights(other["w"], groups=p["x"].shape[1] // p["w"].shape[1])
        call = other.holding(w=weights)
    numdcn.set_num_threads(dice.one(1, 2, 3, 7))
    for fresh, run, more in ((result, call.forward, {}), (only(g, names), call.backward, {"wrt": names})):
        out = dice.one(None, blank(fresh, layout=lambda array: placed(array, OUT_LAYOUTS)))
        got = run(backend, out=out, **more)
        assert_same(got, fresh)
        assert out is None or all(a is b for a, b in zip(outputs(got).values(), outputs(out).values(), strict=True))
    for name in ("grad_y", *p.given()):
        assert_same_bits(other[name], kept[name], f"{name} after the call")


def given_argmax(dice, backend, p, g):
    result = p.forward(backend, return_argmax=True)
    if not dice.large:
        np.testing.assert_array_equal(result.argmax, p.forward(reference("roi_pool"), return_argmax=True).argmax)
    assert_same(p.backward(backend, argmax=dice.one(*LAYOUTS.values())(result.argmax)), g)


def given_offsets(dice, backend, p, g):
    result = p.forward(cpu("deform_conv_layer"))
    made = {name: getattr(result, name) for name in ("offsets", "mask") if getattr(result, name) is not None}
    assert_same(p.backward(backend, **{name: dice.one(*LAYOUTS.values())(made[name]) for name in dice.some(made)}), g)


MORE = {"roi_pool": given_argmax, "deform_conv_layer": given_offsets}

# Invalid calls.

INTS = (
    "stride", "padding", "dilation", "output_size", "group_size", "sample_per_part", "sampling_ratio", "kernel_size", "groups",
)  # fmt: skip
NO_LEVELS = [
    3,
    None,
    (),
    ((2, 2), 3),
    ((2, 0),),
    ((1.0, 1),),
    ((1, 1, 1),),
    "2x2",
    np.ones((1, 2)),
    {(2, 2)},
    ((2**31, 1),),
]
NO_COUNTS = [3, (), (1.0,), (0,), (True,), "1", np.ones(1), (2**31,), {1}]
NO_INTS = [2.0, "2", None, True, b"1", 1j, object(), np.float32(1), np.timedelta64(1), np.array([1]), 2**70, (1, 2.5)]
NO_INTS += [(1, 2, 3), (), {1}, slice(2)]
NO_NUMBERS = ["1", None, 1j, True, (1.0,), np.nan, np.inf, -np.inf, np.timedelta64(1), np.array([1.0]), 10**400]
NO_FLAGS = [1, 0, None, "yes", np.array([True]), 1.0]
NO_WRT = ["weight", 3, ("x", 3), ("x", "rois "), b"x", 1.5]
KINDS = {name: change for name, (change, *_) in WRONG_KINDS.items() if name != "float64 among float32"}
KINDS["other float"] = lambda a: a.astype(np.float64 if a.dtype == np.float32 else np.float32)
KINDS["masked"] = np.ma.masked_array
SHAPES = {
    "an axis less": lambda a, axis: a[0] if len(a) else a[..., 0],
    "an axis more": lambda a, axis: a[..., None],
    "no elements": lambda a, axis: a.take([], axis),
    "an axis one shorter": lambda a, axis: a[(slice(None),) * axis + (slice(1, None),)],
    "an axis twice as long": lambda a, axis: np.concatenate([a, a], axis),
    "its axes reversed": lambda a, axis: a.T,
}


def misuse(dice, backend, p):
    """One thing is wrong: a TypeError or ValueError names it, and nothing is written."""
    wrong = dice.one(wrong_parameter, wrong_kind, wrong_shape, wrong_boxes, other_class, wrong_wrt, wrong_out)
    wrong(dice, backend, p)


def refused(call, names, *outs):
    kept = [array.copy() for array in outs]
    try:
        call()
    except (TypeError, ValueError) as error:
        assert re.search(rf"`({'|'.join(names)})\b", str(error)), f"none of {names} is named by: {error!r}"
    else:
        raise AssertionError(f"no error: {names} were wrong")
    for array, copy in zip(outs, kept, strict=True):
        assert_same_bits(array, copy, "out after an error")


def both_refuse(backend, p, right, name, names=None):
    """Forward and backward reject a problem; the forward's `out`, shaped like the result of `right`, remains
    untouched."""
    out = blank(right.forward(backend), 7)
    if name != "grad_y":
        refused(lambda: p.forward(backend, out=out), names or [name], out)
    refused(lambda: p.backward(backend), names or [name])


def having(p, name, value):
    return p._replace(grad_y=value) if name == "grad_y" else p.holding(**{name: value})


def wrong_values(name, p):
    if name in ("spatial_shapes", "points_per_level"):
        return NO_LEVELS if name == "spatial_shapes" else NO_COUNTS
    if name in INTS:
        return NO_INTS + [-1] * (name != "sampling_ratio") + [0] * (name not in ("padding", "sampling_ratio"))
    if isinstance(p.params[name], (bool, np.bool_)):
        return NO_FLAGS
    return NO_NUMBERS + [0, 3] * (name == "mask_scale") + [1e300] * (p.dtype == np.float32)


def wrong_parameter(dice, backend, p):
    if p.params:
        name = dice.one(*p.params)
        value = dice.one(*wrong_values(name, p))
        dice.told = f"; `{name}` is {value!r}"
        both_refuse(backend, p._replace(params={**p.params, name: value}), p, name)


def wrong_kind(dice, backend, p):
    name, kind = dice.one("grad_y", *p.given()), dice.one(*KINDS)
    dice.told = f"; `{name}` is {kind}"
    names = ["grad_y", *p.given()] if kind == "other float" else [name]
    both_refuse(backend, having(p, name, KINDS[kind](p[name])), p, name, names)


def wrong_boxes(dice, backend, p):
    if "rois" in p.given() and len(p["rois"]):
        rois, column, row = p["rois"].copy(), dice.one(0, 1, 2, 3, 4), dice.rng.integers(len(p["rois"]))
        rois[row, column] = dice.one(np.nan, np.inf, -np.inf, *[-1, 0.5, len(p["x"]), 1e30] * (column == 0))
        dice.told = f"; `rois` has {rois[row]}"
        both_refuse(backend, p.having(rois=rois), p, "rois")


def wrong_shape(dice, backend, p):
    """Rejected by the name of an array, or else right: as the reference says."""
    name, kind = dice.one("grad_y", *p.given()), dice.one(*SHAPES)
    changed = having(p, name, SHAPES[kind](p[name], int(dice.rng.integers(p[name].ndim))))
    dice.told = f"; `{name}` has {kind}, {changed[name].shape}"
    names = ["grad_y", *p.operator.arrays]
    try:
        y = main(changed.forward(backend))
    except (TypeError, ValueError):
        refused(lambda: changed.forward(backend), names)
        refused(lambda: changed.backward(backend), names)
        return
    if y.shape != changed.grad_y.shape:
        refused(lambda: changed.backward(backend), ["grad_y"])
    against_reference(backend, changed._replace(grad_y=np.ones_like(y)))


def other_class(dice, backend, p):
    """A matrix or another subclass: rejected by its name, or the same as the plain array."""
    name = dice.one("grad_y", *p.given())
    changed = having(p, name, p[name].view(np.matrix if p[name].ndim == 2 else np.recarray))
    dice.told = f"; `{name}` is a {type(changed[name]).__name__}"
    for run, right in ((changed.forward, p.forward), (changed.backward, p.backward)):
        try:
            got = run(backend)
        except (TypeError, ValueError):
            refused(lambda run=run: run(backend), [name])
        else:
            assert_same(got, right(backend))


def wrong_wrt(dice, backend, p):
    absent = [name for name in p.operator.arrays if name not in p.wanted()]
    refused(lambda: p.backward(backend, wrt=dice.one(*NO_WRT, *absent)), ["wrt"])


def wrong_out(dice, backend, p):
    g = p.backward(backend)
    name = dice.one(*p.wanted())
    for right, run in ((main(p.forward(backend)), p.forward), (getattr(g, name), p.backward)):
        wrong = [[1.0]]
        if right.size and right.dtype == np.float32:  # as in wrong_outs, whose last one fits an axis of one
            wrong = [array for array, *_ in wrong_outs(right)][: -1 if len(right) == 1 else None]
        wrong = dice.one(*wrong)
        out = wrong if run == p.forward else only(blank(g), [])._replace(**{name: wrong})
        refused(lambda run=run, out=out: run(backend, out=out), ["out"])
