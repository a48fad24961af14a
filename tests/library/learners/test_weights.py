"""A weight per row counts in training, and an estimator that takes none is named."""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from learning import learner, table
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from alacarte.errors import UserError
from alacarte.learners.sklearn import SklearnLearner

TASKS = ("classification", "regression")
FITS = [*product(["sklearn_sgd", "sklearn_hgb", "sklearn_forest", "sklearn_mlp"], TASKS)]
FITS += [("torch_mlp", "classification"), ("keras_mlp", "regression")]


@pytest.mark.parametrize(("family", "task"), FITS)
def test_weights_count_in_training_from_scratch_and_further(family: str, task: str) -> None:
    """Three of four rows are wrong and weigh nothing."""
    X, y = table("numeric", task, rows=200)
    wrong = y.map({"high": "low", "mid": "high", "low": "mid"}) if task == "classification" else 2 * y.mean() - y
    both, targets = pd.concat([X] * 4, ignore_index=True), pd.concat([y, wrong, wrong, wrong], ignore_index=True)
    weight = np.repeat([1.0, 0.0, 0.0, 0.0], len(X))

    def error(made: Any) -> float:
        answers = made.predict(X)
        return (answers != y).mean() if task == "classification" else ((answers - y) ** 2).mean() / y.var()

    made, blind = learner(family, task), learner(family, task)
    made.fit(both, targets, X, y, task=task, seed=0, weight=weight)
    blind.fit(both, targets, X, y, task=task, seed=0)
    assert error(made) < 0.3 < error(blind)
    made.update(both, targets, X, y, init="warm", share=0.5, shrink=0.8, seed=0, weight=weight)
    assert error(made) < 0.3


@pytest.mark.parametrize("task", TASKS)
def test_weights_count_in_the_validation_that_stops_a_training(task: str) -> None:
    """Half of the val rows are wrong and weigh nothing."""
    X, y = table("numeric", task, rows=200)

    def fit(*validation: Any, weight: np.ndarray | None = None) -> pd.DataFrame:
        """The metrics of each epoch."""
        seen: list[dict[str, float]] = []
        how: dict[str, Any] = {"task": task, "seed": 0, "on_epoch": lambda _, metrics: seen.append(metrics)}
        learner("torch_mlp", task).fit(X, y, *validation, val_weight=weight, **how)
        return pd.DataFrame(seen)

    both = pd.concat([X, X]), pd.concat([y, y[::-1].set_axis(y.index)])
    plain, weighted, blind = fit(X, y), fit(*both, weight=np.repeat([1.0, 0.0], 200)), fit(*both)
    for name in plain:
        assert weighted[name].tolist() == pytest.approx(plain[name].tolist(), rel=1e-3)
        assert name == "train_loss" or blind[name].tolist() != pytest.approx(plain[name].tolist(), rel=0.1)


def test_an_estimator_without_weights_is_named() -> None:
    X, y = table("numeric", "classification")
    made = SklearnLearner(make_pipeline(StandardScaler(), KNeighborsClassifier()))
    with pytest.raises(UserError, match=r"data\.weight: KNeighborsClassifier takes no sample_weight"):
        made.fit(X, y, X, y, task="classification", seed=0, weight=np.ones(len(y)))
