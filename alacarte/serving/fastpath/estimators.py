"""The last step of a pipeline as plain numpy: from (n, k) float64 to labels and probabilities.

Each function does the arithmetic of the estimator's own predict and predict_proba in the same order, without their checks.
It raises ValueError for numbers that the estimator refuses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.compose import TransformedTargetRegressor
from sklearn.preprocessing import StandardScaler

from alacarte.formats.network import NetworkModel
from alacarte.formats.network_pyfunc import predictions

# (n,) labels, and (n, n_classes) probabilities where the model has them.
Labels = tuple[np.ndarray, np.ndarray | None]
Predict = Callable[[np.ndarray], Labels]

# Rows from which the estimator's own call is faster than treelite's: `python benchmarks/trees.py` compares them.
MANY = 100

LINEAR_REGRESSORS = ("LinearRegression", "Ridge", "SGDRegressor")
FORESTS = ("RandomForestClassifier", "RandomForestRegressor", "ExtraTreesClassifier", "ExtraTreesRegressor")
BOOSTED = ("HistGradientBoostingClassifier", "HistGradientBoostingRegressor")
ONE_PASS = ("MLPClassifier", "VotingClassifier")  # their predict is the class with the highest predict_proba


class NotKnown(Exception):
    """A part of a model that the fast path does not know."""


def compile_estimator(model: Any) -> Predict:
    """NotKnown for an estimator that is not of scikit-learn."""
    name = type(model).__name__
    if not type(model).__module__.startswith("sklearn."):
        raise NotKnown(name)
    if name == "LogisticRegression" or (name == "SGDClassifier" and model.loss == "log_loss"):
        return _linear_classifier(model)
    if name in LINEAR_REGRESSORS and model.coef_.ndim == 1:
        coefficients, intercept = model.coef_, model.intercept_
        return lambda x: (finite(x) @ coefficients + intercept, None)
    if name in FORESTS and model.n_outputs_ == 1:
        return _forest(model)
    if name in BOOSTED:
        return _boosted(model)
    if type(model) is TransformedTargetRegressor and type(model.transformer_) is StandardScaler:
        scaled, target = compile_estimator(model.regressor_), model.transformer_
        return lambda x: (target.inverse_transform(scaled(x)[0].reshape(-1, 1)).reshape(-1), None)
    plain, has_probabilities = _without_names(model), hasattr(model, "predict_proba")
    if name in ONE_PASS and has_probabilities:
        return lambda x: _of_probabilities(plain.classes_, plain.predict_proba(x))
    return lambda x: (plain.predict(x), plain.predict_proba(x) if has_probabilities else None)


def compile_network(model: NetworkModel) -> Predict:
    def predict(x: np.ndarray) -> Labels:
        outputs = model.outputs(finite(x).astype("float32"))
        return predictions(outputs, model.net), softmax(outputs.astype("float64")) if model.net["classes"] else None

    return predict


def _without_names(model: Any) -> Any:
    """A copy for arrays: an estimator that knows column names warns at each call that an array has none."""
    plain = copy.copy(model)
    vars(plain).pop("feature_names_in_", None)
    return plain


def finite(x: np.ndarray, width: int | None = None, nan: bool = False) -> np.ndarray:
    """x; ValueError for numbers that estimators refuse: another width, infinite numbers, and NaN unless `nan`."""
    if (width and x.shape[1] != width) or (not math.isfinite(x.sum()) and (not nan or np.isinf(x).any())):
        raise ValueError("numbers that only the model itself can judge")
    return x


def _of_probabilities(classes: np.ndarray, proba: np.ndarray) -> Labels:
    return classes[proba.argmax(axis=1)], proba


def _linear_classifier(model: Any) -> Predict:
    coefficients, intercept, classes = model.coef_.T, model.intercept_, model.classes_
    to_probabilities = _one_against_rest if hasattr(model, "loss") else softmax

    def predict(x: np.ndarray) -> Labels:
        scores = finite(x) @ coefficients + intercept
        if scores.shape[1] == 1:
            return classes[(scores[:, 0] > 0).astype(int)], _both(expit(scores[:, 0]))
        return classes[scores.argmax(axis=1)], to_probabilities(scores)

    return predict


def _both(p: np.ndarray) -> np.ndarray:
    return np.stack([1 - p, p], axis=1)


def softmax(scores: np.ndarray) -> np.ndarray:
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def _one_against_rest(scores: np.ndarray) -> np.ndarray:
    """Probabilities of each class against the rest, scaled to the sum 1; equal where all are 0."""
    p = expit(scores)
    total = p.sum(axis=1, keepdims=True)
    p[total[:, 0] == 0] = 1
    return p / np.where(total == 0, p.shape[1], total)


# --- trees: a few rows by treelite, many by the estimator itself ---


def _treelite(model: Any, raw: bool) -> Callable[[np.ndarray], np.ndarray]:
    """From (n, k) to (n, n_scores); `raw` are the scores before the last function, such as softmax."""
    from treelite import gtil, sklearn

    _check_numbers_of_trees(model)
    trees = sklearn.import_model(model)
    return lambda x: gtil.predict(trees, x, nthread=1, pred_margin=raw).reshape(len(x), -1)


def _check_numbers_of_trees(model: Any) -> None:
    """NotKnown where treelite would read trees that do not exist: it takes their number from these attributes."""
    n_classes = len(getattr(model, "classes_", ()))
    if hasattr(model, "_predictors"):
        trees, baseline = n_classes if n_classes > 2 else 1, model._baseline_prediction
        fits = all(len(iteration) == trees for iteration in model._predictors)
        fits = fits and baseline.dtype == np.float64 and baseline.size == trees
    else:
        fits = model.n_estimators == len(model.estimators_) and getattr(model, "n_classes_", n_classes) == n_classes
    if not fits:
        raise NotKnown("another number of trees than it says")


def _forest(model: Any) -> Predict:
    plain, few, n_inputs = _without_names(model), _treelite(model, False), model.n_features_in_

    def by_treelite(x: np.ndarray) -> np.ndarray:
        # rounded like the estimator's own input, so that values at a threshold fall to the same side
        return few(finite(x.astype("float32", order="C"), n_inputs).astype("float64"))

    if type(model).__name__.endswith("Regressor"):
        return lambda x: (by_treelite(x)[:, 0] if len(x) < MANY else plain.predict(x), None)
    proba = lambda x: by_treelite(x) if len(x) < MANY else plain.predict_proba(x)  # noqa: E731
    return lambda x: _of_probabilities(plain.classes_, proba(x))


def _boosted(model: Any) -> Predict:
    classes, n_inputs = getattr(model, "classes_", None), model.n_features_in_
    if model.is_categorical_ is not None or (classes is not None and model.loss != "log_loss"):
        raise NotKnown("categories in trees, or another loss than log_loss")
    plain, few = _without_names(model), _treelite(model, classes is not None)

    def predict(x: np.ndarray) -> Labels:
        x = finite(np.ascontiguousarray(x), n_inputs, nan=True)
        if classes is None:
            return few(x)[:, 0] if len(x) < MANY else plain.predict(x), None
        scores = few(x) if len(x) < MANY else plain.decision_function(x).reshape(len(x), -1)
        if scores.shape[1] > 1:
            return classes[scores.argmax(axis=1)], softmax(scores)
        return classes[(scores[:, 0] > 0).astype(int)], _both(expit(scores[:, 0]))

    return predict
