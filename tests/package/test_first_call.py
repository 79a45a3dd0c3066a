"""What a first call says while it compiles, and where it cannot."""

import logging
import re
import time

import pytest
from checks import limit, run_python

from numdcn._call import notice

EVERY_OPERATOR = """
import numpy as np
import numdcn
from numdcn.warm import OPERATORS, _small_calls
for name, (arrays, more) in _small_calls(np.dtype(np.float32)).items():
    try:
        OPERATORS[name][0](*arrays, **more)
    except RuntimeError as error:
        assert "NUMBA_DISABLE_JIT is set" in str(error) and "unset NUMBA_DISABLE_JIT" in str(error), error
    else:
        raise AssertionError(name)
"""


def test_numba_without_its_compiler():
    run_python(EVERY_OPERATOR, NUMBA_DISABLE_JIT=1)


FIRST_CALL = """
import logging, sys
import numpy as np
import numdcn
from numdcn._call import notice
notice.PATIENCE = 0.1
if "configured" in sys.argv:
    logging.basicConfig(format="told by %(name)s: %(message)s", stream=sys.stdout)
for _ in range(2):
    numdcn.roi_pool_forward(np.ones((1, 1, 2, 2)), np.zeros((1, 5)), 1)
"""


def test_a_first_call_that_compiles_says_so(tmp_path):
    """Once, on stderr; not when the code is found."""
    told = run_python(FIRST_CALL, NUMBA_CACHE_DIR=tmp_path, NUMDCN_QUIET=None).stderr
    assert re.fullmatch(
        r"numdcn: compiling roi_pool_forward for this CPU. This happens once: the code is kept in \S+\n", told
    )
    assert str(tmp_path) in told
    assert run_python(FIRST_CALL, NUMBA_CACHE_DIR=tmp_path, NUMDCN_QUIET=None).stderr == ""


def test_a_call_by_an_adapter_is_one_of_the_operator():
    door = {"__name__": "numdcn.conv", "public_caller": notice.public_caller}
    exec("def conv_forward(): return public_caller()", door)
    adapter = {"__name__": "numdcn.adapters.some", "conv_forward": door["conv_forward"]}
    exec("def convolve(): return conv_forward()", adapter)
    assert adapter["convolve"]() == "conv_forward"


@pytest.mark.full
def test_an_application_decides_where_it_is_said(tmp_path):
    done = run_python(FIRST_CALL, "configured", NUMBA_CACHE_DIR=tmp_path, NUMDCN_QUIET=None)
    assert done.stdout.startswith("told by numdcn: numdcn: compiling roi_pool_forward") and done.stderr == ""


class Cache:
    missed, cache_path = True, None


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(notice, "_waited", {})
    monkeypatch.delenv("NUMDCN_QUIET", raising=False)
    caplog.set_level(logging.WARNING, "numdcn")
    return caplog


def test_what_is_said_of_compiling(said, monkeypatch):
    for caller in ("conv_forward", "", "conv_forward", "roi_pool_forward"):
        notice.waited(caller, 0.6, "CPU", Cache)
    assert said.messages == [
        "numdcn: compiling conv_forward for this CPU. This happens in every process: no folder to keep the code in is writable"
    ]
    notice.waited("conv_forward", 9.0, "CPU", Cache)
    found = type("Found", (), {"missed": False})
    notice.waited("conv_backward", 9.0, "CPU", found)
    assert len(said.messages) == 1
    monkeypatch.setenv("NUMDCN_QUIET", "1")
    notice.waited("roi_pool_backward", 9.0, "CPU", Cache)
    assert len(said.messages) == 1


def test_a_timer_waits_for_a_kernel_of_a_gpu(said, monkeypatch):
    monkeypatch.setattr(notice, "public_caller", lambda: "conv_forward")
    with notice.waiting("GPU", Cache):
        pass
    assert said.messages == []
    monkeypatch.setattr(notice, "PATIENCE", 0.01)
    with notice.waiting("GPU", Cache):
        waited_for(lambda: said.messages)
    assert said.messages == [
        "numdcn: compiling conv_forward for this GPU. This happens in every process: no folder to keep the code in is writable"
    ]


def waited_for(condition):
    end = time.monotonic() + limit(20)
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


WARM = """
import numpy as np
import numdcn
import numdcn._cpu.threads as threads
numdcn.warmup(operators="deform_conv_layer")
warm = set(threads._codes)
assert {kernel.__name__ for kernel, _ in warm} >= {"forward_sampled_aside", "depthwise_sampled", "add_strays"}
for channels, outputs, taps, groups, size in (64, 64, 9, 1, 20), (3, 8, 9, 1, 9), (40, 40, 9, 40, 20), (64, 96, 9, 1, 64):
    x, w = np.ones((1, channels, size, size), "f"), np.ones((outputs, channels // groups, 3, 3), "f")
    predictor = np.zeros((27, channels, 3, 3), "f"), np.full(27, 0.5, "f")
    y = numdcn.deform_conv_layer_forward(x, w, *predictor, modulated=True, padding=1).y
    numdcn.deform_conv_layer_backward(y, x, w, *predictor, modulated=True, padding=1)
assert set(threads._codes) == warm, set(threads._codes) - warm
"""


@pytest.mark.full
def test_nothing_is_compiled_after_warmup():
    run_python(WARM)
