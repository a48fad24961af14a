"""What `monitor` costs and how often it is right.

    python -m benchmarks.monitor --trials 200

Cost: the step on 100,000 stored predictions of 30 columns, and on a store without any, which pays for the imports
alone. Alarms: windows of digits that no training saw, as they are and turned by 25 degrees, each judged by what the step
calls, with the settings of conf/monitor/default.yaml; champions of as many different splits as there are rounds.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from alacarte.data.dataset import load_data
from alacarte.feedback import Prediction, Store, request_id
from alacarte.feedback.queries import Labelled, Window
from alacarte.learners.sklearn import SklearnLearner
from alacarte.monitoring.window import compare_window
from alacarte.retraining.champion import Champion
from project.data import load_digits

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = yaml.safe_load((ROOT / "conf/monitor/default.yaml").read_text())
DIGITS = yaml.safe_load((ROOT / "conf/data/digits.yaml").read_text())
COLUMNS = tuple(f"x{i}" for i in range(30))


def run(folder: Path, *command: str) -> tuple[float, float]:
    """Seconds and peak MB of a command that must succeed (monitor may say yes)."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile() as output:
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        took = time.monotonic() - began
        if os.waitstatus_to_exitcode(status) not in (0, 3):
            output.seek(0)
            sys.exit(output.read().decode())
    return took, usage.ru_maxrss / 1024


def fill(url: str, name: str, rows: np.ndarray) -> None:
    """Store one-row predictions of the last hour."""
    store, now = Store(url), time.time_ns()
    for start in range(0, len(rows), 10_000):
        batch = []
        for i, row in enumerate(rows[start : start + 10_000], start):
            at = now - (len(rows) - i) * 10_000_000
            batch.append(
                Prediction(
                    request_id(at, i), at / 1e9, name, "1", 1, COLUMNS, "f8", row.tobytes(), [int(row[0] > 0)], [0.9], 1.0,
                    [0] if i % 20 == 0 else None, 0.05, 1.0,
                )
            )  # fmt: skip
        store.write_predictions(batch)
    store.close()


def cost(n: int, rounds: int) -> None:
    """Print what n predictions cost."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        X = draw.normal(size=(5_000, len(COLUMNS)))
        pd.DataFrame(X, columns=COLUMNS).assign(y=(X[:, 0] > 0).astype(int)).to_csv(folder / "rows.csv", index=False)
        data = ("data=table", f"data.path={folder}/rows.csv", "data.target=y")
        run(folder, "steps.pipeline", "model=sklearn_sgd", *data)
        fill(f"sqlite:///{folder}/full.db", "alacarte", draw.normal(size=(n, len(COLUMNS))))
        figures: dict[str, list[tuple[float, float]]] = {"empty": [], "full": []}
        for number in range(rounds + 1):  # the first warms the disk caches and is not counted
            for store, measurements in figures.items():
                measured = run(
                    folder, "steps.monitor", f"feedback.url=sqlite:///{folder}/{store}.db", f"monitor.rows={n}"
                )
                measurements.extend([measured] if number else [])
    empty, full = (np.median(measurements, axis=0) for measurements in figures.values())
    print(f"| {len(COLUMNS)} columns | s, median | peak MB |\n|---|---|---|")
    print(f"| no prediction stored: the imports | {empty[0]:.1f} | {empty[1]:.0f} |")
    print(f"| {n:,} predictions | {full[0]:.1f} | {full[1]:.0f} |")
    print(f"| difference | {full[0] - empty[0]:.1f} | {full[1] - empty[1]:.0f} |\n")


def windows(champion: Champion, rows: pd.DataFrame, audit: np.ndarray) -> tuple[Window, Labelled]:
    """A window in which rows were asked, and those of `audit` labelled."""
    X, truth = rows.drop(columns="digit").reset_index(drop=True), rows["digit"].to_numpy()
    answered, proba = champion.learner.predict(X), champion.learner.predict_proba(X)
    about = pd.DataFrame(
        {
            "prediction_id": [str(i) for i in range(len(X))], "model_version": "1", "prediction": answered,
            "confidence": 1.0 if proba is None else proba.max(axis=1), "latency_ms": 1.0, "audit": audit,
            "input_schema": "all",
            "label": np.where(audit, truth, None), "is_correction": np.where(audit, truth != answered, None),
        }
    )  # fmt: skip
    nothing = pd.DataFrame(
        columns=["prediction_id", "used_version", "is_correction", "annotator", "source", "state"], dtype=object
    )
    return Window(X, about, {"all": list(X)}), Labelled(X.iloc[:0], pd.Series(dtype=object), nothing)


def alarms(trials: int, size: int, degrees: float) -> None:
    """Print in how many windows of so many rows the decision was to retrain."""
    from sklearn.linear_model import SGDClassifier

    whole = {angle: load_digits(rotate=angle) for angle in (0.0, degrees)}
    output: dict[float, list[bool]] = {angle: [] for angle in whole}
    for number in range(-(-trials // 10)):
        known = {**DIGITS, "split": {**DIGITS["split"], "seed": 100 + number}, "_target_": DIGITS["_target_"]}
        dataset = load_data(**known)
        learner = SklearnLearner(SGDClassifier(loss="log_loss", random_state=number))
        learner.fit(*dataset.part("train"), *dataset.part("val"), task="classification", seed=number)
        champion = Champion("digits", "1", None, learner, known, dataset)  # type: ignore[arg-type]  # nobody loads it
        unseen = np.flatnonzero(dataset.split == "test")
        draw = np.random.default_rng(number)
        for _ in range(10):
            rows, audit = draw.choice(unseen, size, replace=False), draw.random(size) < 0.2
            for angle, table in whole.items():
                window, labelled = windows(champion, table.iloc[rows], audit)
                output[angle].append(compare_window(champion, window, labelled, 0, SETTINGS).decision.retrain)
    for angle, answers in output.items():
        text = f"turned by {angle:g} degrees" if angle else "as they are"
        print(f"| {size} | {text} | {len(answers)} | {100 * np.mean(answers):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000)
    asked = parser.parse_args()
    cost(asked.rows, asked.rounds)
    print("| rows in the window | digits | windows | retrain yes, % |\n|---|---|---|---|")
    for size in (100, 300):
        alarms(asked.trials, size, 25.0)


if __name__ == "__main__":
    main()
