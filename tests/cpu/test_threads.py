"""Threads: the same bits whatever their number, and calls from anywhere, at any time, do not disturb each other.

Determinism is tested in this process; forks, signals, interrupts and interpreter exit each in a separate process
(the programs are in thread_programs.py), because a defect there would hang or kill the test run.
"""

import ctypes
import inspect
import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import family
import numpy as np
import pytest
from checks import cpu, limit, run_python, threads_asked_for
from conv_cases import Case
from team_kernels import Meeting, fail, meet
from test_deform_conv import LARGE, NAMES, make

import numdcn
import numdcn._cpu.threads as pool
from numdcn.warm import _small_calls

BACKEND = cpu("deform_conv")
TINY = Case(3, 2, 3, (3, 3), padding=1, bias=True)  # too little work for a second thread
SEVERAL = ("plain", "masked", "grouped", "depthwise")


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = numdcn.get_num_threads()
    yield
    numdcn.set_num_threads(before)


def both(problem, **more):
    return problem.forward(BACKEND), problem.backward(BACKEND, **more)


def assert_same(got, want):
    family.assert_same(got[0], want[0])
    family.assert_same(got[1], want[1])


@pytest.mark.full
@pytest.mark.parametrize("name", LARGE)
def test_the_problems_here_are_shared_out(name, monkeypatch):
    """They are large enough for several threads, forward and backward; otherwise the tests below would prove
    nothing."""
    asked = threads_asked_for(monkeypatch)
    numdcn.set_num_threads(7)
    problem = make(LARGE[name], np.float32)
    for direction in ("forward", "backward"):
        asked.clear()
        getattr(problem, direction)(BACKEND)
        assert max(asked) >= 2, f"{direction}: {asked}"


@pytest.mark.parametrize("case", [case for case in (*LARGE.values(), TINY) if case.batch > 1], ids=str)
def test_an_image_does_not_depend_on_the_batch(case):
    """It depends neither on the contents of the other images nor on whether there are any, with as many threads as
    pay off."""
    numdcn.set_num_threads(3)
    problem = make(case, np.float32)
    family.assert_images_are_independent(BACKEND, problem, [n for n in ("offsets", "mask") if n in problem.given()])


@pytest.mark.parametrize("case", [LARGE[name] for name in (*SEVERAL, "many_channels")] + [TINY], ids=str)
def test_a_gradient_does_not_depend_on_what_else_is_wanted(case):
    problem = make(case._replace(mask=True, bias=True), np.float32)
    numdcn.set_num_threads(3)
    whole = problem.backward(BACKEND)
    for count in range(6):
        for wrt in itertools.combinations(NAMES, count):
            family.assert_same(problem.backward(BACKEND, wrt=wrt), family.only(whole, wrt))
    family.assert_same(problem.backward(BACKEND, wrt="w"), family.only(whole, ["w"]))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_all_threads_of_a_call_meet(threads):
    """As many threads as requested run a kernel at the same time, even more than there are processors."""
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
    """The excess calls run alone."""
    numdcn.set_num_threads(2)
    problem = make(LARGE["grouped"], np.float32)
    want = both(problem)
    with ThreadPoolExecutor(70) as executor:
        for result in executor.map(lambda _: both(problem), range(280)):
            assert_same(result, want)


@pytest.mark.full
def test_many_python_threads_at_once():
    """Eight threads with different problems; every result has the same bits as when the problem runs alone."""
    numdcn.set_num_threads(3)
    problems = [make(LARGE[name], dtype) for name in SEVERAL for dtype in (np.float32, np.float64)]
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
    problem = make(LARGE["masked"], np.float32)
    want = both(problem)
    with ThreadPoolExecutor(3) as executor:
        calls = [executor.submit(both, problem) for _ in range(12)]
        for threads in (1, 5, 2, 7, 3, 1, 4) * 3:
            numdcn.set_num_threads(threads)
        for call in calls:
            assert_same(call.result(limit(60)), want)


def test_calls_from_the_workers_of_a_pool():
    """A call may come from a thread of any pool, with more threads than processors, even of a pool inside a pool."""
    numdcn.set_num_threads(3)
    problem = make(LARGE["grouped"], np.float32)
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
    """A program of thread_programs.py, with three threads; hanging or dying is a failure."""
    done = run_python(["-m", "thread_programs"], name, *arguments, NUMDCN_NUM_THREADS=3, timeout=150)
    assert f"{name} is right" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize(
    "name",
    ["fork", pytest.param("fork_of_a_fork", marks=pytest.mark.full), "fork_while_calls_run", "multiprocessing_fork"],
)
def test_forked_children_work(name):
    run_program(name)


def test_spawned_children_work():
    run_program("multiprocessing_spawn")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_calls_from_a_signal_handler():
    run_program("signal_handler")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
@pytest.mark.parametrize("direction", ["forward", pytest.param("backward", marks=pytest.mark.full)])
def test_keyboard_interrupt_leaves_the_buffers_alone_and_the_pool_usable(direction):
    run_program("interrupt", direction)


@pytest.mark.full
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_interrupt_at_any_line(direction):
    """The same, at every line of the library that a call executes, one after another."""
    run_program("interrupt_at_every_line", direction)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no user signals")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_signal_handler_that_calls_at_any_line(direction):
    run_program("signal_at_every_line", direction)


def test_an_exception_leaves_the_pool_usable():
    problem = make(LARGE["masked"], np.float32)
    want = both(problem)
    for _ in range(3):
        with pytest.raises(ValueError, match="stride"):
            problem._replace(params={"stride": 0}).forward(BACKEND)
        assert_same(both(problem), want)


EXITS = [pytest.param(order, marks=pytest.mark.full) for order in ("registered_last", "first_call")]


@pytest.mark.parametrize("order", ["registered_first", *EXITS, "in_a_daemon_thread"])
def test_a_call_during_interpreter_exit_works_or_fails_cleanly(order):
    done = run_python(["-m", "thread_programs"], "at_exit", order, NUMDCN_NUM_THREADS=3, timeout=60)
    if order == "in_a_daemon_thread":
        assert "leaving" in done.stdout
    else:
        assert "the call at exit was right" in done.stdout or "the call at exit raised" in done.stdout, done.stdout
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("operator", sorted(_small_calls(np.dtype(np.float32))))
def test_a_call_that_is_over_hands_out_no_task(operator, monkeypatch):
    """A helper that arrives late takes a number that no kernel may mistake for a task."""
    arguments, keywords = _small_calls(np.dtype(np.float32))[operator]
    numdcn.warmup(operators=operator)
    forward, backward = (getattr(numdcn, f"{operator}_{direction}") for direction in ("forward", "backward"))
    result = forward(*arguments, **keywords)
    y = getattr(result, "y", result)
    kept = {} if operator != "roi_pool" else {"argmax": forward(*arguments, **keywords, return_argmax=True).argmax}
    image = next(iter(inspect.signature(forward).parameters))
    grads = backward(y, *arguments, **keywords, **kept, wrt=image)

    run = pool.run

    def over(board, code, wide, parameters, counter, helpers):
        for late in (2**62, 2**62 + 1, 2**62 + 1000):
            ctypes.c_int64.from_address(counter).value = late
            assert run(board, code, wide, parameters, counter, 0) == 0

    monkeypatch.setattr(pool, "run", over)
    out = np.full_like(y, 7)
    forward(*arguments, **keywords, out=out)
    assert (out == 7).all()
    if operator != "deform_conv_layer":  # which adds to what its inner calls filled
        kept_out = np.full_like(getattr(grads, image), 7)
        backward(y, *arguments, **keywords, **kept, wrt=image, out=type(grads)(**{image: kept_out}))
        assert (kept_out == 7).all()
