"""Run steps as child processes: one that is waited for (`Forks`), or one that runs beside this process (`start`).

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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class Child:
    """A step that runs beside this process. `on_line` is called, in a thread, with each line that it prints."""

    def __init__(self, process: subprocess.Popen[str], on_line: Callable[[str], object]) -> None:
        self.lines: list[str] = []
        self._process, self._on_line = process, on_line
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.lines.append(line.rstrip())
            self._on_line(self.lines[-1])

    def has_printed(self, *starts: str, since: int = 0) -> bool:
        """Whether it printed lines with these starts, in this order, after the first `since` lines."""
        lines = iter(self.lines[since:])
        return all(any(line.startswith(start) for line in lines) for start in starts)

    def wait_for(self, start: str) -> str:
        """The first line with this start. RuntimeError with all lines if the step ends or a minute is over before."""
        end = time.monotonic() + 60
        while not self.has_printed(start):
            if time.monotonic() > end or not self.reader.is_alive():
                raise RuntimeError(f"no line {start!r}:\n" + "\n".join(self.lines))
            time.sleep(0.05)
        return next(line for line in self.lines if line.startswith(start))


@contextlib.contextmanager
def start(step: str, cfg: DictConfig, run: Run, on_line: Callable[[str], object]) -> Iterator[Child]:
    """`python -m steps.STEP` with a resolved configuration, in the experiment of `run`; it is stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, **tracking.environment("", run), "PYTHONUNBUFFERED": "1"}
        del env["MLFLOW_RUN_ID"]
        command = [sys.executable, "-m", f"steps.{step}", *launch.save_for(cfg, folder)]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   preexec_fn=end_with_parent)  # fmt: skip
        child = Child(process, on_line)
        try:
            yield child
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            child.reader.join(5)
