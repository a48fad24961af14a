"""Metrics and slices: scikit-learn's numbers where it has them, and no crash where it has none."""

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
from answers import LABELS, example

from alacarte.errors import UserError
from alacarte.evaluation.metrics import baseline, by_slice, losses, score

# What a test before left to the garbage collector is no warning of this code.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.mark.parametrize("kind", LABELS)
def test_classification_metrics_are_those_of_scikit_learn(kind):
    truth, answer, proba, classes = example(kind)
    ours = score(truth, answer, proba, classes, "classification")
    macro = {"average": "macro", "zero_division": 0}
    order = np.argsort(classes)  # scikit-learn wants the columns sorted by class
    if len(classes) == 2:
        auc = sk.roc_auc_score(truth, proba[:, 1])
    else:
        auc = sk.roc_auc_score(truth, proba[:, order], multi_class="ovr", labels=np.sort(classes))
    expected = {
        "accuracy": sk.accuracy_score(truth, answer),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, answer),
        "f1_macro": sk.f1_score(truth, answer, **macro),
        "precision_macro": sk.precision_score(truth, answer, **macro),
        "recall_macro": sk.recall_score(truth, answer, **macro),
        "log_loss": sk.log_loss(truth, proba[:, order], labels=np.sort(classes)),
        "roc_auc": auc,
    }
    assert 0 < ours.pop("ece") < 1
    assert ours == pytest.approx(expected)


def test_regression_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=100)
    answer = truth + rng.normal(size=100)
    expected = {
        "r2": sk.r2_score(truth, answer),
        "rmse": sk.root_mean_squared_error(truth, answer),
        "mae": sk.mean_absolute_error(truth, answer),
        "median_ae": sk.median_absolute_error(truth, answer),
    }
    assert score(pd.Series(truth), answer, None, None, "regression") == pytest.approx(expected)


def test_a_class_that_is_answered_but_never_true_counts_as_in_scikit_learn():
    truth, answer = np.array(["a", "a", "b", "b"]), np.array(["a", "c", "b", "a"])
    ours = score(truth, answer, None, ["a", "b", "c", "d"], "classification")
    assert ours["f1_macro"] == pytest.approx(sk.f1_score(truth, answer, average="macro", zero_division=0))
    assert ours["balanced_accuracy"] == pytest.approx(0.5)


def test_calibration_error_is_the_gap_between_what_is_said_and_what_comes_true():
    proba = np.tile([0.8, 0.2], (10, 1))
    truth = np.array(["a"] * 8 + ["b"] * 2)
    answer = np.full(10, "a")
    assert score(truth, answer, proba, ["a", "b"], "classification")["ece"] == pytest.approx(0)
    assert score(answer, answer, proba, ["a", "b"], "classification")["ece"] == pytest.approx(0.2)


def test_a_label_never_seen_in_training_is_a_mistake_and_no_crash():
    truth, answer, proba, classes = example("str")
    truth[:10] = "yak"
    ours = score(truth, answer, proba, classes, "classification")
    assert ours["accuracy"] == pytest.approx(np.mean(truth.to_numpy() == answer))
    own = np.array([0.0 if t == "yak" else p[classes.index(t)] for t, p in zip(truth, proba, strict=True)])
    assert ours["log_loss"] == pytest.approx(-np.log(np.clip(own, np.finfo(float).eps, 1)).mean())


def test_what_is_not_defined_is_left_out():
    one_class = score(["a", "a"], ["a", "b"], np.array([[0.9, 0.1], [0.2, 0.8]]), ["a", "b"], "classification")
    assert "roc_auc" not in one_class and one_class["accuracy"] == 0.5
    assert "log_loss" not in score(["a", "b"], ["a", "b"], None, ["a", "b"], "classification")
    assert "r2" not in score([3.0, 3.0], [1.0, 2.0], None, None, "regression")
    assert "r2" not in score([3.0], [1.0], None, None, "regression")
    assert score([], [], None, ["a"], "classification") == score([], [], None, None, "regression") == {}


def test_predictions_that_are_not_finite_are_the_users_to_mend():
    with pytest.raises(UserError, match="predictions: 1 of 2 values are NaN or infinite"):
        score([1.0, 2.0], [np.nan, 1.0], None, None, "regression")
    with pytest.raises(UserError, match="predictions: 1 of 2"):
        losses([1.0, 2.0], [np.inf, 1.0], "regression")
    with pytest.raises(UserError, match="probabilities: 2 of 4"):
        score(["a", "b"], ["a", "b"], np.array([[np.nan, np.nan], [0, 1]]), ["a", "b"], "classification")


def test_baseline_is_the_majority_class_or_the_mean_of_the_train_part():
    assert baseline(["a", "a", "b"], ["a", "b", "b", "b"], "classification")["accuracy"] == 0.25
    assert baseline([1.0, 3.0], [1.0, 3.0], "regression")["r2"] == 0
    assert baseline([1.0, 3.0], [10.0, 12.0], "regression")["rmse"] == pytest.approx(np.sqrt((64 + 100) / 2))
    assert baseline(pd.Series([True, True, False]), [True], "classification")["accuracy"] == 1


def test_mean_losses_differ_by_the_difference_in_the_primary_metric():
    truth, answer, _, classes = example("str")
    other = example("str", seed=1)[1]
    gain = np.mean(losses(truth, other, "classification") - losses(truth, answer, "classification"))
    metric = [score(truth, a, None, classes, "classification")["accuracy"] for a in (answer, other)]
    assert gain == pytest.approx(metric[0] - metric[1])
    y = np.random.default_rng(0).normal(size=50) * 100
    gain = np.mean(losses(y, y * 0.5, "regression") - losses(y, y * 0.9, "regression"))
    metric = [score(y, a, None, None, "regression")["r2"] for a in (y * 0.9, y * 0.5)]
    assert gain == pytest.approx(metric[0] - metric[1])


def test_slices_cover_every_row_of_every_column_once():
    n = 400
    rng = np.random.default_rng(0)
    truth, answer, proba, classes = example("str", n)
    groups = pd.DataFrame(
        {
            "age": np.where(rng.random(n) < 0.1, np.nan, rng.integers(0, 90, n)),
            "visits": rng.integers(0, 3, n),
            "town": rng.choice([f"town {i}" for i in range(40)], n),
            "member": pd.Categorical(rng.choice(["yes", "no"], n)),
            "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 300, n), "D"),
        },
        index=np.zeros(n, dtype=int),  # an index says nothing about rows
    )
    table = by_slice(truth, answer, proba, classes, "classification", groups)
    assert (table.groupby("column")["n"].sum() == n).all()
    assert dict(table.groupby("column").size()) == {"age": 5, "visits": 3, "town": 20, "member": 2, "day": 4}
    assert table["accuracy"].is_monotonic_increasing
    row = table[(table["column"] == "member") & (table["value"] == "yes")].iloc[0]
    yes = (groups["member"] == "yes").to_numpy()
    assert row["n"] == yes.sum()
    assert row["accuracy"] == pytest.approx(np.mean(truth.to_numpy()[yes] == answer[yes]))
    assert "(missing)" in set(table["value"]) and "(other)" in set(table["value"])
    quarters = table[(table["column"] == "age") & (table["value"] != "(missing)")]["n"]
    assert quarters.max() < 1.3 * quarters.min()


def test_the_worst_slice_of_a_regression_comes_first():
    truth = np.arange(100.0)
    answer = np.where(truth < 50, truth, truth + 5)
    table = by_slice(truth, answer, None, None, "regression", pd.Series(truth < 50, name="low"))
    assert table["value"].tolist() == ["False", "True"] and table["rmse"].tolist() == [5, 0]
