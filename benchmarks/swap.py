"""What the trial of a new version costs a server: time of a swap, latency of requests meanwhile, memory.

    python benchmarks/swap.py --rounds 10

A server with one small scikit-learn model answers one connection. Promotions of a new version alternate with pauses of the
same length, so that each round has a pair of latencies.
"""

import argparse
import statistics
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

from alacarte.serving.probe import WarmProcess  # noqa: E402

NAME = "swapped"


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
    warm = WarmProcess()
    try:
        warm.check(folder, False)
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            warm.check(folder, False)
            seconds.append(time.perf_counter() - start)
        return seconds
    finally:
        warm.stop()


def p99_while(served: Served, wait: threading.Event) -> float:
    """Milliseconds of the slowest of 100 requests, one connection, until `wait` is set."""
    connection, took = KeptAlive(served.url), []
    body = {"dataframe_split": {"columns": list("abcd"), "data": [[0.1, 0.2, 0.3, 0.4]]}}
    while not wait.is_set() or len(took) < 100:
        start = time.perf_counter()
        connection.ask("/invocations", body)
        took.append((time.perf_counter() - start) * 1000)
    return statistics.quantiles(took, n=100)[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as root:
        project = Project(copy_project(Path(root)), f"sqlite:///{root}/mlflow.db")
        folder = versions(project, 1)
        seconds = trial_seconds(folder, rounds)
        print(
            f"trial in the warm process: median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
        )
        project.client.set_registered_model_alias(NAME, "champion", "1")
        with serving(project, f"registered_model_name={NAME}") as served:
            served.wait("/status", model_version="1")
            while served.ask("/status").body["path"] == "pyfunc":
                time.sleep(0.1)
            warm = psutil.Process(served.process.pid).children()[0].memory_full_info()
            print(f"warm process: {warm.rss / 1e6:.0f} MB resident, of these {warm.uss / 1e6:.0f} MB of its own")
            ratios = []
            for _ in range(rounds):
                pair = []
                for trial in (False, True):
                    ended = threading.Event()
                    busy = WarmTrial(folder, served, ended) if trial else threading.Timer(max(seconds), ended.set)
                    busy.start()
                    pair.append(p99_while(served, ended))
                    busy.join()
                ratios.append(pair[1] / pair[0])
                print(f"p99 {pair[0]:.2f} ms, during a trial {pair[1]:.2f} ms", file=sys.stderr)
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"p99 during trials to p99 without: median {statistics.median(ratios):.2f} ({spread})")


class WarmTrial(threading.Thread):
    """Trials like the server's, one after the other for a second, in a warm process of its own."""

    def __init__(self, folder: Path, served: Served, ended: threading.Event) -> None:
        super().__init__()
        self._folder, self._ended, self._warm = folder, ended, WarmProcess()

    def run(self) -> None:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            self._warm.check(self._folder, False)
        self._ended.set()
        self._warm.stop()


if __name__ == "__main__":
    main()
