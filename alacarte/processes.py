"""Run steps as processes forked from one that has the heavy imports loaded.

A step is its own process, so that one that dies leaves the pipeline standing; importing mlflow and scikit-learn anew in
each would cost more CPU time than the work. The forking process is itself forked before MLflow opens its store: an open
database or HTTP connection must not be shared across a fork. Where fork is not safe (macOS, Windows) a step is a plain
`python -m`.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

import mlflow
from mlflow.entities import Run
from omegaconf import DictConfig

from alacarte import launch, tracking

FORK = sys.platform == "linux"


class Forks:
    """A process that waits to fork steps. Enter it before anything opens a connection."""

    def __init__(self) -> None:
        if FORK:
            context = multiprocessing.get_context("fork")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._pipe))
            self._process.start()
            theirs.close()

    def run(
        self, module: str, arguments: Sequence[str], env: Mapping[str, str | None], preload: Sequence[str] = ()
    ) -> int:
        """Run `python -m module arguments`; return its exit code as a shell would.

        `env` is added to the environment, where None takes a variable away.
        `preload` names modules to import, and functions (`module:function`) that import more, once before the fork.
        When this process is stopped meanwhile, the step gets SIGTERM first and is waited for, so that it can close its
        run.
        """
        if not FORK:
            whole = {key: value for key, value in {**os.environ, **env}.items() if value is not None}
            return subprocess.run([sys.executable, "-m", module, *arguments], env=whole).returncode
        self._pipe.send((module, list(arguments), dict(env), list(preload)))
        pid = self._pipe.recv()
        try:
            code = self._pipe.recv()
            return code if code >= 0 else 128 - code
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            self._pipe.poll(30)
            raise

    def run_step(self, step: str, cfg: DictConfig, parent: Run, preload: Sequence[str] = ()) -> Run:
        """Run a step as a child of a run; its finished run. SystemExit with the step's exit code where it fails."""
        run_id = tracking.create_child(step, cfg, parent)
        try:
            with tempfile.TemporaryDirectory() as folder:
                arguments = launch.save_for(cfg, folder)
                code = self.run(f"steps.{step}", arguments, tracking.environment(run_id, parent), preload)
        finally:
            tracking.fail(run_id)  # whatever ended the step, its run does not stay RUNNING
        if code:
            caller = parent.data.tags.get("step", "main")
            print(f"{caller}: {step} ended with exit code {code}, see run {run_id}", flush=True)
            raise SystemExit(code)
        return mlflow.get_run(run_id)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        if FORK:
            self._pipe.close()
            self._process.join()


def _serve(pipe: Connection, theirs: Connection) -> None:
    _end_with_parent()
    theirs.close()  # or the end of the pipeline's process would never be seen here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the step itself, as it is in the same group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    context = multiprocessing.get_context("fork")
    while True:
        try:
            module, arguments, env, preload = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        for name in preload:
            loaded = pkgutil.resolve_name(name)
            if callable(loaded):
                loaded()
        process = context.Process(target=_step, args=(module, arguments, env))
        process.start()
        pipe.send(process.pid)
        process.join()
        assert process.exitcode is not None
        try:
            pipe.send(process.exitcode)
        except (BrokenPipeError, ConnectionResetError):  # the pipeline is gone
            return


def _end_with_parent() -> None:
    """SIGTERM for this process when the one that forked it is killed: nobody would wait for what it does."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _step(module: str, arguments: list[str], env: dict[str, str | None]) -> None:
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for key, value in env.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
