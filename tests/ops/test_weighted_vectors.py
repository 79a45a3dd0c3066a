"""dcnv3, dcnv4 and ms_deform_attn reproduce numbers that were made without numdcn (tests/vectors/README.md)."""

import pathlib

import numpy as np
import pytest
from checks import cpu, reference

VECTORS = pathlib.Path(__file__).parents[1] / "vectors"
ARRAYS = {
    "dcnv3": ("x", "offsets", "mask"),
    "dcnv4": ("x", "offset_mask"),
    "ms_deform_attn": ("value", "sampling_locations", "attention_weights"),
}
FILES = [path.stem for path in sorted(VECTORS.glob("*.npz")) if path.stem.startswith(tuple(ARRAYS))]
KINKS = ("edges", "border", "far", "nan")  # positions that float32 cannot hold


def load(name):
    """(operator, grad_y, arrays, options, {name: expected}, how coordinates were drawn)"""
    with np.load(VECTORS / f"{name}.npz", allow_pickle=False) as file:
        v = dict(file)
    operator = next(o for o in ARRAYS if name.startswith(o))
    if operator == "ms_deform_attn":
        options = {"spatial_shapes": v["spatial_shapes"]}
        if v["sampling_locations"].ndim == 5:
            options["points_per_level"] = v["points_per_level"]
    else:
        options = {key: tuple(v[key].tolist()) for key in ("kernel_size", "stride", "padding", "dilation")}
        options |= {"offset_scale": float(v["offset_scale"]), "remove_center": bool(v["remove_center"])}
        options |= {"groups": int(v["groups"])} if operator == "dcnv4" else {}
    arrays = {key: v[key] for key in ARRAYS[operator]}
    want = {key: v[key] for key in ("y", *(f"grad_{key}" for key in arrays))}
    return operator, v["grad_y"], arrays, options, want, str(v["kind"])


def check(got, want, tolerance, name):
    """Within a share of the largest magnitude, with NaN and infinities in the same places."""
    assert got.shape == want.shape, name
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=name)
    largest = np.abs(want[finite]).max(initial=0.0)
    np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=tolerance * largest, err_msg=name)


def test_there_are_some_of_each():
    assert [sum(name.startswith(operator) for name in FILES) for operator in ARRAYS] == [5, 4, 6]


@pytest.mark.parametrize("made", [cpu, reference])
@pytest.mark.parametrize("name", FILES)
def test_numbers_of_others(name, made):
    operator, grad_y, arrays, options, want, _ = load(name)
    backend = made(operator)
    check(backend.forward(**arrays, **options), want["y"], 1e-11, "y")
    for key, array in backend.backward(grad_y, **arrays, **options)._asdict().items():
        check(array, want[f"grad_{key}"], 1e-11, key)


@pytest.mark.parametrize("name", FILES)
def test_numbers_of_others_in_float32(name):
    """Where float32 holds the positions: within the rounding of some hundred terms, and of positions up to about ten."""
    operator, grad_y, arrays, options, want, kind = load(name)
    if kind in KINKS:
        return
    backend, narrow = cpu(operator), {key: array.astype(np.float32) for key, array in arrays.items()}
    check(backend.forward(**narrow, **options), want["y"], 3e-4, "y")
    for key, array in backend.backward(grad_y.astype(np.float32), **narrow, **options)._asdict().items():
        check(array, want[f"grad_{key}"], 5e-4, key)
