"""How often the gate accepts a first champion that learned from noise, and one that learned a real signal.

    python benchmarks/gate.py --noise 200 --signal 50

Each trial draws a table of 6,000 rows, trains a model on three quarters of them, and judges it on the rest with the code of
`evaluate`. The rule "accuracy or R2 beats a constant answer" is printed beside it.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.svm import LinearSVC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alacarte.evaluation.comparison import measure_signal
from alacarte.evaluation.gate import decide
from alacarte.evaluation.metrics import Answers, make_answers, measure_one

ROWS, COLUMNS = 6_000, 8
Draw = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def classes(*shares: float) -> Draw:
    """Classes with these shares, that depend on `score` (n,) if it varies."""

    def draw(rng: np.random.Generator, score: np.ndarray) -> np.ndarray:
        noisy = score + rng.logistic(size=len(score))
        return np.searchsorted(np.quantile(noisy, np.cumsum(shares)[:-1]), noisy)

    return draw


CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: LogisticRegression(),
    "weighted linear": lambda: LogisticRegression(class_weight="balanced"),
    "boosted": lambda: HistGradientBoostingClassifier(max_iter=50),
    "no probabilities": lambda: LinearSVC(class_weight="balanced"),
}
REGRESSORS: dict[str, Callable[[], Any]] = {
    "linear": lambda: Ridge(),
    "boosted": lambda: HistGradientBoostingRegressor(max_iter=50),
}
CASES: dict[str, tuple[Draw, dict[str, Callable[[], Any]], float]] = {  # and the strength of the signal
    "balanced, weak signal": (classes(0.5, 0.5), CLASSIFIERS, 0.3),
    "2.5 % positives": (classes(0.975, 0.025), CLASSIFIERS, 1.0),
    "three classes": (classes(0.6, 0.3, 0.1), CLASSIFIERS, 0.5),
    "regression": (lambda rng, score: score + rng.normal(size=len(score)), REGRESSORS, 0.2),
}


def accepted(case: str, model: str, signal: bool, seed: int) -> tuple[bool, bool]:
    """Whether a first champion is accepted, and whether it beats a constant answer."""
    draw, models, strength = CASES[case]
    rng = np.random.default_rng([seed, signal])
    X = rng.normal(size=(ROWS, COLUMNS))
    y = draw(rng, strength * X[:, 0] * signal)
    task, n = "regression" if models is REGRESSORS else "classification", ROWS // 4
    fitted = models[model]().fit(X[n:], y[n:])
    proba = fitted.predict_proba(X[:n]) if hasattr(fitted, "predict_proba") else None
    labels = None if task == "regression" else sorted(set(y.tolist()))
    answers = make_answers(y[:n], fitted.predict(X[:n]), proba, labels, task)
    verdict = decide({}, task=task, signal=measure_signal(answers, pd.Series(y[n:]), seed=seed))
    constant = y[n:].mean() if task == "regression" else np.bincount(y[n:]).argmax()
    return verdict.decision == "PROMOTE", value(answers) > value(
        make_answers(y[:n], np.full(n, constant), None, labels, task)
    )


def value(answers: Answers) -> float:
    return measure_one(answers, "r2" if answers.task == "regression" else "accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=int, default=200, help="repetitions without a signal")
    parser.add_argument("--signal", type=int, default=50, help="repetitions with a signal")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        "accepted, % of noise / % of signal\n\n| data | model | the gate | better than a constant answer |\n|---|---|---|---|"
    )
    for case, (_, models, _) in CASES.items():
        for model in models:
            shares = []
            for signal, repeats in ((False, options.noise), (True, options.signal)):
                trials = [accepted(case, model, signal, seed) for seed in range(repeats)]
                shares.append(100 * np.mean(trials, axis=0))
            (noise, noise_constant), (real, real_constant) = shares
            print(
                f"| {case} | {model} | {noise:.1f} / {real:.0f} | {noise_constant:.1f} / {real_constant:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
