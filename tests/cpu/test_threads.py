"""Threads: the same bits whatever their number, and calls from anywhere, at any time, do not disturb each other.

Determinism is tested in this process; forks, signals, interrupts and interpreter exit each in a process of their own
(the programs are in thread_programs.py), because a defect there would hang or kill the test run.
"""

import ctypes
import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checks import (
    NAMES,
    Case,
    assert_same_bits,
    assert_same_gradients,
    cpu,
    limit,
    make,
    run_python,
    threads_asked_for,
)
from team_kernels import Meeting, fail, meet

import numdcn
import numdcn._cpu.threads as pool
from numdcn.warm import _small_calls

PROBLEMS = {
    "plain": Case(2, 33, 40, (33, 31), padding=1, bias=True),
    "masked": Case(1, 33, 34, (61, 62), padding=1, mask=True, bias=True),
    "many_channels": Case(1, 300, 70, (17, 18), padding=1),
    "many_outputs": Case(1, 16, 300, (25, 26), padding=1, bias=True),
    "grouped": Case(2, 72, 48, (41, 40), padding=1, groups=3, offset_groups=4, mask=True),
    "offset_groups": Case(1, 64, 32, (35, 36), padding=1, offset_groups=16, mask=True),
    "depthwise": Case(2, 37, 74, (120, 121), padding=1, groups=37, bias=True),
    "masked_depthwise": Case(1, 64, 64, (160, 161), padding=1, groups=64, offset_groups=8, mask=True),
    "batch": Case(33, 16, 20, (15, 16), padding=1, mask=True, bias=True),
}
TINY = Case(3, 2, 3, (3, 3), padding=1, bias=True)  # too little work for a second thread
SEVERAL = ("plain", "masked", "grouped", "depthwise")


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = numdcn.get_num_threads()
    yield
    numdcn.set_num_threads(before)


def both(problem, **more):
    return problem.forward(cpu()), problem.backward(cpu(), **more)


def assert_same(got, want):
    assert_same_bits(got[0], want[0], "y")
    assert_same_gradients(got[1], want[1])


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_problems_here_are_shared_out(name, monkeypatch):
    """They are large enough for several threads, forward and backward; otherwise the tests below would show nothing."""
    asked = threads_asked_for(monkeypatch)
    numdcn.set_num_threads(7)
    problem = make(PROBLEMS[name], np.float32)
    for direction in ("forward", "backward"):
        asked.clear()
        getattr(problem, direction)(cpu())
        assert max(asked) >= 2, f"{direction}: {asked}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", PROBLEMS)
def test_bits_do_not_depend_on_threads_or_runs(name, dtype):
    problem = make(PROBLEMS[name], dtype)
    numdcn.set_num_threads(1)
    want = both(problem)
    for threads in (1, 2, 3, 7, 2):
        numdcn.set_num_threads(threads)
        assert_same(both(problem), want)


@pytest.mark.parametrize("case", [case for case in (*PROBLEMS.values(), TINY) if case.batch > 1], ids=str)
def test_an_image_does_not_depend_on_the_batch(case):
    """Neither on what the other images hold, nor on whether there are any."""
    problem = make(case, np.float32)
    numdcn.set_num_threads(3)
    y, g = both(problem)
    per_image = ("x", "offsets", "mask", "grad_y")
    for n in (0, problem.x.shape[0] - 1):

        def others_spoilt(field, array, n=n):
            if field not in per_image:
                return array
            return np.where(np.arange(len(array)).reshape(-1, 1, 1, 1) == n, array, np.float32(np.nan))

        def alone(field, array, n=n):
            return array[n : n + 1] if field in per_image else array

        for change, at in ((others_spoilt, n), (alone, 0)):
            y_n, g_n = both(problem.map(change))
            assert_same_bits(y_n[at], y[n], f"y, {change.__name__}")
            for field in {"x", "offsets", "mask"} & set(problem.given()):
                assert_same_bits(getattr(g_n, field)[at], getattr(g, field)[n], f"{field}, {change.__name__}")


@pytest.mark.parametrize("case", [PROBLEMS[name] for name in (*SEVERAL, "many_channels")] + [TINY], ids=str)
def test_a_gradient_does_not_depend_on_what_else_is_wanted(case):
    problem = make(case._replace(mask=True, bias=True), np.float32)
    numdcn.set_num_threads(3)
    whole = problem.backward(cpu())
    for count in range(1, 6):
        for wrt in itertools.combinations(NAMES, count):
            some = problem.backward(cpu(), wrt=wrt)
            for field in NAMES:
                assert (getattr(some, field) is not None) == (field in wrt)
            assert_same_gradients(some, whole, wrt)
    assert_same_gradients(problem.backward(cpu(), wrt="w"), whole, ["w"])
    assert all(gradient is None for gradient in problem.backward(cpu(), wrt=()))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_all_threads_of_a_call_meet(threads):
    """As many as were asked for run a kernel at the same time, also more than there are processors."""
    words = np.zeros(2, np.int64)
    pool.launch(meet, np.float64(1), Meeting(words.ctypes.data, threads), threads)
    assert words.tolist() == [threads, threads]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_kernel_that_goes_wrong_raises(threads):
    words = np.zeros(1, np.int64)
    with pytest.raises(RuntimeError, match="fail"):
        pool.launch(fail, np.float32(1), Meeting(words.ctypes.data, threads), threads)
    test_all_threads_of_a_call_meet(threads)


def test_more_calls_at_once_than_can_have_help():
    """The ones that are too many run alone."""
    numdcn.set_num_threads(2)
    problem = make(PROBLEMS["grouped"], np.float32)
    want = both(problem)
    with ThreadPoolExecutor(70) as executor:
        for result in executor.map(lambda _: both(problem), range(280)):
            assert_same(result, want)


def test_many_python_threads_at_once():
    """Eight threads with different problems; every result has the bits that the problem gives alone."""
    numdcn.set_num_threads(3)
    problems = [make(PROBLEMS[name], dtype) for name in SEVERAL for dtype in (np.float32, np.float64)]
    wanted = [both(problem) for problem in problems]
    start, failures = threading.Barrier(len(problems)), []

    def work(index):
        start.wait()
        for turn in range(6):
            at = (index + turn) % len(problems)
            try:
                assert_same(both(problems[at]), wanted[at])
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit(60))
        assert not thread.is_alive(), "a call hangs"
    assert not failures, failures[0]


def test_the_number_of_threads_changes_while_calls_run():
    problem = make(PROBLEMS["masked"], np.float32)
    want = both(problem)
    with ThreadPoolExecutor(3) as executor:
        calls = [executor.submit(both, problem) for _ in range(12)]
        for threads in (1, 5, 2, 7, 3, 1, 4) * 3:
            numdcn.set_num_threads(threads)
        for call in calls:
            assert_same(call.result(limit(60)), want)


def test_calls_from_the_workers_of_a_pool():
    """A call may come from a thread of any pool, of more threads than processors, also of a pool inside a pool."""
    numdcn.set_num_threads(3)
    problem = make(PROBLEMS["grouped"], np.float32)
    want = both(problem)

    def nested(depth):
        if depth == 0:
            return both(problem)
        with ThreadPoolExecutor(2) as inner:
            return list(inner.map(nested, [depth - 1] * 2))[1]

    with ThreadPoolExecutor(6) as executor:
        for result in executor.map(nested, [0, 1, 2, 0, 1, 2]):
            assert_same(result, want)


def test_set_and_get_num_threads():
    for threads in (1, 3, np.int64(2)):
        numdcn.set_num_threads(threads)
        assert numdcn.get_num_threads() == threads


@pytest.mark.parametrize(
    "value, error",
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), (2.0, TypeError), (True, TypeError), ("2", TypeError)]
    + [(None, TypeError)],
)
def test_set_num_threads_errors(value, error):
    numdcn.set_num_threads(3)
    with pytest.raises(error, match=r"threads|\bn\b") as raised:
        numdcn.set_num_threads(value)
    assert str(value) in str(raised.value)
    assert numdcn.get_num_threads() == 3


SAY_THREADS = "import numdcn; print('threads', numdcn.get_num_threads())"


def test_threads_from_the_environment():
    assert "threads 3" in run_python(SAY_THREADS, NUMDCN_NUM_THREADS=3).stdout


@pytest.mark.parametrize("value", ["zero", "0", "-2", "1.5"])
def test_bad_threads_in_the_environment(value):
    done = run_python(SAY_THREADS, NUMDCN_NUM_THREADS=value, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "NUMDCN_NUM_THREADS" in last and value in last and last.startswith("ValueError"), done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_default_threads_are_the_cpus_of_the_process():
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + SAY_THREADS
    assert "threads 1" in run_python(one, NUMDCN_NUM_THREADS=None).stdout
    got = int(run_python(SAY_THREADS, NUMDCN_NUM_THREADS=None).stdout.split()[1])
    assert 1 <= got <= len(os.sched_getaffinity(0))


def run_program(name, *arguments):
    """One of thread_programs.py with three threads; hanging or dying is a failure."""
    done = run_python(["-m", "thread_programs"], name, *arguments, NUMDCN_NUM_THREADS=3, timeout=150)
    assert f"{name} is right" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("name", ["fork", "fork_of_a_fork", "fork_while_calls_run", "multiprocessing_fork"])
def test_forked_children_work(name):
    run_program(name)


def test_spawned_children_work():
    run_program("multiprocessing_spawn")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_calls_from_a_signal_handler():
    run_program("signal_handler")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_keyboard_interrupt_leaves_the_buffers_alone_and_the_pool_usable(direction):
    run_program("interrupt", direction)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_interrupt_at_any_line(direction):
    """The same, at every line of the library that a call runs through, one after the other."""
    run_program("interrupt_at_every_line", direction)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no user signals")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_signal_handler_that_calls_at_any_line(direction):
    run_program("signal_at_every_line", direction)


def test_an_exception_leaves_the_pool_usable():
    problem = make(PROBLEMS["masked"], np.float32)
    want = both(problem)
    for _ in range(3):
        with pytest.raises(ValueError, match="stride"):
            problem._replace(params={"stride": 0}).forward(cpu())
        assert_same(both(problem), want)


@pytest.mark.parametrize("order", ["registered_first", "registered_last", "first_call", "in_a_daemon_thread"])
def test_a_call_during_interpreter_exit_works_or_fails_cleanly(order):
    done = run_python(["-m", "thread_programs"], "at_exit", order, NUMDCN_NUM_THREADS=3, timeout=60)
    if order == "in_a_daemon_thread":
        assert "leaving" in done.stdout
    else:
        assert "the call at exit was right" in done.stdout or "the call at exit raised" in done.stdout, done.stdout
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("operator", sorted(_small_calls(np.dtype(np.float32))))
def test_a_call_that_is_over_hands_out_no_task(operator, monkeypatch):
    """A helper that comes late takes a number that no kernel may mistake for a task."""
    arguments, keywords = _small_calls(np.dtype(np.float32))[operator]
    numdcn.warmup(operators=operator)
    forward, backward = (getattr(numdcn, f"{operator}_{direction}") for direction in ("forward", "backward"))
    result = forward(*arguments, **keywords)
    y = getattr(result, "y", result)
    kept = {} if operator != "roi_pool" else {"argmax": forward(*arguments, **keywords, return_argmax=True).argmax}
    grads = backward(y, *arguments, **keywords, **kept, wrt="x")

    run = pool.run

    def over(board, code, wide, parameters, counter, helpers):
        for late in (2**62, 2**62 + 1, 2**62 + 1000):
            ctypes.c_int64.from_address(counter).value = late
            assert run(board, code, wide, parameters, counter, 0) == 0

    monkeypatch.setattr(pool, "run", over)
    out = np.full_like(y, 7)
    forward(*arguments, **keywords, out=out)
    assert (out == 7).all()
    if operator != "deform_conv_layer":  # which adds to what its doors filled
        out_x = np.full_like(grads.x, 7)
        backward(y, *arguments, **keywords, **kept, wrt="x", out=type(grads)(x=out_x))
        assert (out_x == 7).all()
