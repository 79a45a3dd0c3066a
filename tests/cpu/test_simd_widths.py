"""The kernels are right on narrower machines: the core tests run again with AVX2 and with 128-bit vectors.

Numba is told to compile for another processor, in one cache folder for all, as a user might who moves a home folder
between machines. The narrow runs take a part of the tests that reaches every path and both dtypes.
"""

import platform
import re

import pytest
from checks import ROOT, run_python

MACHINES = {
    256: {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"},
    128: {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse3,+ssse3,+sse4.1,+sse4.2"},
}
on_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="other SIMD widths are forced on x86-64 only"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def width(**environment):
    """Bits of a vector of the machine that Numba compiles for."""
    code = "from numdcn._cpu.jit import simd_bytes; print(8 * simd_bytes())"
    return int(run_python(code, **environment).stdout)


@on_x86
@pytest.mark.parametrize("bits", MACHINES)
def test_core_tests_on_a_narrower_machine(bits, cache):
    environment = {**MACHINES[bits], "NUMBA_CACHE_DIR": cache}
    own = width()
    if own < bits:
        pytest.skip(f"this machine has {own} bits, the test needs {bits}")
    assert width(**environment) == bits
    every = sorted(
        f"tests/ops/{path.name}" for path in (ROOT / "tests" / "ops").glob("test_*.py") if "Family" in path.read_text()
    )
    for tests in (
        ["tests/ops/test_deform_conv.py", "tests/ops/test_deform_conv_special.py", "-k", "cpu"],
        [*every, "-k", "cpu and against_naive"],
    ):
        done = run_python(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests], timeout=400, **environment)
        assert re.search(r"\d{3,} passed", done.stdout), done.stdout


@on_x86
def test_one_cache_folder_for_all_widths(cache):
    """Code compiled for one width is never loaded for another: each run, in turn, finds its own, and it is right."""
    code = (
        "import numpy as np, numdcn\n"
        "from checks import cpu\nfrom conv_cases import Case\nfrom family import check_against_naive\n"
        "from test_deform_conv import make\n"
        "check_against_naive(cpu('deform_conv'), make(Case(1, 33, 35, (9, 8), padding=1, mask=True, bias=True), np.float32))\n"
        "print('right')"
    )
    own = width()
    for bits in [*MACHINES, own, *MACHINES]:
        if bits <= own:
            environment = MACHINES[bits] if bits != own else {}
            assert "right" in run_python(code, NUMBA_CACHE_DIR=cache, **environment).stdout
