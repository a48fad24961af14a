"""A saved model is loaded and trained on: each family, numeric and mixed tables, both tasks, round after round."""

import copy
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from learning import ALL, FAMILIES, fitted, learner, table
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from alacarte import formats, learners
from alacarte.errors import UserError
from alacarte.features import TABULAR, Tabular
from alacarte.learners.sklearn import SklearnLearner

GOES_ON = {"sklearn_sgd", "sklearn_hgb", "sklearn_mlp", "torch_mlp"}
OF_OTHERS = ALL.keys() - FAMILIES
HOW = {"share": 0.25, "shrink": 0.8, "seed": 0}


def again(made, folder: Path, X: pd.DataFrame):
    made.save(folder, example=X.head(5), metadata={})
    return learners.load(folder)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("family", ALL)
def test_each_family_goes_on_or_says_why_not(family: str, task: str, tmp_path: Path) -> None:
    (X, y), (more, truth) = table("mixed", task), table("mixed", task, seed=1)
    made = copy.deepcopy(fitted(family, "mixed", task))
    epochs, before = made.epochs, made.predict(X)
    both, labels = pd.concat([X, more], ignore_index=True), pd.concat([y, truth], ignore_index=True)
    for round_ in range(2):
        update = made.update(both, labels, X[120:], y[120:], init="warm", **HOW)
        assert update.samples_seen == update.epochs * len(both)
        if family in GOES_ON | OF_OTHERS:
            assert (update.init, update.note) == ("warm", None)
            assert update.epochs <= max(1, epochs / 4) and made.epochs == epochs
        else:
            assert update.init == "scratch" and "cannot be trained further" in update.note
        made = again(made, tmp_path / f"round{round_}", X)
    after = made.predict(both)
    served = mlflow.pyfunc.load_model(str(tmp_path / "round1")).predict(both)
    assert np.allclose(served, after, rtol=1e-4) if task == "regression" else served.tolist() == after.tolist()
    if task == "classification":
        assert made.classes == ["high", "low", "mid"] and (after == labels).mean() > 0.6
    else:
        assert 1 - ((after - labels) ** 2).mean() / labels.var() > 0.25
    assert not np.array_equal(before, made.predict(X)) or family == "sklearn"


@pytest.mark.parametrize("family", sorted(GOES_ON))
def test_rows_of_some_classes_leave_the_others_in_their_places(family: str) -> None:
    """Fitting on as many other classes is what silently turns every answer into another class."""
    X, y = table("numeric", "classification")
    made = copy.deepcopy(fitted(family, "numeric", "classification"))
    some = np.arange(len(y)) < (60 if family == "sklearn_hgb" else 0)  # boosting takes its classes from the rows
    kept = (y != "mid") | some
    made.update(X[kept], y[kept], X[120:], y[120:], init="warm", **HOW)
    assert made.classes == ["high", "low", "mid"]
    assert (made.predict(X) == y)[(y != "mid").to_numpy()].mean() > 0.7


def test_scratch_learns_a_new_class() -> None:
    X, y = table("numeric", "classification")
    new = y.mask(X["c"] > 0.8, "new")
    for family in ("sklearn_sgd", "sklearn_forest", "torch_mlp", "xgboost"):
        made = copy.deepcopy(fitted(family, "numeric", "classification"))
        update = made.update(X, new, X, new, init="scratch", **HOW)
        assert update.init == "scratch" and made.classes == ["high", "low", "mid", "new"]


def test_scratch_keeps_the_settings_of_the_features() -> None:
    X, y = table("mixed", "classification")
    made = learner("sklearn_sgd")
    made.fit(X, y, X, y, task="classification", seed=0, features=Tabular(max_categories=2))
    columns = made.transformer().transform(X).shape[1]
    made.update(X, y, X, y, init="scratch", **HOW)
    assert made.transformer().transform(X).shape[1] == columns < TABULAR.fit_transform(X)[1].shape[1]


@pytest.mark.parametrize("family", ["torch_mlp", "keras_mlp", "sklearn_mlp"])
def test_shrink_perturb_is_for_networks(family: str) -> None:
    X, y = table("numeric", "classification")
    made = copy.deepcopy(fitted(family, "numeric", "classification"))
    update = made.update(X, y, X, y, init="shrink_perturb", **HOW)
    expected = ("warm", True) if family == "sklearn_mlp" else ("shrink_perturb", False)
    assert (update.init, "torch" in str(update.note)) == expected


@pytest.mark.parametrize(
    ("family", "setting"), [("sklearn_hgb", "l2_regularization"), ("lightgbm", "reg_lambda"), ("xgboost", "reg_lambda")]
)
def test_boosting_with_little_regularisation_or_without_a_class_starts_over(family: str, setting: str) -> None:
    X, y = table("numeric", "classification")
    made = copy.deepcopy(fitted(family, "numeric", "classification"))
    update = made.update(X[y != "low"], y[y != "low"], X, y, init="warm", **HOW)
    assert update.init == "scratch" and "'low'" in update.note and made.classes == ["high", "mid"]
    made = learner(family, "classification", f"model.{setting}=1")
    made.fit(X, y, X, y, task="classification", seed=0)
    update = made.update(X, y, X, y, init="warm", **HOW)
    assert update.init == "scratch" and f"model.{setting}=10" in update.note


def test_trees_read_new_rows_as_they_read_the_old_ones() -> None:
    """Bins made of the new rows would move every threshold, and the next trees would mend what is not broken."""
    draw = np.random.default_rng(0)
    X = pd.DataFrame(draw.integers(0, 6, (400, 2)).astype("float64"), columns=["a", "b"])
    finer = pd.concat([pd.DataFrame({"a": draw.uniform(0, 1, 400), "b": draw.uniform(0, 6, 400)}), X[:100]])
    y = X["a"] + X["b"] > 4.5
    made = learner("sklearn_hgb", "classification", "model.max_features=1.0", "model.max_iter=40")
    made.fit(X, y, X, y, task="classification", seed=0)
    answers = made.predict(finer)
    update = made.update(finer, pd.Series(answers), X, y, init="warm", **HOW)
    assert update == learners.Update("warm", 10, 10 * len(finer))
    assert (made.predict(finer) == answers).all() and (made.predict(X) == y).all()
    assert (made.model[-1].max_iter, made.model[-1].warm_start) == (40, False) and made.epochs == 40


def test_an_average_of_steps_leaves_the_old_ones_behind(tmp_path: Path) -> None:
    X, y = table("numeric", "regression", rows=600)
    turned = y - 2 * (y - y.mean())
    made = learner("sklearn_sgd", "regression")
    made.fit(X, y, X, y, task="regression", seed=0)
    for _ in range(2):
        made.update(X, turned, X, turned, init="warm", **{**HOW, "share": 0.5})
        assert 1 - ((made.predict(X) - turned) ** 2).mean() / turned.var() > 0.9
        made = again(made, tmp_path / str(_), X)
        assert made.model[-1].regressor_.average is True


@pytest.mark.parametrize("family", ["sklearn_sgd", "torch_mlp"])
def test_a_column_that_wakes_up_is_scaled_anew(family: str) -> None:
    X, y = table("numeric", "classification", rows=600)
    X = X.assign(asleep=np.where(np.arange(600) % 200, 0.0, 1.0), date=pd.Timestamp("2020-01-01"))
    awake = X[400:].assign(asleep=np.arange(200) % 17, date=pd.Timestamp("2024-01-01"))
    made = learner(family, "classification")
    made.fit(X[:400], y[:400], X[:400], y[:400], task="classification", seed=0)
    scales = {
        kind: pipe[-1].scale_.copy() for kind, pipe, _ in preprocess_of(made).transformers_ if kind != "remainder"
    }
    both, labels = pd.concat([X[:400], awake[:100]]), pd.concat([y[:400], y[400:500]])
    made.update(both, labels, both, labels, init="warm", **HOW)
    assert (made.predict(awake[100:]) == y[500:]).mean() > 0.7
    after = {kind: pipe[-1].scale_ for kind, pipe, _ in preprocess_of(made).transformers_ if kind != "remainder"}
    assert (after["numeric"][:4] == scales["numeric"][:4]).all() and after["numeric"][4] > 4 * scales["numeric"][4]
    assert after["date"][0] > 4 * scales["date"][0]


def preprocess_of(made):
    return made.preprocess if hasattr(made, "preprocess") else made.model["preprocess"]


def test_models_of_others_go_on_or_start_over(tmp_path: Path) -> None:
    X, y = table("numeric", "classification")
    for estimator in (SGDClassifier(loss="log_loss", random_state=0), LogisticRegression(), GaussianNB()):
        model = make_pipeline(StandardScaler(), estimator).fit(X, y)
        formats.save_skops(model, tmp_path / "model.skops")
        made = SklearnLearner.of(formats.load_skops(tmp_path / "model.skops"))
        for _ in range(2):
            update = made.update(X, y, X, y, init="warm", **HOW)
            assert update.init == ("warm" if type(estimator) is SGDClassifier else "scratch")
            assert made.epochs == np.max(getattr(estimator, "n_iter_", 1)) and (made.predict(X) == y).mean() > 0.6


@pytest.mark.parametrize("family", ["sklearn_mlp", "torch_mlp"])
def test_the_seed_of_an_update_decides_what_is_drawn(family: str) -> None:
    X, y = table("numeric", "regression")
    answers = []
    for seed in (0, 0, 1):
        made = copy.deepcopy(fitted(family, "numeric", "regression"))
        made.update(X, y, X, y, init="warm", **{**HOW, "seed": seed})
        answers.append(made.predict(X))
    assert np.array_equal(answers[0], answers[1]) and not np.array_equal(answers[0], answers[2])


def test_a_retraining_that_changes_nothing_is_an_error() -> None:
    X, y = table("numeric", "classification")
    made = copy.deepcopy(fitted("sklearn_sgd", "numeric", "classification"))
    made.model[-1].eta0 = 1e-300
    with pytest.raises(UserError, match=r"changed nothing: raise retrain.epoch_fraction, or use retrain.init=scratch"):
        made.update(X, y, X, y, init="warm", **HOW)


def turned(X: pd.DataFrame, y: pd.Series) -> tuple[pd.DataFrame, pd.Series]:
    """Rows from elsewhere, where other rules hold: what was high is low."""
    other = {"high": "low", "low": "high", "mid": "mid"}
    return X.assign(d=X["d"] + 4), y.map(other)


def test_training_on_learns_the_new_and_keeps_the_old() -> None:
    """Beside training on the new rows alone, which forgets, and from nothing for as long, which has learned little."""
    (X, y), held = table("numeric", "classification", rows=600), table("numeric", "classification", rows=600, seed=2)
    made = learner("sklearn_mlp", "classification", "model.max_epochs=60")
    made.fit(X, y, *held, task="classification", seed=0)
    more, truth = turned(*table("numeric", "classification", rows=150, seed=1))
    both, labels = pd.concat([X, more], ignore_index=True), pd.concat([y, truth], ignore_index=True)
    old, new = held, turned(*held)

    def right(model, part) -> float:
        return (model.predict(part[0]) == part[1]).mean()

    warm, alone = copy.deepcopy(made), copy.deepcopy(made)
    epochs = warm.update(both, labels, *held, init="warm", **HOW).epochs
    share = epochs * len(both) / len(more) / made.epochs
    alone.update(more, truth, *held, init="warm", **{**HOW, "share": share})
    fresh = learner("sklearn_mlp", "classification", f"model.max_epochs={epochs}")
    fresh.fit(both, labels, *held, task="classification", seed=0)
    assert right(made, new) < right(warm, new) - 0.15
    assert right(fresh, new) < right(warm, new) - 0.04
    assert right(alone, old) < right(warm, old) - 0.04
    assert right(warm, old) > right(made, old) - 0.08


@pytest.mark.parametrize("family", ["sklearn_sgd", "sklearn_mlp"])
def test_the_rate_falls_and_comes_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = table("numeric", "classification")
    made = copy.deepcopy(fitted(family, "numeric", "classification"))
    stepped, knob = made.model[-1], "eta0" if family == "sklearn_sgd" else "learning_rate_init"
    rate, seen = getattr(stepped, knob), []
    step = type(stepped).partial_fit

    def watch(self, *rows):
        seen.append(getattr(self, knob))
        result = step(self, *rows)
        if family == "sklearn_mlp":
            assert self._optimizer.learning_rate_init == seen[-1]
        return result

    monkeypatch.setattr(type(stepped), "partial_fit", watch)
    epochs = made.update(X, y, X, y, init="warm", **{**HOW, "share": 0.5}).epochs
    assert len(seen) == epochs > 3 and seen == sorted(seen, reverse=True)
    assert seen == pytest.approx([rate * learners.onward_rate(epoch, epochs) for epoch in range(epochs)])
    assert getattr(stepped, knob) == rate

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(stepped), "partial_fit", broken)
    with pytest.raises(KeyboardInterrupt):
        made.update(X, y, X, y, init="warm", **HOW)
    assert getattr(stepped, knob) == rate


def test_a_rate_with_a_schedule_of_its_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = table("numeric", "classification")
    model = make_pipeline(StandardScaler(), SGDClassifier(learning_rate="invscaling", eta0=0.1, random_state=0))
    made, seen, step = SklearnLearner.of(model.fit(X, y)), [], SGDClassifier.partial_fit
    monkeypatch.setattr(
        SGDClassifier, "partial_fit", lambda self, *rows: (seen.append(self.eta0), step(self, *rows))[1]
    )
    made.update(X, y, X, y, init="warm", **{**HOW, "share": 1.0})
    assert len(seen) > 1 and set(seen) == {0.1}


def test_a_network_is_trained_on_at_a_falling_rate_to_its_last_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = table("numeric", "classification")
    made = copy.deepcopy(fitted("torch_mlp", "numeric", "classification"))
    seen, ends, step = [], [], type(made)._epoch

    def watch(self, optimizer, *rows):
        seen.append(optimizer.param_groups[0]["lr"])
        loss = step(self, optimizer, *rows)
        ends.append([value.clone() for value in self.network.parameters()])
        return loss

    monkeypatch.setattr(type(made), "_epoch", watch)
    before = dict(made.settings)
    wrong = y.sample(frac=1, random_state=0)  # a validation part that only gets worse with what is learned
    epochs = made.update(X, y, X, pd.Series(wrong.to_numpy()), init="warm", **{**HOW, "share": 1.0}).epochs
    assert epochs == made.epochs == len(seen)
    assert seen == pytest.approx([before["lr"] * learners.onward_rate(epoch, epochs) for epoch in range(epochs)])
    assert all((left == right).all() for left, right in zip(made.network.parameters(), ends[-1], strict=True))
    assert made.settings == before
