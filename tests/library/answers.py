"""Answers of models that do not exist, verdicts on them and a metric, for the tests of metrics, gate and plots."""

from functools import cache

import numpy as np
import pandas as pd

from alacarte.evaluation.comparison import Comparison, paired_test
from alacarte.evaluation.gate import decide
from alacarte.evaluation.metrics import Metric

LABELS = {
    "str": ["cat", "dog", "emu", "fox"],
    "int": [7, 1, 30, 4],
    "bool": [False, True],
    "float": [0.0, 1.0, 2.0],
}


def example(kind: str, n: int = 200, seed: int = 0):
    """Truth, answers, probabilities and classes of a model that is right most of the time."""
    rng, classes = np.random.default_rng(seed), LABELS[kind]
    truth = rng.integers(0, len(classes), n)
    scores = rng.normal(size=(n, len(classes)))
    scores[np.arange(n), truth] += 2
    proba = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    names = np.array(classes)
    return pd.Series(names[truth]), names[proba.argmax(axis=1)], proba, classes


def zero_one(n: int, won: int, lost: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses of a champion and of a challenger that wins and loses so many of n rows."""
    champion, challenger = np.zeros(n), np.zeros(n)
    champion[:won] = 1
    challenger[won : won + lost] = 1
    return champion, challenger


@cache
def compared(n: int, won: int, lost: int, test: str = "mcnemar") -> Comparison:
    """The paired test where so many of n rows are won and lost."""
    weight = np.ones(n) if test == "bootstrap" else None
    return paired_test(*zero_one(n, won, lost), weight=weight, n_resamples=1000)


def decisions(test: str, n: int, won: float, lost: float, repeats: int) -> dict[str, float]:
    """How often each verdict falls when a row is won and lost with these probabilities."""
    rng, counts = np.random.default_rng(7), {"PROMOTE": 0, "HOLD": 0, "REJECT": 0}
    for _ in range(repeats):
        wins, flips, _ = rng.multinomial(n, [won, lost, 1 - won - lost])
        comparison = compared(n, int(wins), int(flips), test)
        counts[decide({}, task="classification", comparison=comparison).decision] += 1
    return {decision: count / repeats for decision, count in counts.items()}


def brier(y_true, y_pred, y_proba):
    return float(np.mean((y_proba[:, 1] - y_true) ** 2))


OWN = {"brier": Metric("brier", brier, greater_is_better=False)}
