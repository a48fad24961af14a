"""How fast `serve` is beside `mlflow models serve`, BentoML and LitServe: same model, same request, all in one run.

    python benchmarks/serving.py --seconds 5 --rounds 3

Needs wrk (apt-get install wrk). Every server runs alone on 2 cores with one process; ours checks the schema, stores every
prediction and counts, and is measured once its fast path is in use, a second or two after its first answer. It follows the
registry of an `mlflow server`, which runs beside all of them. A cell is the median over rounds of the ratio to mlflow's requests
per second in the same round.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.models import infer_signature
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from alacarte import formats  # noqa: E402
from alacarte.features import TABULAR  # noqa: E402
from project.data import load_digits  # noqa: E402
from project.features import make_features  # noqa: E402

TRUSTED = ["numpy.asarray", "numpy.dtype", "pandas.NA", "project.features.add_sums"]
BIN = Path(sys.executable).parent
PORT = 5099
URL = f"http://127.0.0.1:{PORT}"
CELLS = [("numeric", 1, 1), ("numeric", 1, 8), ("numeric", 1, 64), ("numeric", 1000, 8),
         ("mixed", 1, 1), ("mixed", 1, 8), ("mixed", 1, 64), ("own", 1, 1), ("own", 1, 8), ("own", 1, 64)]  # fmt: skip


def tables() -> dict[str, tuple[pd.DataFrame, object]]:
    """Per kind the rows and a fitted model: "mixed" has features=tabular, "own" a function of project/features.py."""
    numeric, target = load_breast_cancer(return_X_y=True, as_frame=True)
    scaled = make_pipeline(StandardScaler(), LogisticRegression()).fit(numeric, target)
    random = np.random.default_rng(0)
    n = 1000
    mixed = pd.DataFrame(
        {
            **{f"number_{i}": random.normal(size=n) for i in range(6)},
            **{f"word_{i}": random.choice(["red", "green", "blue", "grey"], n) for i in range(4)},
        }
    )
    mixed.loc[::7, "number_0"] = np.nan
    columns, inputs = TABULAR.fit_transform(mixed)
    label = (mixed["number_1"] + (mixed["word_0"] == "red") > 0).astype(int)
    digits = load_digits()
    pixels, digit = digits.drop(columns="digit"), digits["digit"]
    return {
        "own": (pixels, make_pipeline(make_features(), LogisticRegression(max_iter=500)).fit(pixels, digit)),
        "numeric": (numeric, scaled),
        "mixed": (mixed, make_pipeline(columns, LogisticRegression().fit(inputs, label))),
    }


def log(folder: Path) -> None:
    """The models in a registry in `folder`, and their requests as files for wrk."""
    formats.skops_io()  # lets skops hold pandas.NA
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment(
        experiment_id=mlflow.create_experiment("serving", artifact_location=str(folder / "artifacts"))
    )
    for name, (rows, model) in tables().items():
        info = mlflow.sklearn.log_model(
            model, name="model", signature=infer_signature(rows, model.predict(rows)), input_example=rows.head(5),
            serialization_format="skops", skops_trusted_types=TRUSTED,
            pip_requirements=["scikit-learn"], registered_model_name=name,
            code_paths=[str(ROOT / "project")] if name == "own" else None,
        )  # fmt: skip
        mlflow.MlflowClient().set_registered_model_alias(name, "champion", info.registered_model_version)
        path = Path(mlflow.artifacts.download_artifacts(info.model_uri, dst_path=str(folder / name)))
        shutil.copytree(path, folder / f"{name}_model", dirs_exist_ok=True)
        for count in (1, 1000):
            sample = rows.sample(count, replace=True, random_state=0)
            body = {"dataframe_split": json.loads(sample.to_json(orient="split", index=False))}
            (folder / f"{name}_{count}.json").write_text(json.dumps(body))
            script = (
                f"local f = io.open('{folder}/{name}_{count}.json')\nwrk.body = f:read('*a')\nwrk.method = 'POST'\n"
            )
            (folder / f"{name}_{count}.lua").write_text(script + "wrk.headers['Content-Type'] = 'application/json'\n")


@contextmanager
def running(command: list[str], folder: Path, **more: str) -> Iterator[subprocess.Popen]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true", **more}
    if answers():
        sys.exit(f"another server listens on port {PORT}: end it first")
    env["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{env['PATH']}"
    with (folder / "server.log").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        while answers():  # no child of it may go on answering in the next one's place
            time.sleep(0.1)


def answers(port: int = PORT) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait(body: bytes, folder: Path) -> list:
    """Wait for the first right answer; return its predictions."""
    for _ in range(240):
        try:
            request = urllib.request.Request(f"{URL}/invocations", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.loads(answer.read())["predictions"]
        except OSError:
            time.sleep(0.25)
    sys.exit(f"no answer:\n{(folder / 'server.log').read_text()[-3000:]}")


def wait_for_fast_path() -> None:
    """Wait until `serve` uses its fast path, which the parity check allows."""
    for _ in range(240):
        with urllib.request.urlopen(f"{URL}/status", timeout=10) as answer:
            if json.load(answer)["path"] != "pyfunc":
                return
        time.sleep(0.25)
    sys.exit("serve stays on pyfunc")


def load(script: Path, connections: int, seconds: float) -> tuple[float, float]:
    """Requests per second, and the 99th percentile of the latency in ms; every answer must be a 200."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "30s", "-s", str(script)]
    text = subprocess.run([*command, f"{URL}/invocations"], capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        sys.exit(f"{script.name} at {connections} connections:\n{text}")
    units = {"us": 1e-3, "ms": 1.0, "s": 1e3}
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert p99 and rate, text
    return float(rate[1]), float(p99[1]) * units[p99[2]]


def memory(group: int) -> float:
    """Megabytes of the largest process of a group, with all that it shares, and of the others without what they share."""
    kilobytes: list[tuple[int, int]] = []  # all, and not shared
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[2]) == group:
                lines = re.findall(r"^(\w+):\s+(\d+) kB", stat.with_name("smaps_rollup").read_text(), re.M)
                size = {name: int(number) for name, number in lines}
                kilobytes.append((size["Rss"], size["Private_Clean"] + size["Private_Dirty"]))
    largest, own = max(kilobytes)
    return (largest - own + sum(private for _, private in kilobytes)) / 1000


def others() -> Path:
    """The environment with BentoML and LitServe, made once."""
    folder = ROOT / "build" / "serving-env"
    if not (folder / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        requirements = str(ROOT / "benchmarks" / "requirements.txt")
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", "-r", requirements], check=True)
        (folder / "done").touch()
    return folder / "bin"


@contextmanager
def registry(folder: Path) -> Iterator[str]:
    """A tracking server with the models in `folder`; yields its address."""
    command = [str(BIN / "mlflow"), "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    with (folder / "registry.log").open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(PORT + 1)], cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while not answers(PORT + 1) and process.poll() is None:
            time.sleep(0.1)
        yield f"http://127.0.0.1:{PORT + 1}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def commands(
    kind: str, folder: Path, registry_uri: str, bin_of_others: Path | None
) -> dict[str, tuple[list[str], dict[str, str]]]:
    model = str(folder / f"{kind}_model")
    env = {
        "SERVING_MODEL": f"{model}/model.skops",
        "SERVING_FRAME": str(int(kind == "mixed")),
        "SERVING_PORT": str(PORT),
    }
    serve = [sys.executable, "-m", "steps.serve", f"registered_model_name={kind}", f"serve.port={PORT}"]
    serve += [f"feedback.url=sqlite:///{folder}/feedback.db", f"serve.cache={folder}/cache"]
    servers = {
        "mlflow": (
            [str(BIN / "mlflow"), "models", "serve", "-m", model, "--env-manager", "local", "--port", str(PORT)],
            {},
        ),
        "serve": (serve, {"MLFLOW_TRACKING_URI": registry_uri}),
    }
    if bin_of_others and kind != "own":
        bento = [str(bin_of_others / "bentoml"), "serve", "benchmarks.serving_bentoml:Model", "--port", str(PORT)]
        servers["BentoML"] = ([*bento, "--host", "127.0.0.1"], {**env, "BENTOML_DO_NOT_TRACK": "true"})
        servers["LitServe"] = ([str(bin_of_others / "python"), "benchmarks/serving_litserve.py"], env)
    return servers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=5, help="of load per cell")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="leave BentoML and LitServe out")
    options = parser.parse_args()
    bin_of_others = None if options.alone else others()
    rates: dict[tuple, list[dict[str, float]]] = {cell: [] for cell in CELLS}
    slowest: dict[tuple, list[dict[str, float]]] = {cell: [] for cell in CELLS}
    megabytes: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        log(folder)
        registry_uri = stack.enter_context(registry(folder))
        for _ in range(options.rounds):
            for kind in dict.fromkeys(cell[0] for cell in CELLS):
                cells = [cell for cell in CELLS if cell[0] == kind]
                for cell in cells:
                    rates[cell].append({})
                    slowest[cell].append({})
                expected = None
                for name, (command, more) in commands(kind, folder, registry_uri, bin_of_others).items():
                    print(f"{name}, {kind}", file=sys.stderr)
                    with running(command, folder, **more) as process:
                        labels = wait((folder / f"{kind}_1000.json").read_bytes(), folder)
                        expected = expected or labels
                        assert labels == expected, f"{name} does not answer as mlflow does"
                        if name == "serve":
                            wait_for_fast_path()
                        load(folder / f"{kind}_1.lua", 8, 1)
                        for cell in cells:
                            rate, p99 = load(folder / f"{kind}_{cell[1]}.lua", cell[2], options.seconds)
                            rates[cell][-1][name], slowest[cell][-1][name] = rate, p99
                        megabytes.setdefault(name, []).append(memory(process.pid))

    names = list(megabytes)
    print(
        "| inputs | rows | connections | "
        + " | ".join(f"{name}, requests/s" for name in names)
        + " | serve to mlflow | p99 to mlflow |"
    )
    print("|---|---|---|" + "---|" * (len(names) + 2))
    for cell in CELLS:
        figures = " | ".join(
            f"{statistics.median(rate[name] for rate in rates[cell]):,.0f}" if name in rates[cell][0] else ""
            for name in names
        )
        ratio = statistics.median(rate["serve"] / rate["mlflow"] for rate in rates[cell])
        late = statistics.median(p99["serve"] / p99["mlflow"] for p99 in slowest[cell])
        print(f"| {cell[0]} | {cell[1]} | {cell[2]} | {figures} | {ratio:.1f} | {late:.3f} |")
    print(
        "\nmemory in MB: " + ", ".join(f"{name} {statistics.median(values):.0f}" for name, values in megabytes.items())
    )


if __name__ == "__main__":
    main()
