"""A saved model is loaded and trained on: each family, numeric and mixed tables, both tasks, round after round."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from learning import FAMILIES, fitted, learner, table
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlops import formats, learners
from mlops.errors import UserError
from mlops.learners.sklearn import SklearnLearner

GOES_ON = {"sklearn_sgd", "sklearn_hgb", "sklearn_mlp", "torch_mlp"}
HOW = {"share": 0.25, "shrink": 0.8, "seed": 0}


def again(made, folder: Path, X: pd.DataFrame):
    made.save(folder, example=X.head(5), metadata={})
    return learners.load(folder)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("kind", ["numeric", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_goes_on_or_says_why_not(family: str, kind: str, task: str, tmp_path: Path) -> None:
    (X, y), (more, truth) = table(kind, task), table(kind, task, seed=1)
    made = again(fitted(family, kind, task), tmp_path / "first", X)
    epochs, before = made.epochs, made.predict(X)
    both, labels = pd.concat([X, more], ignore_index=True), pd.concat([y, truth], ignore_index=True)
    for round_ in range(2):
        update = made.update(both, labels, X[120:], y[120:], init="warm", **HOW)
        assert update.visits == update.epochs * len(both)
        if family in GOES_ON:
            assert (update.init, update.note) == ("warm", None)
            assert update.epochs <= max(1, epochs / 4) and made.epochs == epochs
        else:
            assert update.init == "scratch" and "cannot be trained on" in update.note
        made = again(made, tmp_path / f"round{round_}", X)
    after = made.predict(both)
    if task == "classification":
        assert made.classes == ["high", "low", "mid"] and (after == labels).mean() > 0.6
    else:
        assert 1 - ((after - labels) ** 2).mean() / labels.var() > 0.25
    assert not np.array_equal(before, made.predict(X)) or family == "sklearn"


@pytest.mark.parametrize("family", sorted(GOES_ON))
def test_rows_of_some_classes_leave_the_others_in_their_places(family: str, tmp_path: Path) -> None:
    """Fitting on as many other classes is what silently turns every answer into another class."""
    X, y = table("numeric", "classification")
    made = again(fitted(family, "numeric", "classification"), tmp_path / "model", X)
    some = np.arange(len(y)) < (60 if family == "sklearn_hgb" else 0)  # boosting takes its classes from the rows
    kept = (y != "mid") | some
    made.update(X[kept], y[kept], X[120:], y[120:], init="warm", **HOW)
    assert made.classes == ["high", "low", "mid"]
    assert (made.predict(X) == y)[(y != "mid").to_numpy()].mean() > 0.7


def test_scratch_learns_a_new_class(tmp_path: Path) -> None:
    X, y = table("numeric", "classification")
    new = y.mask(X["c"] > 0.8, "new")
    for family in FAMILIES:
        made = again(fitted(family, "numeric", "classification"), tmp_path / family, X)
        update = made.update(X, new, X, new, init="scratch", **HOW)
        assert update.init == "scratch" and made.classes == ["high", "low", "mid", "new"]
        assert again(made, tmp_path / f"{family}-new", X).classes == made.classes


def test_shrink_perturb_is_for_torch(tmp_path: Path) -> None:
    X, y = table("numeric", "classification")
    made = again(fitted("torch_mlp", "numeric", "classification"), tmp_path / "torch", X)
    assert made.update(X, y, X, y, init="shrink_perturb", **HOW).note is None
    made = again(fitted("sklearn_mlp", "numeric", "classification"), tmp_path / "mlp", X)
    update = made.update(X, y, X, y, init="shrink_perturb", **HOW)
    assert update.init == "warm" and "torch" in update.note


def test_boosting_with_little_regularisation_starts_over() -> None:
    X, y = table("numeric", "classification")
    made = learner("sklearn_hgb", "classification", "model.l2_regularization=1")
    made.fit(X, y, X, y, task="classification", seed=0)
    update = made.update(X, y, X, y, init="warm", **HOW)
    assert update.init == "scratch" and "l2_regularization=10" in update.note


def test_models_of_others_go_on_or_start_over(tmp_path: Path) -> None:
    X, y = table("numeric", "classification")
    for model in (make_pipeline(StandardScaler(), LogisticRegression()), GaussianNB()):
        formats.save_skops(model.fit(X, y), tmp_path / "model.skops")
        made = SklearnLearner.load(tmp_path)
        update = made.update(X, y, X, y, init="warm", **HOW)
        assert update.init == "scratch" and (made.predict(X) == y).mean() > 0.6


def test_a_retraining_that_changes_nothing_is_an_error(tmp_path: Path) -> None:
    X, y = table("numeric", "classification")
    made = learner("sklearn_sgd")
    made.fit(X, y, X, y, task="classification", seed=0)
    made.model[-1].eta0 = 1e-300
    with pytest.raises(UserError, match="changed nothing"):
        made.update(X, y, X, y, init="warm", **HOW)


def test_labels_of_unknown_classes_are_a_mistake_of_the_program() -> None:
    X, y = table("numeric", "classification")
    made = learner("sklearn_sgd")
    made.fit(X, y, X, y, task="classification", seed=0)
    with pytest.raises(AssertionError):
        made.update(X, y.mask(y == "mid", "none"), X, y, init="warm", **HOW)
