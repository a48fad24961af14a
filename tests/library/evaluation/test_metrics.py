"""Metrics, slices and the importance of columns: scikit-learn's numbers where it has them, and own functions."""

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
from answers import LABELS, example
from learning import fitted, table
from people import refusal

from alacarte.errors import UserError
from alacarte.evaluation.comparison import worse_slices
from alacarte.evaluation.explain import column_importance
from alacarte.evaluation.metrics import (
    BUILT_IN,
    Metric,
    by_slice,
    load_metrics,
    losses,
    make_answers,
    measure,
    measure_one,
    score_parts,
)

# What a test before left to the garbage collector is no warning of this code.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::ResourceWarning")]


def score(*columns, weight=None) -> dict[str, float]:
    return measure(make_answers(*columns, weight))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", LABELS)
def test_classification_metrics_are_those_of_scikit_learn(kind, weighted):
    truth, answer, proba, classes = example(kind)
    proba = proba.round(1) + 1e-3  # many equal probabilities
    proba /= proba.sum(axis=1, keepdims=True)
    weight = {"sample_weight": np.random.default_rng(1).random(len(truth)) if weighted else None}
    ours = score(truth, answer, proba, classes, "classification", weight=weight["sample_weight"])
    macro = {"average": "macro", "zero_division": 0, **weight}
    areas = [
        sk.roc_auc_score(truth == classes[column], proba[:, column], **weight)
        for column in ([1] if len(classes) == 2 else range(len(classes)))
    ]
    order = np.argsort(classes)  # scikit-learn wants the columns sorted by class
    expected = {
        "accuracy": sk.accuracy_score(truth, answer, **weight),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, answer, **weight),
        "f1_macro": sk.f1_score(truth, answer, **macro),
        "precision_macro": sk.precision_score(truth, answer, **macro),
        "recall_macro": sk.recall_score(truth, answer, **macro),
        "log_loss": sk.log_loss(truth, proba[:, order], labels=np.sort(classes), **weight),
        "roc_auc": np.mean(areas),
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
    ours = score(pd.Series(truth), answer, None, None, "regression")
    assert ours == pytest.approx(expected)
    assert {*ours, *score(*example("str"), "classification")} == BUILT_IN


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
    never_true = score(["a", "a", "b", "b"], ["a", "c", "b", "a"], None, ["a", "b", "c", "d"], "classification")
    assert never_true["balanced_accuracy"] == pytest.approx(0.5)


def test_predictions_that_are_not_finite_are_the_users_to_mend():
    with pytest.raises(UserError, match="predictions: 1 of 2 values are NaN or infinite"):
        score([1.0, 2.0], [np.nan, 1.0], None, None, "regression")
    with pytest.raises(UserError, match="probabilities: 2 of 4"):
        score(["a", "b"], ["a", "b"], np.array([[np.nan, np.nan], [0, 1]]), ["a", "b"], "classification")


@pytest.mark.parametrize("weighted", [False, True])
def test_mean_losses_differ_by_the_difference_in_the_primary_metric(weighted):
    truth, answer, _, classes = example("str")
    other, y = example("str", seed=1)[1], np.random.default_rng(0).normal(size=len(truth)) * 100
    weight = np.random.default_rng(1).random(len(truth)) if weighted else None
    for metric, pair in (
        ("accuracy", [make_answers(truth, a, None, classes, "classification", weight) for a in (answer, other)]),
        ("r2", [make_answers(y, a, None, None, "regression", weight) for a in (y * 0.9, y * 0.5)]),
    ):
        gain = np.average(losses(pair[1]) - losses(pair[0]), weights=weight)
        assert gain == pytest.approx(measure_one(pair[0], metric) - measure_one(pair[1], metric))


# --- own metrics ---


def cost(y_true, y_pred, y_proba):
    return np.mean(y_true != y_pred)


def weighted_cost(y_true, y_pred, y_proba, sample_weight):
    return np.average(y_true != y_pred, weights=sample_weight)


def broken(y_true, y_pred, y_proba):
    return 1 / 0


@pytest.mark.parametrize("kind", LABELS)
def test_an_own_metric_gets_labels_of_the_table_and_probabilities_of_sorted_labels(kind):
    truth, answer, proba, classes = example(kind)

    def check(y_true, y_pred, y_proba):
        assert y_true.tolist() == truth.tolist() and y_pred.tolist() == answer.tolist()
        assert isinstance(y_true[0].item() if kind != "str" else str(y_true[0]), type(classes[0]))
        order = np.argsort(classes)
        return np.abs(y_proba - proba[:, order]).sum() + (np.sort(classes)[y_proba.argmax(axis=1)] != y_pred).sum()

    answers = make_answers(truth, answer, proba, classes, "classification")
    assert measure(answers, {"check": Metric("check", check, False)})["check"] == 0


def test_own_metrics_come_from_the_configuration_and_have_the_prefix_of_the_part():
    metrics = load_metrics({"cost": {"function": f"{__name__}.weighted_cost", "greater_is_better": False}})
    X, y = table("numeric", "classification")
    learner = fitted("sklearn_sgd", "numeric", "classification")  # shared with other tests of this process
    weight = np.arange(len(X), dtype=float)
    values = score_parts(learner, {"train": (X, y, None), "val": (X, y, weight)}, metrics)
    assert values["train_cost"] == pytest.approx(1 - values["train_accuracy"])
    assert values["val_cost"] == pytest.approx(1 - values["val_accuracy"]) != values["train_cost"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cost": {"function": "project.metrics.cots", "greater_is_better": True}}, "metrics.cost.function=project.metrics.cots"),
        ({"cost": {"function": "nowhere.cost", "greater_is_better": True}}, "No module named 'nowhere'"),
        ({"cost": {"function": "math.pi", "greater_is_better": True}}, "not a function"),
        ({"cost": {"function": "math.cos", "greater_is_better": True}}, "f(y_true, y_pred, y_proba)"),
        ({"cost": {"function": "project.metrics.cost", "greater_is_better": "yes"}}, "greater_is_better=yes: expected true"),
        ({"cost": {"function": "project.metrics.cost"}}, "expected the keys function and greater_is_better"),
        ({"accuracy": {"function": "project.metrics.cost", "greater_is_better": True}}, "accuracy is a built-in metric"),
    ],
)  # fmt: skip
def test_a_metric_that_cannot_be_used_is_one_line(settings, words):
    assert words in refusal(load_metrics, settings)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (broken, "raised ZeroDivisionError: division by zero"),
        (lambda *_: None, "returned NoneType None: return one number"),
        (lambda *_: [1, 2], "returned list [1, 2]: return one number"),
        (lambda *_: np.nan, "returned nan: return a finite number"),
    ],
)
def test_a_metric_that_fails_is_one_line_with_the_name_of_the_function(function, words):
    answers = make_answers(*example("str"), "classification")
    message = refusal(measure, answers, {"own": Metric("own", function, True)})
    assert message.startswith("metrics.own: ") and function.__qualname__ in message and words in message
    # On the rows of a slice it may be undefined.
    assert "own" not in measure(answers, {"own": Metric("own", function, True)}, strict=False)


# --- slices and columns ---


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
    own = {"cost": Metric("cost", cost, False)}
    table = by_slice(make_answers(truth, answer, proba, classes, "classification"), groups, own)
    assert table["cost"].tolist() == pytest.approx((1 - table["accuracy"]).tolist())
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
    numbers = np.arange(100.0)
    pair = make_answers(numbers, np.where(numbers < 50, numbers, numbers + 5), None, None, "regression")
    worst_first = by_slice(pair, pd.DataFrame({"low": numbers < 50}))
    assert worst_first["value"].tolist() == ["False", "True"] and worst_first["rmse"].tolist() == [5, 0]


@pytest.mark.parametrize("kind", ["str", "number"])
def test_a_slice_without_weight_is_left_out(kind):
    truth, answer, proba, classes = example("str", 200)
    pair = (
        (np.arange(200.0), np.arange(200.0)[::-1], None, None) if kind == "number" else (truth, answer, proba, classes)
    )
    groups = pd.DataFrame({"town": ["Bonn", "Lyon"] * 100})
    answers = make_answers(*pair, "regression" if kind == "number" else "classification", np.tile([0.0, 1.0], 100))
    assert by_slice(answers, groups)["value"].tolist() == ["Lyon"] and worse_slices(answers, answers, groups) == []
    assert measure(answers.at(np.arange(0, 200, 2))) == {}


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_columns_that_the_target_depends_on_are_the_important_ones(task):
    X, y = table("numeric", task)
    rows, metric = column_importance(fitted("sklearn_sgd", "numeric", task), X, y)
    assert metric == ("r2" if task == "regression" else "log_loss") and set(rows["column"]) == set(X)
    assert set(rows["column"][:2]) == {"a", "b"} and rows["importance"][0] > 0.1
    assert (rows["importance"].diff().dropna() <= 0).all()


def test_the_importance_of_a_column_counts_weights():
    X, y = table("numeric", "classification")
    twice, labels = pd.concat([X, X], ignore_index=True), pd.concat([y, y[::-1]], ignore_index=True)
    made, weight = fitted("sklearn_sgd", "numeric", "classification"), np.repeat([1.0, 0.0], len(X))
    blind, weighted, plain = (
        column_importance(made, rows, truth, weight=weights)[0].set_index("column").loc["a", "importance"]
        for rows, truth, weights in ((twice, labels, None), (twice, labels, weight), (X, y, None))
    )
    assert blind < 0.7 * plain and weighted == pytest.approx(plain, rel=0.3)
