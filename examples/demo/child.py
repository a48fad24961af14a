"""A step that runs beside this process, which reads the lines that it prints."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from mlflow.entities import Run
from omegaconf import DictConfig

from alacarte import launch, tracking
from alacarte.processes import end_with_parent


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
