"""`python -m benchmarks.gpu` without a GPU: its problems, references, rivals, floors and rows of ms_deform_attn, dcnv3 and
dcnv4."""

import importlib
import json
import sys
import types

import numpy as np
import pytest
from checks import run_python
from naive.dcnv4 import packed, unpacked

from benchmarks.cases.operators import OPERATORS
from benchmarks.gpu import floors, problems, report, rivals, run, timing
from benchmarks.gpu.compare import judge
from benchmarks.gpu.problems import CASES, MAKERS, SMALL, TINY, common, make, published
from benchmarks.gpu.reference import expected

PROBLEMS = [(operator, label) for operator in CASES for label in MAKERS[operator]]
WITH_RIVALS = [("ms_deform_attn", "levels"), ("dcnv3", "plain"), ("dcnv4", "plain")]


def magnitudes(problem):
    """The arrays with absolute values of all but coordinates."""
    arrays = {n: a if n in ("sampling_locations", "offsets") else np.abs(a) for n, a in problem.arrays.items()}
    if problem.operator == "dcnv4":
        groups, both = problem.keywords["groups"], problem.arrays["offset_mask"]
        kernel = {n: problem.keywords[n] for n in ("kernel_size", "remove_center") if n in problem.keywords}
        offsets, mask = unpacked(both, groups, **kernel)
        arrays["offset_mask"] = packed(offsets, np.abs(mask), groups, both.shape[3])
    return arrays


@pytest.mark.parametrize("operator, label", PROBLEMS)
def test_expected_results_are_those_of_loops(operator, label):
    """Bit for bit, and so are the sums of absolute terms: float64 holds every sum of these numbers exactly."""
    naive, problem = importlib.import_module(f"naive.{operator}"), make(operator, label, SMALL, 5)
    found, keywords, terms = expected(problem), problem.keywords, magnitudes(problem)
    grads = naive.backward(problem.grad_y, **problem.arrays, **keywords)._asdict()
    sums = naive.backward(np.abs(problem.grad_y), **terms, **keywords, lower=1.0)._asdict()
    assert found.keys() == {"y", *problem.arrays}
    np.testing.assert_array_equal(found["y"].value, naive.forward(**problem.arrays, **keywords))
    np.testing.assert_array_equal(found["y"].terms, naive.forward(**terms, **keywords))
    for name, grad in grads.items():
        np.testing.assert_array_equal(found[name].value, grad, err_msg=name)
        np.testing.assert_array_equal(found[name].terms, sums[name], err_msg=name)


def test_problems_have_padding_that_is_not_read():
    for label in MAKERS["dcnv4"]:
        problem = make("dcnv4", label, SMALL, 5)
        points = 9 if label == "plain" else 14
        padding = problem.arrays["offset_mask"][..., 3 * points * problem.keywords["groups"] :]
        assert padding.size and padding.all(), label
        assert not expected(problem)["offset_mask"].value[..., -padding.shape[3] :].any(), label


@pytest.mark.parametrize("operator, name", [("ms_deform_attn", "rt-detr"), ("dcnv3", "c3"), ("dcnv4", "c3")])
def test_problems_in_published_sizes(operator, name):
    """Half types hold the arrays, float32 the locations, and positions are exact in it. float32 results of the CPU are
    within the bounds, without one weight they are not."""
    problem = published(operator, CASES[operator][name], 3)
    arrays = {n: a.astype(np.float32) for n, a in problem.arrays.items()}
    for argument, array in problem.arrays.items():
        if argument != "sampling_locations":
            assert np.array_equal(common(array), array), argument
            continue
        size = np.array(problem.keywords["spatial_shapes"])[:, None, ::-1]
        position = arrays[argument] * size.astype(np.float32) - np.float32(0.5)
        assert position.dtype == np.float32 and np.array_equal(position, array * size - 0.5)
    wanted, grad_y = expected(problem), problem.grad_y.astype(np.float32)

    def results(given):
        return problem.call("forward", given) | problem.call("backward", given, grad_y)

    assert judge(results(arrays), wanted, "float32", False)[0] <= 1
    weights = list(arrays)[-1]
    place = (0, 5, 9, 12) if operator == "dcnv4" else (0, 5) + (0,) * (arrays[weights].ndim - 2)
    arrays[weights][place] = arrays[weights][place] + 0.5
    assert judge(results(arrays), wanted, "float32", False)[0] > 1


def tensors(torch, problem, dtype):
    arrays = {name: torch.from_numpy(a).to(getattr(torch, dtype)) for name, a in problem.arrays.items()}
    return arrays, torch.from_numpy(problem.grad_y).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("operator, label", WITH_RIVALS)
def test_the_composition_is_right(torch, operator, label, dtype):
    """torch's is a rival, within the bounds of the operator; in half types its positions are rounded."""
    problem = make(operator, label, SMALL, 6)
    arrays, grad_y = tensors(torch, problem, dtype)
    with torch.no_grad():  # as in a run
        (other,) = rivals.rivals(torch, operator, arrays, problem.keywords, grad_y)
        results = [other.forward() | other.backward() for _ in range(2)]
    assert other.name == "grid_sample" and results[0].keys() == {"y", *arrays}
    for found in results:
        assert all(a.dtype == grad_y.dtype and a.isfinite().all() for a in found.values())
        if dtype != "float16":
            got = {name: a.numpy() for name, a in found.items()}
            assert judge(got, expected(problem), dtype, False)[0] <= 1


@pytest.mark.parametrize("operator, label", [one for one in PROBLEMS if one not in WITH_RIVALS])
def test_no_rival_of_what_others_lack(torch, operator, label):
    problem = make(operator, label, TINY, 6)
    assert rivals.rivals(torch, operator, *tensors(torch, problem, "float32")[:1], problem.keywords, None) == []


KERNEL = """
import torch, numpy
from naive import ms_deform_attn

def arguments(value, sizes, starts, locations, weights):
    assert sizes.dtype == starts.dtype == torch.int64 and starts.tolist() == [0, *sizes.prod(1).cumsum(0)[:-1].tolist()]
    return value.numpy(), sizes.tolist(), locations.numpy(), weights.numpy()

def ms_deform_attn_forward(value, sizes, starts, locations, weights, step):
    assert len(value) % min(step, len(value)) == 0
    return torch.from_numpy(ms_deform_attn.forward(*arguments(value, sizes, starts, locations, weights)))

def ms_deform_attn_backward(value, sizes, starts, locations, weights, grad_y, step):
    given = arguments(value, sizes, starts, locations, weights)
    return [torch.from_numpy(a) for a in ms_deform_attn.backward(grad_y.numpy(), *given)]
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a module of this text; `rivals.attention_module` looks for it again."""

    def install(name, text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        rivals.attention_module.cache_clear()
        return rivals.attention_module()

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    rivals.attention_module.cache_clear()
    for name in ("MultiScaleDeformableAttention", "kernels"):
        sys.modules.pop(name, None)


def test_the_compiled_kernel_gets_its_arguments(torch, installed):
    """A stand-in with its signature, which computes in loops."""
    module = installed("MultiScaleDeformableAttention", KERNEL)
    problem = make("ms_deform_attn", "levels", TINY, 8)
    arrays, grad_y = tensors(torch, problem, "float64")
    other = rivals.compiled_attention(torch, module, arrays, problem.keywords["spatial_shapes"], grad_y)
    got = {name: a.numpy() for name, a in (other.forward() | other.backward()).items()}
    assert other.name == "transformers" and judge(got, expected(problem), "float64", False)[0] <= 1


@pytest.mark.parametrize("text", ["", "def get_kernel(name, version):\n    raise OSError('no network')\n"])
def test_without_the_compiled_kernel_there_is_one_rival_less(torch, installed, text):
    assert installed("kernels", text) is None


def test_the_kernel_that_transformers_runs(torch, installed):
    text = "def get_kernel(name, version):\n    return name, version\n"
    assert installed("kernels", text) == ("kernels-community/deformable-detr", 1)


def test_the_compiled_kernel_is_a_rival_on_a_gpu(torch, monkeypatch):
    """Tensors that say they are on a GPU."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    problem = make("ms_deform_attn", "levels", TINY, 8)
    arrays, grad_y = tensors(torch, problem, "float32")
    monkeypatch.setattr(rivals, "attention_module", lambda: types.SimpleNamespace())
    arrays = {name: a.as_subclass(OnGPU) for name, a in arrays.items()}
    found = rivals.rivals(torch, "ms_deform_attn", arrays, problem.keywords, grad_y)
    assert [other.name for other in found] == ["grid_sample", "transformers"]


def test_floors_of_weighted_rows():
    """The encoder and DCNv3 at 200 x 320, as computed by hand."""
    cases = floors.weighted_cases()
    assert set(cases) == {f"{operator} {name}" for operator, names in CASES.items() for name in names}
    pixels = 100 * 167 + 50 * 84 + 25 * 42 + 13 * 21
    points, channels = pixels * 8 * 16, 256 * pixels
    encoder = floors.weighted_floor(cases["ms_deform_attn encoder"], "forward", "float32")
    assert encoder.moved == 4 * (2 * channels + 3 * points)
    assert encoder.operations == 2 * 4 * 32 * points and encoder.corners == 4 * 4 * 32 * points
    half = floors.weighted_floor(cases["ms_deform_attn encoder"], "backward", "float16")
    assert half.moved == 2 * (3 * channels + 2 * points) + 4 * 2 * 2 * points
    assert half.operations == 2 * encoder.operations and half.corners == 6 * 4 * 32 * points
    decoder = floors.weighted_floor(cases["ms_deform_attn decoder"], "forward", "float32")
    points = 300 * 8 * 16  # which have fewer corners than there are pixels
    assert 4 * 32 * points < channels and decoder.moved == 4 * (4 * 32 * points + 300 * 256 + 3 * points)
    window = floors.weighted_floor(cases["dcnv3 d1"], "forward", "float16")
    assert window.moved == 200 * 320 * (2 * (64 + 64 + 36) + 4 * 72)
    packed_window = floors.weighted_floor(cases["dcnv4 d1"], "forward", "float16")
    assert packed_window.moved == 200 * 320 * 2 * (64 + 64 + 112)


def test_rows_of_every_operator():
    """All operators are compared and have rows; those of attention, DCNv3 and DCNv4 are the floors' rows."""
    assert set(MAKERS) == set(OPERATORS) and set(run.OPERATORS) == {*OPERATORS, "arrays"}
    rows = dict(timing.timed_problems(False, MAKERS))
    assert {name.split()[0] for name in rows} == set(MAKERS) - {"deform_conv"}
    assert [name for name in rows if " " in name] == list(floors.weighted_cases())
    assert list(dict(timing.timed_problems(False, ["deform_conv", "dcnv3"]))) == ["dcnv3 c1", "dcnv3 c3", "dcnv3 d1"]
    made = rows["dcnv3 c3"]()
    assert made.operator == "dcnv3" and made.arrays["x"].shape == (1, 14, 14, 256)
    assert problems.case_of("dcnv3", made.arrays, made.keywords) == CASES["dcnv3"]["c3"]._replace(name="")


def test_shares_of_floors():
    """A call that takes twice as long as its floor, and one that failed."""
    least = floors.weighted_bound(CASES["dcnv3"]["d1"], "forward", "float32", floors.H100)[1]
    row = {"row": "dcnv3 d1", "direction": "forward", "detail": ""}
    fast = {**row, "contender": "numdcn float32", "status": "ok", "rounds": [2 * least], "busy": 4 * least}
    bad = {**row, "contender": "numdcn float16", "status": "failed", "rounds": []}
    lines = report.weighted_roofline_table({"rates": floors.H100._asdict(), "operators": [fast, bad]})
    assert lines[2].split(" | ")[1:] == ["forward", "0.107 L2: 50 % (25 %)", "0.054 L2 |"]


def test_nothing_imports_numba_before_the_simulator_is_asked_for():
    done = run_python("import sys, benchmarks.gpu.run\nprint({'numba', 'numdcn', 'torch'} & set(sys.modules))\n")
    assert done.stdout.strip() == "set()"


@pytest.mark.full
def test_rows_in_the_simulator(tmp_path):
    """What a GPU would do, in tiny: comparisons with the CPU and the rival, and the steps of timing."""
    pytest.importorskip("numba_cuda", reason="needs the cuda extra")
    what = ["--simulator", "--out", tmp_path, "--parts", "compare,time", "--kinds", "float32"]
    done = run_python(["-m", "benchmarks.gpu", *what, "--operators", ",".join(CASES)], PYTHONSAFEPATH=None, timeout=400)
    results = json.loads((tmp_path / "gpu-simulator.json").read_text(encoding="utf-8"))
    assert {(v["operator"], v["what"].split(":")[0]) for v in results["verdicts"]} == set(PROBLEMS)
    assert {v["status"] for v in results["verdicts"]} == {"right"}, done.stdout
    assert {r["status"] for r in results["operators"]} == {"ok"}, done.stdout
    contenders = {"numdcn float32", "numdcn float16"}
    if importlib.util.find_spec("torch"):
        contenders |= {"grid_sample float32", "grid_sample float16"}
        assert any("against grid_sample, backward" in v["what"] for v in results["verdicts"])
    rows = {(r["row"], r["direction"]) for r in results["operators"]}
    assert rows == {(f"{o} {next(iter(c))}", d) for o, c in CASES.items() for d in ("forward", "backward")}
    assert {r["contender"] for r in results["operators"]} == contenders
    assert not results["rows"] and not results["issue"]
