"""Barriers of the simulator as the device server has them (simulated_blocks.py)."""

import re

import device
import numpy as np
import pytest

THREADS, ROUNDS = 7, 50  # as in block_programs.py


@pytest.fixture
def run():
    reason = device.missing("simulator")
    if reason:
        pytest.skip(reason)
    return lambda name, *arguments: device.program("simulator", "block_programs", name, *arguments)


@pytest.mark.parametrize("first", [0, 3, THREADS - 1])
def test_all_that_have_not_ended_meet_at_a_barrier(run, first):
    want = [-1] * first + np.roll(range(first, THREADS), ROUNDS).tolist()
    assert run("passed_on", first).tolist() == [want, want]


@pytest.mark.parametrize("number", [0, 4])
def test_a_thread_that_fails_while_others_wait(run, number):
    with pytest.raises(ValueError, match=re.escape(f"tid=[{number}, 0, 0] ctaid=[0, 0, 0]: the reason")):
        run("failing", number)
    assert (run("passed_on", 0) >= 0).all(), "the next kernel runs"
