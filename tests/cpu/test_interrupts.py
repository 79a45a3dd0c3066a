"""Interrupts: whenever Ctrl-C or another exception from a signal handler comes, the library is left as before, and
usable.

Each test is a program in a separate process (interrupt_programs.py), as a defect hangs or kills. NUMDCN_TEST_INTERRUPTS
is the number of interrupts at random moments for each number of threads; the moments differ from run to run.
"""

import os
import random
import signal

import pytest
from checks import run_python

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
COUNT = int(os.environ.get("NUMDCN_TEST_INTERRUPTS", 1500))


COUNT_THREADS = ("interrupts", "every_instruction", "no_thread")


def run_program(name, *arguments, **environment):
    if name in COUNT_THREADS and not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted in /proc")
    done = run_python(["-m", "interrupt_programs"], name, *arguments, timeout=180 + COUNT / 20, **environment)
    assert f"{name} is right" in done.stdout, done.stdout + done.stderr
    print(done.stdout)


FULL = pytest.mark.full  # of several cases the quick tier runs one


@pytest.mark.full
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_interrupts_at_random_moments(threads):
    run_program("interrupts", COUNT, threads, random.randrange(10**6))


@FULL
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_interrupt_at_every_instruction(direction):
    run_program("every_instruction", direction)


def test_an_exception_waits_for_the_helpers():
    run_program("waits_for_helpers")


@pytest.mark.full
def test_handlers_that_call_at_random_moments():
    run_program("handler_calls", random.randrange(10**6))


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_handlers_that_fork_at_random_moments():
    run_program("handler_forks", random.randrange(10**6))


@pytest.mark.parametrize("delay", [pytest.param(0.01, marks=FULL), 0.5, pytest.param(1.5, marks=FULL)])
def test_an_interrupt_while_kernels_are_compiled(delay, tmp_path):
    run_program("first_call", delay, NUMBA_CACHE_DIR=tmp_path)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("delay", [0.005, 0.7])
def test_a_fork_while_kernels_are_compiled(delay, tmp_path):
    run_program("first_call_forks", delay, NUMBA_CACHE_DIR=tmp_path)


@pytest.mark.full
def test_an_interrupt_while_kernels_are_compiled_and_then_the_end(tmp_path):
    run_program("ends_while_compiling", NUMBA_CACHE_DIR=tmp_path)


@FULL
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may become a user with a limit")
def test_no_thread_can_be_started():
    run_program("no_thread")
