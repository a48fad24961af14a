"""Several worker processes that share a socket: looked after, and stopped within a bounded time."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from socket import socket
from typing import Any

from uvicorn import Config
from uvicorn.supervisors.multiprocess import Multiprocess, Process

REPLACES = "ALACARTE_SERVE_REPLACES"  # set in the environment of a worker that takes the place of one that ended
SILENT = 60.0  # seconds without a sign of life, imports included, after which a worker is killed
GRACE = 20.0  # seconds that workers get to end, beside what their requests in flight get

logger = logging.getLogger(__name__)


class Workers(Multiprocess):
    """uvicorn's, except that it waits for nobody while it looks after them.

    uvicorn asks one worker after the other and waits 5 s for each answer: a worker whose imports take longer is killed
    again and again, and a SIGTERM meanwhile is heard after 5 s for each worker. From the making of this object on, SIGTERM
    and Ctrl-C end `run` in order. `failed`: a worker ended by an error before it served, as the next one would.
    """

    def __init__(self, config: Config, sockets: list[socket]) -> None:
        super().__init__(config, sockets)
        self.failed = False
        self._asked: dict[Process, float] = {}
        self._served: set[Process] = set()

    def init_processes(self) -> None:
        self.processes = [self._start() for _ in range(self.processes_num)]

    def _start(self) -> Process:
        """A worker that does not hear Ctrl-C itself, as this process hears it and ends it in order."""
        resource_tracker.ensure_running()  # now, as it lifts what follows
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process = Process(self.config, self.sockets)
            process.start()
            return process
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

    def keep_subprocess_alive(self) -> None:
        if self.should_exit.is_set():
            return
        for i, process in enumerate(self.processes):
            if process.process.is_alive() and not self._is_silent(process):
                continue
            process.kill()
            process.join()
            self._asked.pop(process, None)
            if process not in self._served and (process.exitcode or 0) > 0:
                self.failed = True
                self.should_exit.set()
                return
            logger.warning(
                "worker %s ended with exit code %s: another one takes its place", process.pid, process.exitcode
            )
            os.environ[REPLACES] = "1"
            self.processes[i] = self._start()

    def _is_silent(self, process: Process) -> bool:
        try:
            while process.parent_conn.poll(0):
                self._asked.pop(process, None)  # SIGHUP makes uvicorn ask too
                if process.parent_conn.recv():
                    self._served.add(process)
            if process not in self._asked:
                process.parent_conn.send(b"ping")
                self._asked[process] = time.monotonic()
        except (OSError, EOFError):
            return True
        return time.monotonic() - self._asked[process] > SILENT

    def join_all(self) -> None:
        end = time.monotonic() + (self.config.timeout_graceful_shutdown or 0) + GRACE
        for process in self.processes:
            process.process.join(max(0.0, end - time.monotonic()))
            if process.process.is_alive():
                logger.warning("worker %s does not end and is killed", process.pid)
                process.process.kill()
                process.process.join()


@contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM or Ctrl-C, beside what these do already, which may come to nothing.

    uvicorn hears them only once its start is over; and an exception that they raise is lost where Python runs a callback of
    its own, such as that of a weak reference.
    """
    told = threading.Event()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def tell(number: int, frame: Any) -> None:
        told.set()
        if callable(before[number]):
            before[number](number, frame)

    for number in before:
        signal.signal(number, tell)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
