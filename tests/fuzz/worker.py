"""A process that runs problems; a problem that kills or hangs it has failed."""

import faulthandler
import multiprocessing
import traceback

from checks import limit

SECONDS = limit(400)  # limit per problem, including compilation of its kernels


def work(connection):
    """Runs incoming problems, and sends back None or what was wrong."""
    from fuzz.check import check  # needed only in this process

    faulthandler.enable()
    while True:
        try:
            problem = connection.recv()
        except EOFError:
            return
        try:
            check(*problem)
            connection.send(None)
        except Exception:
            connection.send(traceback.format_exc())


class Worker:
    """The process, restarted after a crash."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def run(self, operator, seed):
        """(what was wrong, or None; whether the process is alive)"""
        self.connection.send((operator, seed))
        try:
            if self.connection.poll(SECONDS):
                return self.connection.recv(), True
        except (EOFError, OSError):
            self.process.join(limit(10))
            return f"the process died with exit code {self.process.exitcode}", False
        self.process.kill()
        return f"still running after {SECONDS} s", False
