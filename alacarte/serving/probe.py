"""Processes beside the server that try each version before the server loads it.

Each is forked from the server at the server's start, so that it has all imports and shares their memory. It forks a child for
each version, one at a time. It holds no socket and no database, because it is forked before the server opens them.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from alacarte import formats
from alacarte.errors import UserError
from alacarte.formats import probe

NICENESS = 19  # of the trials, so that requests do not wait for them


class WarmProcess:
    """Start it before the server opens anything and starts a thread. `check` may be called from several threads."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._stopping = False
        self._start("fork" if probe.FORK else "spawn")

    def _start(self, method: str) -> None:
        context: Any = multiprocessing.get_context(method)
        self._pipe, theirs = context.Pipe()
        ours = self._pipe if method == "fork" else None
        self._process = context.Process(target=_serve, args=(theirs, ours), name="probe")
        self._process.start()
        theirs.close()

    def check(self, folder: Path, trust_code: bool, rehearse: probe.Rehearsal | None = None) -> None:
        """Let a version be tried. UserError, as by `alacarte.formats.probe.check`, for one that should not be loaded."""
        with self._turn:
            refusal = self._ask(folder, trust_code, rehearse)
        if refusal:
            raise UserError(refusal)

    def _ask(self, folder: Path, trust_code: bool, rehearse: probe.Rehearsal | None) -> str | None:
        for _ in range(2):
            try:
                self._pipe.send((str(folder), trust_code, rehearse))
                return self._pipe.recv()
            except (EOFError, OSError):
                if self._stopping:
                    return "the server stops"
            self._process.kill()
            self._process.join()
            self._start("spawn")  # by now the server has threads, with which a fork is not safe
        return "the process that tries new versions ended twice"

    def stop(self) -> None:
        """End the process, and with it a trial that is going on."""
        self._stopping = True
        self._process.kill()
        self._process.join()


# Two processes: the search for a fast path takes seconds, and a version that shall serve must not wait for it.
_starts: WarmProcess | None = None
_searches: WarmProcess | None = None


@contextlib.contextmanager
def warm_processes() -> Iterator[None]:
    """Keep the processes for `check_start` and `check_search` while the block runs."""
    global _starts, _searches
    formats.skops_io()  # needed here soon, and shared when it is loaded before the fork
    _starts, _searches = WarmProcess(), WarmProcess()
    try:
        yield
    finally:
        for process in (_starts, _searches):
            process.stop()
        _starts = _searches = None


def check_start(folder: Path, trust_code: bool, rehearse: probe.Rehearsal) -> None:
    """Try a version before it serves. Raises as `formats.probe.check`."""
    (_starts or probe).check(folder, trust_code, rehearse)


def check_search(folder: Path, rehearse: probe.Rehearsal) -> None:
    """Try the search for a fast path before the server does it. Raises as `formats.probe.check`."""
    (_searches or probe).check(folder, False, rehearse)


def _serve(pipe: Connection, server_end: Connection | None) -> None:
    """Try one version after the other until the server ends."""
    if server_end:
        server_end.close()  # an open copy here would hide the server's end
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
