"""Fixtures: `backend` is each implementation of numdcn that this machine can run, `subject` those and the reference.

A numerical test has one body. It takes `backend` if it compares with the naive reference, and `subject` if it
compares with something else (an identity, a published vector, finite differences), so that the reference is tested too.
A new backend is a name in BACKENDS and a function from an operator's name to a checks.Backend. The operator is the
OPERATOR of the test file (see family.py). `gpu` is for tests of what is specific to a GPU: Numba's simulator, and a GPU
if there is one (device.py). `torch` and `jax` are the frameworks, where they are installed.
"""

import os
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / folder) for folder in ("support", "ops", "cuda", "")]
sys.path.append(str(HERE.parent))


import checks  # noqa: E402 - after the path
import device  # noqa: E402

BACKENDS = {"cpu": checks.cpu}


def operator_of(request):
    """The name of the operator that a test file is about: its OPERATOR, a family.Operator."""
    return request.module.OPERATOR.name


@pytest.fixture(scope="module", params=list(BACKENDS))
def backend(request):
    return BACKENDS[request.param](operator_of(request))


@pytest.fixture(scope="module", params=[*BACKENDS, "naive"])
def subject(request):
    return {**BACKENDS, "naive": checks.reference}[request.param](operator_of(request))


@pytest.fixture(scope="module", params=device.KINDS)
def gpu(request):
    reason = device.missing(request.param)
    if reason:
        pytest.skip(reason)
    return device.on(request.param, operator_of(request))


def pytest_configure(config):
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # show the reason of every skip
    _hypothesis_profiles()


def pytest_report_header():
    from numdcn import __version__, get_num_threads
    from numdcn._formulas.jit import simd_bytes, target

    gpus = device.count_gpus() or "no"
    return f"numdcn {__version__}: {8 * simd_bytes()}-bit vectors for {target()[1]}, {get_num_threads()} threads, {gpus} GPU"


def _hypothesis_profiles():
    import hypothesis

    examples = int(os.environ.get("NUMDCN_TEST_EXAMPLES", 60))
    common = {"deadline": None, "max_examples": examples, "print_blob": True}
    hypothesis.settings.register_profile("local", **common)
    hypothesis.settings.register_profile("ci", **common, derandomize=True, database=None)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed: pip install torch")


@pytest.fixture
def jax():
    return pytest.importorskip("jax", reason="jax is not installed: pip install jax")
