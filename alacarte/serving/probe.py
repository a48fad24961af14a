"""Processes beside the server that try each version before the server loads it.

They are forked from the server at its start, so that they have all imports and share their memory. They hold no socket and no
database, because the server opens these later. Each process forks a child for each trial.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import sklearn.utils

from alacarte import formats
from alacarte.errors import UserError
from alacarte.formats import probe

NICENESS = 19  # of the trials, so that requests do not wait for them

# A version that hangs occupies one process for a minute. The next version, and the search for a fast path, use the others.
PROCESSES = 3


class WarmProcess:
    """Create it before the server starts a thread. One trial at a time."""

    def __init__(self) -> None:
        self._stopped = False
        self._start("fork" if probe.FORK else "spawn")

    def _start(self, method: str) -> None:
        context: Any = multiprocessing.get_context(method)
        self._pipe, process_end = context.Pipe()
        server_end = self._pipe if method == "fork" else None
        self._process = context.Process(target=_run_trials, args=(process_end, server_end), name="probe")
        self._process.start()
        process_end.close()

    def check(self, folder: Path, trust_code: bool, rehearse: probe.Rehearsal | None = None) -> None:
        """Try a version. Raises UserError as `alacarte.formats.probe.check` does."""
        for _ in range(2):
            try:
                self._pipe.send((str(folder), trust_code, rehearse))
                refusal = self._pipe.recv()
            except (EOFError, OSError):
                if self._stopped:
                    raise UserError("the server stops") from None
                self._process.kill()
                self._process.join()
                self._start("spawn")  # the server has threads now, so a fork is not safe
            else:
                if refusal:
                    raise UserError(refusal)
                return
        raise UserError("the process that tries new versions ended twice")

    def stop(self) -> None:
        """End the process and its trial."""
        self._stopped = True
        self._process.kill()
        self._process.join()


_idle: SimpleQueue[WarmProcess] | None = None


@contextlib.contextmanager
def warm_processes(trust_code: bool) -> Iterator[None]:
    """Keep the processes for `check` while the block runs."""
    global _idle
    with _no_estimator_list(trust_code):
        formats.skops_io()  # imported before the fork, so that its memory is shared
    processes = [WarmProcess() for _ in range(PROCESSES)]
    _idle = SimpleQueue()
    for process in processes:
        _idle.put(process)
    try:
        yield
    finally:
        _idle = None
        for process in processes:
            process.stop()


@contextlib.contextmanager
def _no_estimator_list(trust_code: bool) -> Iterator[None]:
    """Let skops not import every estimator of scikit-learn, which takes 12 MB, for its list of names that it trusts.

    `alacarte.formats` tells skops each name. With trust_code=true, MLflow loads models with skops and needs the list.
    """
    all_estimators = sklearn.utils.all_estimators
    if not trust_code:
        sklearn.utils.all_estimators = list
    try:
        yield
    finally:
        sklearn.utils.all_estimators = all_estimators


def check(folder: Path, trust_code: bool, rehearse: probe.Rehearsal) -> None:
    """Try a version in a process that is idle, from any thread. Raises UserError as `alacarte.formats.probe.check` does."""
    idle = _idle
    if idle is None:
        return probe.check(folder, trust_code, rehearse)
    process = idle.get()
    try:
        process.check(folder, trust_code, rehearse)
    finally:
        idle.put(process)


def _run_trials(pipe: Connection, server_end: Connection | None) -> None:
    """Try one version after the other until the server ends."""
    if server_end:
        server_end.close()  # an open copy would hide the end of the server
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the server, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    formats.skops_io()
    gc.freeze()  # pages that the collector does not write to stay shared with the server
    os.nice(NICENESS)
    with contextlib.suppress(EOFError, OSError, probe.OwnerEnded):
        while True:
            folder, trust_code, rehearse = pipe.recv()
            refusal = None
            try:
                probe.check(folder, trust_code, rehearse, owner=pipe)
            except UserError as error:
                refusal = str(error)
            pipe.send(refusal)
    os._exit(0)
