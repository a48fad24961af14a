"""Permutation importance: how much worse a model answers when the values of one input column are shuffled."""

import time

import numpy as np
import pandas as pd

from alacarte.evaluation.metrics import Metrics, answer, is_lower_better, measure_one
from alacarte.learners import Learner

ROWS, REPEATS = 500, 5  # of the random sample, and of each shuffle
SECONDS = 1.0  # of CPU time for all columns: many columns or a slow model get fewer repeats
MOST_SECONDS = 10.0  # a single repeat that takes longer is left out


def column_importance(
    learner: Learner,
    X: pd.DataFrame,
    y: pd.Series,
    metric: str | None = None,
    metrics: Metrics | None = None,
    weight: np.ndarray | None = None,
) -> tuple[pd.DataFrame, str] | None:
    """A row for each column of X (n rows): column, importance, standard_deviation; the largest first. And the metric's name.

    The metric is log_loss, or accuracy without probabilities, or R2, if no other is given. None if it would take too long.
    """
    from sklearn.inspection import permutation_importance

    rows = np.random.default_rng(0).permutation(len(X))[:ROWS]
    X, y, weight = X.iloc[rows], y.iloc[rows], None if weight is None else weight[rows]
    has_proba = learner.predict_proba(X) is not None
    name = metric or ("r2" if learner.task == "regression" else "log_loss" if has_proba else "accuracy")
    sign = -1 if is_lower_better(name, metrics) else 1

    def score(model: Learner, table: pd.DataFrame, truth: pd.Series, sample_weight: np.ndarray | None = None) -> float:
        return sign * measure_one(answer(model, table, truth, sample_weight), name, metrics)

    start = time.process_time()
    score(learner, X, y, weight)
    seconds = (time.process_time() - start) * X.shape[1]
    if seconds > MOST_SECONDS:
        return None
    repeats = min(REPEATS, max(1, int(SECONDS / max(seconds, 1e-6))))
    result = permutation_importance(
        learner, X, y, scoring=score, n_repeats=repeats, random_state=0, sample_weight=weight
    )
    columns = {"column": X.columns, "importance": result.importances_mean, "standard_deviation": result.importances_std}
    table = pd.DataFrame(columns).sort_values("importance", ascending=False, ignore_index=True, kind="stable")
    return table, name
