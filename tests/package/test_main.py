"""The package in its environment: `python -m numdcn`, what importing it loads, and its cache of compiled code."""

import os
import pathlib
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
from checks import run_python

import numdcn

SMALL_CALL = """
import numpy as np
import numdcn
x, offsets, w = np.ones((1, 2, 5, 5), np.float32), np.zeros((1, 2, 5, 5), np.float32), np.ones((3, 2, 1, 1), np.float32)
y = numdcn.deform_conv_forward(x, offsets, w)
print("y", float(y.sum()))
"""


@pytest.fixture(scope="module")
def report():
    return run_python(["-m", "numdcn"]).stdout


@pytest.mark.parametrize("word", ["numba", "numpy", "python", "thread", "simd", "cache", "gpu", "check"])
def test_the_report_mentions(report, word):
    assert word in report.lower(), report


def test_main_tells_the_facts(report):
    import numba

    for fact in (numdcn.__version__, numba.__version__, np.__version__, str(numdcn.get_num_threads())):
        assert fact in report, report
    assert any(width in report for width in ("128", "256", "512")), report
    assert "ms" in report or " s" in report, report


def test_main_exit_code_of_a_failing_self_check():
    """The self-check can fail: with a forward that returns something else it says so and the exit code is not 0."""
    code = (
        "import runpy, sys, numdcn\n"
        "import numdcn.deform_conv as op\n"
        "real = numdcn.deform_conv_forward\n"
        "def wrong(*args, **kwargs):\n"
        "    y = real(*args, **kwargs)\n"
        "    y += 1\n"
        "    return y\n"
        "numdcn.deform_conv_forward = op.deform_conv_forward = wrong\n"
        "runpy.run_module('numdcn', run_name='__main__')\n"
    )
    assert run_python(code, check=False).returncode != 0


def modules_after(code):
    return set(run_python(code + "\nimport sys; print('modules', *sys.modules)").stdout.split("modules ")[-1].split())


@pytest.mark.parametrize(
    "code", [pytest.param("import numdcn", id="import", marks=pytest.mark.full), pytest.param(SMALL_CALL, id="call")]
)
def test_nothing_is_loaded_beside_numba_and_numpy(code):
    """No CUDA, no framework, and only the parts of SciPy that Numba itself loads."""
    loaded = modules_after(code)
    assert "numdcn" in loaded
    for name in ("numba.cuda", "numba_cuda", "torch", "cupy", "jax", "matplotlib"):
        assert name not in loaded, name
    plain = "import numba, numpy; numba.njit(lambda a: a[0])(numpy.ones(1))"
    assert not {name for name in loaded - modules_after(plain) if name.split(".")[0] == "scipy"}


def test_import_starts_no_threads_and_sets_nothing():
    code = (
        "import os, threading, warnings; from numba import config\n"
        "def settings():\n"
        "    return {k: v for k, v in vars(config).items() if k.isupper()}, dict(os.environ)\n"
        "before = settings(); warnings.simplefilter('error'); import numdcn; after = settings()\n"
        "print('same', before == after, 'threads', threading.active_count())"
    )
    assert "same True threads 1" in run_python(code).stdout


def test_public_names():
    wanted = {
        *("deform_conv_forward", "deform_conv_backward", "DeformConvGradients", "prepare_weights", "PreparedWeights"),
        *("set_num_threads", "get_num_threads", "set_scratch_limit", "get_scratch_limit", "warmup", "__version__"),
    }
    assert wanted <= set(numdcn.__all__)
    for name in numdcn.__all__:
        assert hasattr(numdcn, name), name
    assert (pathlib.Path(numdcn.__file__).parent / "py.typed").exists()


def files_below(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.full
def test_a_second_process_adds_no_files_to_the_cache(tmp_path):
    assert "y 150.0" in run_python(SMALL_CALL, NUMBA_CACHE_DIR=tmp_path).stdout
    first = files_below(tmp_path)
    assert any(name.endswith(".nbc") for name in first), "nothing was cached"
    assert "y 150.0" in run_python(SMALL_CALL, NUMBA_CACHE_DIR=tmp_path).stdout
    assert files_below(tmp_path) == first


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_warmup_compiles_everything_that_a_call_needs(tmp_path, dtype):
    """After warmup(dtype) calls of every kind add nothing to the cache."""
    code = """
import pathlib, sys
import ml_dtypes
import numpy as np
import numdcn
from checks import cpu
from conv_cases import Case
from test_deform_conv import make
dtype, folder = np.dtype(sys.argv[1]), pathlib.Path(sys.argv[2])
numdcn.warmup(dtype)
before = sorted(folder.rglob("*.nbc"))
cases = [
    Case(2, 33, 40, (23, 21), padding=1, bias=True), Case(1, 1, 1, (3, 3)), Case(33, 3, 4, (5, 6), padding=1),
    Case(1, 36, 24, (9, 9), padding=1, groups=3, offset_groups=4, mask=True), Case(1, 300, 70, (9, 8), padding=1),
    Case(1, 16, 32, (9, 9), padding=1, groups=16, mask=True), Case(0, 2, 2, (4, 4)),
    Case(1, 64, 64, (9, 9), padding=1, offset_groups=16, mask=True), Case(1, 64, 64, (9, 9), groups=64),
    Case(1, 64, 64, (80, 70), padding=1),  # its images are divided
]
backend = cpu('deform_conv')
for case in cases:
    problem = make(case, dtype)
    problem.forward(backend)
    problem.backward(backend)
    problem.holding(w=numdcn.prepare_weights(problem['w'], groups=case.groups)).forward(backend)
added = set(folder.rglob("*.nbc")) - set(before)
print("compiled", len(before), "then", sorted(path.name for path in added))
"""
    done = run_python(code, dtype, tmp_path, NUMBA_CACHE_DIR=tmp_path)
    assert done.stdout.strip().endswith("then []") and "compiled 0" not in done.stdout, done.stdout


@pytest.mark.parametrize(
    "arguments, error",
    [({"dtype": np.uint16}, TypeError), ({"dtype": "int32"}, TypeError), ({"dtype": object()}, TypeError)],
)
def test_warmup_errors(arguments, error):
    with pytest.raises(error, match="dtype"):
        numdcn.warmup(**arguments)


def test_warmup_takes_names_and_dtypes():
    for dtype in ("float32", np.float32, np.dtype(np.float32), "float16", ml_dtypes.bfloat16):
        numdcn.warmup(dtype, backward=False)
    numdcn.warmup()


@pytest.mark.full
def test_without_a_writable_cache_folder(tmp_path):
    """Every location where Numba would put its files is blocked by a plain file; the library then compiles in
    memory."""
    package = pathlib.Path(numdcn.__file__).parent
    copy = tmp_path / "site" / "numdcn"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [copy, *(path for path in copy.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").write_text("")
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    code = f"import sys; sys.path.insert(0, {str(copy.parent)!r})\n" + SMALL_CALL + "print(numdcn.__file__)"
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"), blocked / "below")
    for cache in (blocked / "below", None):
        done = run_python(code, **{**places, "NUMBA_CACHE_DIR": cache}, PYTHONDONTWRITEBYTECODE=1)
        assert "y 150.0" in done.stdout and str(copy) in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(
    sys.platform == "win32" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root writes anywhere"
)
def test_with_a_read_only_cache_folder(tmp_path):
    tmp_path.chmod(0o500)
    assert "y 150.0" in run_python(SMALL_CALL, NUMBA_CACHE_DIR=tmp_path).stdout
