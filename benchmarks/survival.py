"""The trials of the tests in SUITES at full size, and the time of a swap; prints the figures.

    python benchmarks/survival.py

Takes about ten minutes. A swap is timed from the call that sets the alias over REST to the first answer by the new version.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

TESTS = Path(__file__).resolve().parent.parent / "tests" / "library"
sys.path[:0] = [str(TESTS), str(TESTS.parent.parent)]
SUITES = [str(TESTS / "serving" / name) for name in ("test_survival.py", "test_fuzz.py")]
POLLS = {"webhooks": 600.0, "polling every 0.5 s": 0.5, "polling every 5 s": 5.0}


def trials() -> int:
    os.environ["FULL_SIZE"] = "1"
    print("trials:", *SUITES, flush=True)
    return pytest.main([*SUITES, "-s", "-p", "no:cacheprovider"])


def swap_times(count: int) -> None:
    """Print p50 and p95 of `count` swaps between two scikit-learn models, one connection asking without pause."""
    from conftest import Project, copy_project
    from registries import own_registry
    from servers import ROWS, KeptAlive, register_constant, serving

    with tempfile.TemporaryDirectory() as folder, own_registry(
        Path(folder), MLFLOW_WEBHOOK_ALLOWED_SCHEMES="http,https", MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS="true",
        MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=Fernet.generate_key().decode(), MLFLOW_WEBHOOK_CACHE_TTL="0",
    ) as registry:  # fmt: skip
        project = Project(copy_project(Path(folder) / "project"), registry.uri)
        for way, poll in POLLS.items():
            # A version of its own each time: none is in the cache, none is ready.
            for fresh in (True, False):
                name = f"{way} {fresh}".replace(" ", "-").replace(".", "-")
                versions = [
                    register_constant(project, name, 1, champion=i == 0) for i in range(count + 1 if fresh else 2)
                ]
                arguments = (f"registered_model_name={name}", f"serve.poll_seconds={poll}", f"serve.cache=.{name}",
                             f"serve.webhook={str(poll > 10).lower()}", f"feedback.url=sqlite:///{name}.db")  # fmt: skip
                with serving(project, *arguments) as served:
                    served.wait()
                    time.sleep(2)
                    times, calls, connection = [], [], KeptAlive(served.url)
                    for swap in range(1, count + 1):
                        version = versions[swap % len(versions)]
                        start = time.monotonic()
                        project.client.set_registered_model_alias(name, "champion", version)
                        calls.append(time.monotonic() - start)
                        while connection.ask("/invocations", ROWS).body["model_version"] != version:
                            pass
                        times.append(time.monotonic() - start)
                        time.sleep(1.0)
                what = "a version never seen" if fresh else "back to the version before"
                print(f"figure: swap, {way}, {what}: {spread(times)} over {count} swaps; the call itself: {spread(calls)}",
                      flush=True)  # fmt: skip


def spread(seconds: list[float]) -> str:
    p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1]
    return f"p50 {statistics.median(seconds) * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms"


if __name__ == "__main__":
    code = trials() if "--swaps" not in sys.argv else 0
    swap_times(20)
    sys.exit(code)
