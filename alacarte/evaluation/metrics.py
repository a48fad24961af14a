"""Metrics of one model on n rows, built-in and own, also per slice. Pure functions, no MLflow.

The names of metrics have no prefix; the caller adds `train_`, `val_`, `test_` or `audit_`. A metric that is not defined on the
given rows (R2 of a constant target, ROC AUC of a single class) is left out, and is never NaN.
"""

import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from alacarte.errors import UserError

PRIMARY = {"classification": "accuracy", "regression": "r2"}  # the default metric for comparing two models
LOWER_IS_BETTER = {"log_loss", "ece", "rmse", "mae", "median_ae"}
BUILT_IN = LOWER_IS_BETTER | {
    *("accuracy", "balanced_accuracy", "f1_macro", "precision_macro", "recall_macro", "roc_auc", "r2"),
}


# --- what a model answered -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a model on n rows, beside the truth."""

    task: str
    truth: np.ndarray  # (n,) class indices, or numbers
    predicted: np.ndarray  # (n,) class indices, or numbers
    proba: np.ndarray | None  # (n, n_classes) probabilities of the first classes of `names`
    names: np.ndarray  # the classes of the model in its order, then other labels that occur
    weight: np.ndarray | None  # (n,)

    def at(self, rows: np.ndarray) -> "Answers":
        """The answers on some of the rows."""
        proba, weight = (None if values is None else values[rows] for values in (self.proba, self.weight))
        return replace(self, truth=self.truth[rows], predicted=self.predicted[rows], proba=proba, weight=weight)


def make_answers(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    proba: np.ndarray | None,
    classes: Sequence | None,
    task: str,
    weight: np.ndarray | None = None,
) -> Answers:
    """`proba` has its columns in the order of `classes`. UserError for predictions that are NaN or infinite."""
    if task == "regression":
        numbers = _finite(y_true, "target"), _finite(y_pred, "predictions")
        return Answers(task, *numbers, None, np.zeros(0), weight)
    index: dict = {label: i for i, label in enumerate([] if classes is None else classes)}
    columns = ([index.setdefault(label, len(index)) for label in np.asarray(y).tolist()] for y in (y_true, y_pred))
    truth, predicted = (np.array(column, int) for column in columns)
    proba = None if proba is None else _finite(proba, "predicted probabilities")
    return Answers(task, truth, predicted, proba, np.array(list(index)), weight)


def answer(learner: Any, X: pd.DataFrame, y: pd.Series, weight: np.ndarray | None = None) -> Answers:
    """Let a learner answer the rows X (n,) with truth y."""
    return make_answers(y, learner.predict(X), learner.predict_proba(X), learner.classes, learner.task, weight)


def _finite(values: ArrayLike, what: str) -> np.ndarray:
    numbers = np.asarray(values, dtype=float)
    if bad := numbers.size - np.count_nonzero(np.isfinite(numbers)):
        hint = "scale the inputs or lower the learning rate"
        raise UserError(f"{what}: {bad} of {numbers.size} values are NaN or infinite; {hint}")
    return numbers


# --- own metrics -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A metric of the team: `function(y_true, y_pred, y_proba) -> float`."""

    name: str
    function: Callable[..., Any]
    greater_is_better: bool

    def __call__(self, answers: Answers) -> float:
        """The value. y_proba has the columns of the sorted labels, or is None. UserError if the function fails.

        A function with an argument `sample_weight` receives the weights of the rows, or None.
        """
        where = f"metrics.{self.name}: {self.function.__module__}.{self.function.__qualname__}"
        y_true, y_pred, proba = answers.truth, answers.predicted, answers.proba
        if answers.task == "classification":
            y_true, y_pred = answers.names[y_true], answers.names[y_pred]
        if proba is not None:
            proba = proba[:, np.argsort(answers.names[: proba.shape[1]])]
        weight = {"sample_weight": answers.weight} if "sample_weight" in signature(self.function).parameters else {}
        try:
            value = self.function(y_true, y_pred, proba, **weight)
        except Exception as error:  # code of the team can raise anything
            reason = " ".join(str(error).split())
            raise UserError(f"{where} raised {type(error).__name__}: {reason}") from error
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise UserError(f"{where} returned {type(value).__name__} {value!r:.60}: return one number") from None
        if not math.isfinite(value):
            raise UserError(f"{where} returned {value}: return a finite number")
        return value


Metrics = Mapping[str, Metric]


def load_metrics(settings: Mapping[str, Any] | None) -> dict[str, Metric]:
    """The metrics of conf/metrics/NAME.yaml. UserError for a function that does not exist."""
    metrics = {}
    for name, entry in (settings or {}).items():
        key = f"metrics.{name}"
        if name in BUILT_IN:
            raise UserError(f"{key}: {name} is a built-in metric; choose another name")
        if not isinstance(entry, Mapping) or set(entry) != {"function", "greater_is_better"}:
            raise UserError(
                f"{key}={entry}: expected the keys function and greater_is_better, as in conf/metrics/cost.yaml"
            )
        if not isinstance(entry["greater_is_better"], bool):
            raise UserError(f"{key}.greater_is_better={entry['greater_is_better']}: expected true or false")
        try:
            function = pkgutil.resolve_name(str(entry["function"]))
            assert callable(function), "not a function"
            weight = {"sample_weight": None} if "sample_weight" in signature(function).parameters else {}
            signature(function).bind(None, None, None, **weight)
        except Exception as error:  # importing a module of the team can raise anything
            raise UserError(
                f"{key}.function={entry['function']}: {type(error).__name__}: {' '.join(str(error).split())}: "
                "name a function f(y_true, y_pred, y_proba) of project/"
            ) from None
        metrics[name] = Metric(name, function, entry["greater_is_better"])
    return metrics


def is_lower_better(name: str, own: Metrics | None = None) -> bool:
    """Whether a lower value of a metric is better."""
    return not own[name].greater_is_better if own and name in own else name in LOWER_IS_BETTER


# --- values ----------------------------------------------------------------------------------------------------------


def measure(answers: Answers, own: Metrics | None = None, *, strict: bool = True) -> dict[str, float]:
    """All metrics, see also `measure_own`."""
    values = {name: float(calculate()) for name, calculate in _calculations(answers).items()}
    return values | measure_own(answers, own, strict=strict)


def measure_own(answers: Answers, own: Metrics | None, *, strict: bool) -> dict[str, float]:
    """The own metrics. With strict=False, a metric that fails on these rows is left out, as on the rows of a slice."""
    values = {}
    for name, metric in (own or {}).items() if answers.truth.size else ():
        try:
            values[name] = metric(answers)
        except UserError:
            if strict:
                raise
    return values


def measure_one(answers: Answers, name: str, own: Metrics | None = None) -> float:
    """One metric, NaN where it is not defined."""
    try:
        return own[name](answers) if own and name in own else float(_calculations(answers)[name]())
    except (UserError, KeyError):
        return math.nan


def _calculations(a: Answers) -> dict[str, Callable[[], float]]:
    """Name -> calculation, of each built-in metric that is defined for these answers.

    Names and definitions are scikit-learn's. A label that the model does not know counts as a mistake and has probability 0.
    Precision, recall and F1 are means over the classes that occur in the truth or in the predictions.
    """
    from sklearn import metrics as sk  # late: takes half a second, which a reused pipeline does not need

    if not a.truth.size or (a.weight is not None and not a.weight.any()):
        return {}
    columns = {"y_true": a.truth, "y_pred": a.predicted, "sample_weight": a.weight}
    if a.task == "regression":
        errors: dict[str, Callable[[], float]] = {
            "rmse": partial(sk.root_mean_squared_error, **columns),
            "mae": partial(sk.mean_absolute_error, **columns),
            "median_ae": partial(sk.median_absolute_error, **columns),
        }
        return errors | ({"r2": partial(sk.r2_score, **columns)} if a.truth.var() > 0 else {})
    macro = {**columns, "average": "macro", "zero_division": 0}
    values: dict[str, Callable[[], float]] = {
        "accuracy": partial(sk.accuracy_score, **columns),
        "balanced_accuracy": partial(sk.recall_score, **macro, labels=np.unique(a.truth)),
        "f1_macro": partial(sk.f1_score, **macro),
        "precision_macro": partial(sk.precision_score, **macro),
        "recall_macro": partial(sk.recall_score, **macro),
    }
    if a.proba is not None:
        values["log_loss"] = partial(log_loss, a.truth, a.proba, a.weight)
        values["ece"] = partial(calibration_error, a.truth, a.proba, a.weight)
        if len(np.unique(a.truth)) > 1:
            values["roc_auc"] = partial(roc_auc, a.truth, a.proba, a.weight)
    return values


def log_loss(truth: np.ndarray, proba: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Mean negative logarithm of the probability of the true class, clipped at the machine epsilon."""
    known = np.column_stack([proba, np.zeros(len(proba))])  # one more class, of probability 0, for unknown labels
    own, epsilon = known[np.arange(len(truth)), np.minimum(truth, proba.shape[1])], np.finfo(float).eps
    return float(np.average(-np.log(np.clip(own, epsilon, 1 - epsilon)), weights=weight))


def calibration_error(truth: np.ndarray, proba: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Expected calibration error of the top label in 15 bins (Guo et al., On calibration of modern neural networks, 2017)."""
    weight = np.ones(len(truth)) if weight is None else weight
    top = proba.max(axis=1)
    gaps = weight * (top - (proba.argmax(axis=1) == truth))
    return float(np.abs(np.bincount(np.minimum(top * 15, 14).astype(int), weights=gaps)).sum() / weight.sum())


def roc_auc(truth: np.ndarray, scores: np.ndarray, weight: np.ndarray | None = None) -> float:
    """ROC AUC of class indices (n,) by scores (n, k): of two classes the second, of more the one-vs-rest mean; NaN without any.

    Equal to sklearn.metrics.roc_auc_score, which takes 20 times as long: a bootstrap calls this function a thousand times.
    Classes that do not occur in `truth` are left out of the mean.
    """
    weight, areas = np.ones(len(truth)) if weight is None else weight, []
    for column in [1] if scores.shape[1] == 2 else range(scores.shape[1]):
        positive, order = truth == column, np.argsort(-scores[:, column])
        ends = np.append(np.flatnonzero(np.diff(scores[order, column])), len(order) - 1)  # of each run of equal scores
        true, false = (np.append(0, np.cumsum((weight * side)[order])[ends]) for side in (positive, ~positive))
        if true[-1] > 0 and false[-1] > 0:
            areas.append(np.trapezoid(true, false) / (true[-1] * false[-1]))
    return float(np.mean(areas)) if areas else math.nan


def score_parts(
    learner: Any, parts: Mapping[str, tuple[pd.DataFrame, pd.Series, np.ndarray | None]], metrics: Metrics | None = None
) -> dict[str, float]:
    """The metrics of a learner on each part (X, y, weight), with the name of the part: train_accuracy and more."""
    return {
        f"{part}_{name}": value
        for part, rows in parts.items()
        for name, value in measure(answer(learner, *rows), metrics).items()
    }


def losses(answers: Answers) -> np.ndarray:
    """Loss of each row (n,): 0 or 1 for a label; the squared error over the variance of the truth for a number.

    So the difference of two models' mean losses is their difference in accuracy or in R2.
    """
    if answers.task == "classification":
        return (answers.truth != answers.predicted).astype(float)
    mean = np.average(answers.truth, weights=answers.weight)
    variance = np.average((answers.truth - mean) ** 2, weights=answers.weight)
    return (answers.truth - answers.predicted) ** 2 / (variance or 1.0)


# --- slices ----------------------------------------------------------------------------------------------------------


def by_slice(answers: Answers, groups: pd.DataFrame, metrics: Metrics | None = None) -> pd.DataFrame:
    """A row for each value of each column of `groups` (n rows): column, value, n, and the metrics. The worst comes first.

    Numbers and dates with more than ten values are cut at their quartiles. Of other columns with more than twenty values,
    the 19 most frequent ones have a slice of their own. Missing values are a slice.
    """
    table = [
        {"column": column, "value": value, "n": len(rows), **measure(answers.at(rows), metrics, strict=False)}
        for column, value, rows in slices(groups, answers.weight)
    ]
    by, ascending = ("rmse", False) if answers.task == "regression" else ("accuracy", True)
    return pd.DataFrame(table).sort_values(by, ascending=ascending, ignore_index=True)


def slices(groups: pd.DataFrame, weight: np.ndarray | None = None) -> list[tuple[Any, str, np.ndarray]]:
    """Column, value and row numbers of each slice, without slices in which each row has the weight 0."""
    table = []
    for column, values in groups.items():
        names = _slice_names(values.reset_index(drop=True))
        indices = names.groupby(names).indices.items()
        table += [(column, value, rows) for value, rows in indices if weight is None or weight[rows].any()]
    return table


def _slice_names(values: pd.Series) -> pd.Series:
    """The name of the slice of each row."""
    kind = pd.api.types
    if (kind.is_numeric_dtype(values) or kind.is_datetime64_any_dtype(values)) and values.nunique() > 10:
        names = pd.qcut(values, 4, duplicates="drop")
    else:
        frequent = values.value_counts().index[: 20 if values.nunique() <= 20 else 19]
        names = values.astype(object).where(values.isin(frequent), "(other)")
    return names.astype(str).where(values.notna(), "(missing)")
