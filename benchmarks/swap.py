"""What the trial of a new version costs: the time that it adds to a swap, the latency of requests meanwhile, and memory.

    python benchmarks/swap.py --rounds 10

A server with one small scikit-learn model answers one connection. Each round measures the latency three times: alone, during
trials, and during a busy loop in a process of the same low priority. The busy loop shows what any second process costs.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import mlflow
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "library")]

import learning  # noqa: E402
from conftest import Project, copy_project, tracking  # noqa: E402
from servers import KeptAlive, Served, serving  # noqa: E402

from alacarte.serving import probe  # noqa: E402
from alacarte.serving.model import rehearse_start  # noqa: E402

NAME = "swapped"
SECONDS = 1.0  # of each measurement of latency


def versions(project: Project, count: int) -> Path:
    """Register versions of one model; a local copy of it."""
    X, _ = learning.table("numeric", "classification")
    learner = learning.fitted("sklearn_hgb", "numeric", "classification")
    with tracking(project.uri):
        for _ in range(count):
            with mlflow.start_run():
                mlflow.register_model(learner.log("model", example=X[:5], metadata={}).model_uri, NAME)
        return Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/1", dst_path=str(project.root / "copy")))


def trial_seconds(folder: Path, rounds: int) -> list[float]:
    probe.start(False)
    probe.check(folder, False, rehearse_start)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        probe.check(folder, False, rehearse_start)
        seconds.append(time.perf_counter() - start)
    return seconds


def p99_during(served: Served, load: threading.Thread) -> float:
    """The 99th percentile of the latency in milliseconds, on one connection, while the thread runs."""
    connection, milliseconds = KeptAlive(served.url), []
    body = {"dataframe_split": {"columns": list("abcd"), "data": [[0.1, 0.2, 0.3, 0.4]]}}
    load.start()
    while load.is_alive() or len(milliseconds) < 100:
        start = time.perf_counter()
        connection.ask("/invocations", body)
        milliseconds.append((time.perf_counter() - start) * 1000)
    return statistics.quantiles(milliseconds, n=100)[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as root:
        project = Project(copy_project(Path(root)), f"sqlite:///{root}/mlflow.db")
        folder = versions(project, 1)
        seconds = trial_seconds(folder, rounds)
        print(f"trial: median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
        project.client.set_registered_model_alias(NAME, "champion", "1")
        with serving(project, f"registered_model_name={NAME}") as served:
            served.wait("/status", model_version="1")
            while served.ask("/status").body["path"] == "pyfunc":
                time.sleep(0.1)
            warm = psutil.Process(served.process.pid).children()[0].memory_full_info()
            print(
                f"process that forks the trials: {warm.rss / 1e6:.0f} MB resident, of these {warm.uss / 1e6:.0f} MB of its own"
            )
            ratios: dict[str, list[float]] = {"trials": [], "a busy loop": []}
            for _ in range(rounds):
                alone = p99_during(served, Pause(SECONDS))
                for name, load in (("trials", Trials(folder)), ("a busy loop", BusyLoop())):
                    loaded = p99_during(served, load)
                    ratios[name].append(loaded / alone)
                    print(f"p99 {alone:.2f} ms, during {name} {loaded:.2f} ms", file=sys.stderr)
            for name, values in ratios.items():
                spread = f"{min(values):.2f} to {max(values):.2f}"
                print(f"p99 during {name} to p99 alone: median {statistics.median(values):.2f} ({spread})")


class Pause(threading.Thread):
    """Does nothing for some seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def run(self) -> None:
        time.sleep(self._seconds)


class Trials(threading.Thread):
    """Trials like those of the server, one after the other."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def run(self) -> None:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            probe.check(self._folder, False, rehearse_start)


class BusyLoop(threading.Thread):
    """A process of the lowest priority that only computes."""

    def run(self) -> None:
        code = f"import os, time\nos.nice({probe.NICENESS})\n"
        code += f"end = time.monotonic() + {SECONDS}\nwhile time.monotonic() < end: pass"
        subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
