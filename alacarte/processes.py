"""Run steps as child processes, and wait for them.

Importing mlflow and scikit-learn again in each step would cost more CPU time than the work itself. So `Forks` forks steps
from a process that has these imports loaded. It starts before MLflow opens its store, because an open database or HTTP
connection must not be shared across a fork. Where fork is not safe (macOS, Windows) a step is a plain `python -m`.
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
from multiprocessing.connection import Connection, wait

import mlflow
from mlflow.entities import Run
from omegaconf import DictConfig

from alacarte import launch, tracking

FORK = sys.platform == "linux"
LIBC = ctypes.CDLL(None) if FORK else None
PR_SET_PDEATHSIG = 1  # of Linux's prctl
STOP_SECONDS = 30  # for a step to close its run


class Forks:
    """A process that waits to fork steps. Enter it before anything opens a connection."""

    def __enter__(self) -> "Forks":
        if FORK:
            context = multiprocessing.get_context("fork")
            self._pipe, other_end = context.Pipe()
            self._process = context.Process(target=_serve, args=(other_end, self._pipe))
            self._process.start()
            other_end.close()
        return self

    def __exit__(self, *_: object) -> None:
        if FORK:
            self._pipe.close()
            self._process.join()

    def run(
        self, module: str, arguments: Sequence[str], env: Mapping[str, str | None], preload: Sequence[str] = ()
    ) -> int:
        """Run `python -m module arguments` and return its exit code, as a shell would.

        `env` is added to the environment; None removes a variable. `preload` names modules to import, and functions
        (`module:function`) to call, once before the fork. If this process is stopped, the step gets SIGTERM and has
        30 seconds to close its run.
        """
        if not FORK:
            complete = {key: value for key, value in {**os.environ, **env}.items() if value is not None}
            return subprocess.run([sys.executable, "-m", module, *arguments], env=complete).returncode
        self._pipe.send((module, list(arguments), dict(env), list(preload)))
        try:
            code = self._pipe.recv()
        except BaseException:  # a signal, at any moment
            self._pipe.close()
            self._process.join()
            raise
        return code if code >= 0 else 128 - code

    def run_step(self, step: str, cfg: DictConfig, parent: Run, preload: Sequence[str] = ()) -> Run:
        """Run a step as a child run of `parent`; return its finished run. SystemExit with its exit code if it fails."""
        run_id = tracking.create_child(step, cfg, parent)
        try:
            with tempfile.TemporaryDirectory() as folder:
                arguments = launch.save_for(cfg, folder)
                code = self.run(f"steps.{step}", arguments, tracking.environment(run_id, parent), preload)
        finally:
            tracking.fail(run_id)  # a run that the step did not close must not stay RUNNING
        if code:
            caller = parent.data.tags.get("step", "main")
            print(f"{caller}: {step} ended with exit code {code}, see run {run_id}", flush=True)
            raise SystemExit(code)
        return mlflow.get_run(run_id)


def _serve(pipe: Connection, other_end: Connection) -> None:
    end_with_parent()
    other_end.close()  # otherwise this process would not notice the end of the pipeline's process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the step itself, which is in the same group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):  # the pipeline's process has ended
        while True:
            module, arguments, env, preload = pipe.recv()
            for name in preload:
                loaded = pkgutil.resolve_name(name)
                if callable(loaded):
                    loaded()
            process = multiprocessing.get_context("fork").Process(target=_run_module, args=(module, arguments, env))
            process.start()
            if pipe in wait([process.sentinel, pipe]):  # it was closed: nobody waits for the step any more
                process.terminate()
                process.join(STOP_SECONDS)
                process.kill()
            process.join()
            pipe.send(process.exitcode)


def _run_module(module: str, arguments: list[str], env: dict[str, str | None]) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update({key: value for key, value in env.items() if value is not None})
    for key in (key for key, value in env.items() if value is None):
        os.environ.pop(key, None)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def end_with_parent() -> None:
    """Let this process get SIGTERM when its parent is killed, because nobody waits for its result. Linux only."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
