"""Blocks of Numba's GPU simulator without its polling: there a loop asks all threads of a block whether they wait or have
ended, and keeps them from running meanwhile. Here the last thread to arrive at a barrier lets the others go on."""

import sys
import threading

import numpy as np
from numba.cuda.simulator import kernel


class Thread(kernel.BlockThread):
    """A thread of a block."""

    def run(self):
        super().run()  # keeps an exception
        self._manager.end(self.exception)

    def syncthreads(self):
        self._manager.wait()


class Block(kernel.BlockManager):
    """A block of threads. A barrier opens when all that have not ended wait there, as in the simulator."""

    def run(self, grid_point, *args):
        points = list(np.ndindex(*self._block_dim))
        self.running, self.waiting, self.passed, self.failure = len(points), 0, 0, None
        self.changed = threading.Condition()
        threads = [Thread(lambda: self._f(*args), self, grid_point, point, self._debug) for point in points]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure:
            error, traceback = self.failure
            raise error.with_traceback(traceback)

    def wait(self):
        with self.changed:
            self.waiting, turn = self.waiting + 1, self.passed
            self._open()
            self.changed.wait_for(lambda: self.passed != turn or self.failure)
            if self.failure:
                raise RuntimeError("another thread of the block has failed")

    def end(self, exception):
        """A thread has ended; if it failed, those that wait fail too, and the first failure is told."""
        with self.changed:
            self.running, self.failure = self.running - 1, self.failure or exception
            self._open()

    def _open(self):
        if self.failure or self.waiting == self.running:
            self.waiting, self.passed = 0, self.passed + 1
            self.changed.notify_all()


def install():
    """For all launches of this process, whose kernels run in the simulator."""
    sys.setswitchinterval(1e-4)  # threads take turns often, so that a missing barrier shows
    kernel.BlockManager = Block
