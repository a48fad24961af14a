"""A step that goes on beside this one, as a process of its own, and what it prints."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from mlflow.entities import Run
from omegaconf import DictConfig

from alacarte import launch, tracking


class Child:
    """A running step. `on_line` is called, in a thread, with each line that it prints."""

    def __init__(self, process: subprocess.Popen[str], on_line: Callable[[str], object]) -> None:
        self.lines: list[str] = []
        self._process = process
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    def _read(self, on_line: Callable[[str], object]) -> None:
        for line in self._process.stdout or ():
            self.lines.append(line.rstrip())
            on_line(self.lines[-1])

    def has_said(self, *starts: str, since: int = 0) -> bool:
        """Whether it printed lines that start so, in this order, not counting the first `since` lines."""
        lines = iter(self.lines[since:])
        return all(any(line.startswith(start) for line in lines) for start in starts)

    def wait_for(self, start: str, seconds: float = 60) -> str:
        """The first line that starts so; RuntimeError with what it printed where it ends, or the time is over, before."""
        end = time.monotonic() + seconds
        while not self.has_said(start):
            if time.monotonic() > end or (self._process.poll() is not None and not self._reader.is_alive()):
                raise RuntimeError(f"no line {start!r}:\n" + "\n".join(self.lines))
            time.sleep(0.05)
        return next(line for line in self.lines if line.startswith(start))

    def stop(self, seconds: float = 30) -> None:
        """SIGTERM, and SIGKILL where that does not end it in time."""
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self._process.kill()
        self._process.wait()
        self._reader.join(5)


@contextmanager
def started(step: str, cfg: DictConfig, run: Run, on_line: Callable[[str], object]) -> Iterator[Child]:
    """`python -m steps.STEP` with a resolved configuration, in the experiment of `run`; it is stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, **tracking.environment("", run), "PYTHONUNBUFFERED": "1"}
        del env["MLFLOW_RUN_ID"]
        command = [sys.executable, "-m", f"steps.{step}", *launch.save_for(cfg, folder)]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        child = Child(process, on_line)
        try:
            yield child
        finally:
            child.stop()
