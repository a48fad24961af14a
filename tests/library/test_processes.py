"""Steps as child processes: they end with the process that started them, also when that one is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import copy_project, environment
from registries import until

SLOW = """
import os, pathlib, time
pathlib.Path("pid").write_text(str(os.getpid()))
print("ready", flush=True)
time.sleep(600)
"""
WAITED_FOR = """
from alacarte.processes import Forks
with Forks() as forks:
    raise SystemExit(forks.run("steps.slow", [], {}))
"""
BESIDE = """
from types import SimpleNamespace
from omegaconf import OmegaConf
from examples.demo.child import start
run = SimpleNamespace(info=SimpleNamespace(experiment_id="0"))
with start("slow", OmegaConf.create({}), run, print) as child:
    child.wait_for("ready")
    print(child.has_printed("ready"), child.has_printed("ready", since=1), flush=True)
    while True:
        signal.pause()
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


HALT = """
import os, signal
def after_fork():
    os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGSTOP))
"""


@contextmanager
def slow_step(root: Path, program: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A program that started a step, and the number of the step's process, which must then have ended."""
    copy_project(root)
    (root / "steps" / "slow.py").write_text(SLOW)
    (root / "steps" / "halt.py").write_text(HALT)
    stop = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    process, file = subprocess.Popen([sys.executable, "-c", stop + program], cwd=root, env=environment()), root / "pid"
    try:
        until(lambda: file.exists() and file.read_text())
        pid = int(file.read_text())
        yield process, pid
        until(lambda: not is_running(pid))
    finally:
        process.kill()


@pytest.mark.parametrize("program", [WAITED_FOR, BESIDE], ids=["waited for", "beside"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_step_ends_with_the_process_that_started_it(tmp_path: Path, program: str, number: int):
    with slow_step(tmp_path, program) as (process, _):
        process.send_signal(number)
        assert process.wait(60) == (143 if number == signal.SIGTERM else -number)


def test_a_signal_while_a_step_starts_ends_it(tmp_path: Path):
    """The step runs, and the process that waits for it has not heard of it yet."""
    with slow_step(tmp_path, WAITED_FOR.replace("{})", '{}, ["steps.halt:after_fork"])')) as (process, pid):
        forking = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        process.terminate()
        time.sleep(0.5)
        os.kill(forking, signal.SIGCONT)
        assert process.wait(60) == 143
