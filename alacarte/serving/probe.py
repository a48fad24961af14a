"""A process beside the server that forks a child for each trial of a version, before the server loads it.

It is forked from the server at its start, so that it has all imports and shares their memory. It holds no socket and no
database, because the server opens these later.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

from alacarte import formats
from alacarte.errors import UserError
from alacarte.formats import probe

NICENESS = 19  # of the trials, so that requests do not wait for them

_control: socket.socket | None = None  # to the process


def start(trust_code: bool) -> None:
    """Fork the process. Call it before this process starts a thread. It ends when this process ends."""
    global _control
    if not probe.FORK:
        return
    # skops is imported before the fork, so that its memory is shared. MLflow needs its list of all estimators, which takes 12 MB.
    with contextlib.nullcontext() if trust_code else mock.patch("sklearn.utils.all_estimators", list):
        formats.skops_io()
    _control, process_end = socket.socketpair()
    if os.fork() == 0:
        try:
            _control.close()
            _fork_trials(process_end)
        finally:
            os._exit(0)
    process_end.close()


def check(folder: Path, trust_code: bool, rehearse: probe.Rehearsal) -> None:
    """Try a version, from any thread. Raises UserError as `alacarte.formats.probe.check` does."""
    if _control is None:
        probe.check(folder, trust_code, rehearse)
        return
    pipe, trial_end = multiprocessing.Pipe()
    with pipe:
        try:
            with trial_end:
                socket.send_fds(_control, [b" "], [trial_end.fileno()])
            pipe.send((folder, trust_code, rehearse))
            # JSON, because a trial inherits the other end, and a pickle from it could run code here
            refusal = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            raise UserError("the process that tries new versions has ended; restart the server") from None
    if refusal:
        raise UserError(refusal)


def _fork_trials(control: socket.socket) -> None:
    """Fork a process for each connection that arrives, until the server ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the server
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the end of the processes
    gc.freeze()  # pages that the collector does not write to stay shared with the server
    os.nice(NICENESS)
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        with Connection(descriptors[0]) as pipe:
            if os.fork() == 0:
                control.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(pipe)
                return


def _answer(pipe: Connection) -> None:
    """Try the version that the server names, and send the reason if it is refused. Give up if the server ends."""
    with contextlib.suppress(EOFError, OSError, probe.OwnerEnded):
        folder, trust_code, rehearse = pipe.recv()
        refusal = None
        try:
            probe.check(folder, trust_code, rehearse, owner=pipe)
        except UserError as error:
            refusal = str(error)
        pipe.send_bytes(json.dumps(refusal).encode())
