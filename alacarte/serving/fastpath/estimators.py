"""The last step of a pipeline as plain numpy: from (n, k) float64 to labels and probabilities.

Each function does the arithmetic of the estimator's own predict and predict_proba in the same order, without their checks.
It raises ValueError for numbers that the estimator refuses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit

if TYPE_CHECKING:
    from alacarte.learners.torch_pyfunc import Predictor

# (n,) labels, and (n, n_classes) probabilities where the model has them.
Labels = tuple[np.ndarray, np.ndarray | None]
Predict = Callable[[np.ndarray], Labels]

# Rows from which the estimator's own call is faster than treelite's: `python benchmarks/trees.py` compares them.
MANY = 100

LINEAR_CLASSIFIERS = {
    *("LogisticRegression", "LogisticRegressionCV", "SGDClassifier", "LinearSVC", "RidgeClassifier"),
    *("RidgeClassifierCV", "Perceptron", "PassiveAggressiveClassifier"),
}
LINEAR_REGRESSORS = {
    *("LinearRegression", "Ridge", "RidgeCV", "Lasso", "LassoCV", "ElasticNet", "ElasticNetCV", "SGDRegressor"),
    *("LinearSVR", "HuberRegressor"),
}
FORESTS = {"RandomForestClassifier", "RandomForestRegressor", "ExtraTreesClassifier", "ExtraTreesRegressor"}
BOOSTED = {
    *("GradientBoostingClassifier", "GradientBoostingRegressor"),
    *("HistGradientBoostingClassifier", "HistGradientBoostingRegressor"),
}


class NotKnown(Exception):
    """A part of a model that the fast path does not know."""


def compile_estimator(model: Any) -> Predict:
    """NotKnown for an estimator that is not of scikit-learn."""
    name = type(model).__name__
    if not is_sklearn(model):
        raise NotKnown(name)
    if name in LINEAR_CLASSIFIERS and (_is_logistic(model) or not hasattr(model, "predict_proba")):
        return _linear_classifier(model)
    if name in LINEAR_REGRESSORS and model.coef_.ndim == 1:
        coefficients, intercept = model.coef_, model.intercept_
        return lambda x: (finite(x) @ coefficients + intercept, None)
    if name in ("MLPClassifier", "MLPRegressor"):
        return _network(model)
    if name in FORESTS and model.n_outputs_ == 1:
        return _forest(model)
    if name in BOOSTED:
        return _boosted(model)
    return _any_estimator(model)


def is_sklearn(part: Any) -> bool:
    return type(part).__module__.startswith("sklearn.")


def without_names(part: Any) -> Any:
    """A copy for arrays: an estimator that knows column names warns at each call that an array has none."""
    plain = copy.copy(part)
    vars(plain).pop("feature_names_in_", None)
    return plain


def finite(x: np.ndarray, width: int | None = None, nan: bool = False) -> np.ndarray:
    """x; ValueError for numbers that estimators refuse: another width, infinite numbers, and NaN unless `nan`."""
    if (width and x.shape[1] != width) or (not math.isfinite(x.sum()) and (not nan or np.isinf(x).any())):
        raise ValueError("numbers that only the model itself can judge")
    return x


def _any_estimator(model: Any) -> Predict:
    """Any other estimator of scikit-learn: its own predict, without a DataFrame."""
    plain, has_probabilities = without_names(model), hasattr(model, "predict_proba")
    return lambda x: (plain.predict(x), plain.predict_proba(x) if has_probabilities else None)


def _is_logistic(model: Any) -> bool:
    return type(model).__name__.startswith("LogisticRegression") or getattr(model, "loss", None) == "log_loss"


def _linear_classifier(model: Any) -> Predict:
    coefficients, intercept, classes = model.coef_.T, model.intercept_, model.classes_
    softmax_of_all = type(model).__name__.startswith("LogisticRegression")
    has_probabilities = _is_logistic(model)

    def predict(x: np.ndarray) -> Labels:
        scores = finite(x) @ coefficients + intercept
        if scores.ndim == 1 or scores.shape[1] == 1:
            scores = scores.reshape(-1)
            return classes[(scores > 0).astype(int)], _both(expit(scores)) if has_probabilities else None
        labels = classes[scores.argmax(axis=1)]
        if not has_probabilities:
            return labels, None
        return labels, softmax(scores) if softmax_of_all else _one_against_rest(scores)

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


def _network(model: Any) -> Predict:
    from sklearn.neural_network._base import ACTIVATIONS

    names = [model.activation] * (len(model.coefs_) - 1) + [model.out_activation_]
    layers = list(zip(model.coefs_, model.intercepts_, [ACTIVATIONS[name] for name in names], strict=True))
    classes, one_output = getattr(model, "classes_", None), model.n_outputs_ == 1
    if not one_output and model.out_activation_ != "softmax":
        raise NotKnown("a network of more than one label per row")

    def predict(x: np.ndarray) -> Labels:
        finite(x)
        for weights, bias, activate in layers:
            x = x @ weights
            x += bias
            activate(x)  # in place
        if classes is None:
            return x[:, 0], None
        if one_output:
            return classes[(x[:, 0] > 0.5).astype(int)], _both(x[:, 0])
        return classes[x.argmax(axis=1)], x

    return predict


# --- trees: a few rows by treelite, many by the estimator itself ---


def _treelite(model: Any) -> Callable[[np.ndarray, bool], np.ndarray]:
    """(n, n_scores) of a few rows; with True the scores before the last function, such as softmax."""
    from treelite import gtil, sklearn

    trees = sklearn.import_model(model)
    return lambda x, raw: gtil.predict(trees, x, nthread=1, pred_margin=raw).reshape(len(x), -1)


def _forest(model: Any) -> Predict:
    few, plain, classes, n_inputs = (
        _treelite(model),
        without_names(model),
        model.__dict__.get("classes_"),
        model.n_features_in_,
    )

    def predict(x: np.ndarray) -> Labels:
        # trees compare float32, in which the values at a threshold fall to the same side as in the estimator
        x = finite(x.astype("float32", order="C"), n_inputs)
        if len(x) < MANY:
            means = few(x.astype("float64"), False)
        else:
            means = plain.predict(x).reshape(-1, 1) if classes is None else plain.predict_proba(x)
        return (means[:, 0], None) if classes is None else (classes[means.argmax(axis=1)], means)

    return predict


def _boosted(model: Any) -> Predict:
    classes, n_inputs = getattr(model, "classes_", None), model.n_features_in_
    is_hist = type(model).__name__.startswith("Hist")
    if (is_hist and model.is_categorical_ is not None) or (classes is not None and model.loss != "log_loss"):
        raise NotKnown("categories in trees, or another loss than log_loss")
    few, plain = _treelite(model), without_names(model)

    def predict(x: np.ndarray) -> Labels:
        if is_hist:
            x = finite(np.ascontiguousarray(x), n_inputs, nan=True)
        else:
            x = finite(x.astype("float32", order="C"), n_inputs).astype("float64")
        if classes is None:
            return few(x, False)[:, 0] if len(x) < MANY else plain.predict(x), None
        scores = few(x, True) if len(x) < MANY else plain.decision_function(x).reshape(len(x), -1)
        if scores.shape[1] > 1:
            return classes[scores.argmax(axis=1)], softmax(scores)
        second = scores[:, 0] > 0 if is_hist else scores[:, 0] >= 0
        return classes[second.astype(int)], _both(expit(scores[:, 0]))

    return predict


# --- torch ---


def compile_torch(predictor: Predictor) -> Predict:
    import torch

    network, net = _unguarded(predictor.network), predictor.net
    classes = None if net["classes"] is None else np.asarray(net["classes"])
    target = net["target"]

    def predict(x: np.ndarray) -> Labels:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(finite(x).astype("float32"))).numpy()
        if classes is None:
            return outputs[:, 0].astype("float64") * target["scale"] + target["mean"], None
        return classes[outputs.argmax(axis=1)], softmax(outputs.astype("float64"))

    return predict


def _unguarded(network: Any) -> Callable[[Any], Any]:
    """An exported program checks and flattens its inputs at each call, which takes longer than a small network."""
    from torch.fx import CodeGen, GraphModule

    if not isinstance(network, GraphModule):
        return network
    plain = GraphModule(network, copy.deepcopy(network.graph))
    for node in list(plain.graph.nodes):
        if node.target == "_guards_fn":
            plain.graph.erase_node(node)
    plain.graph.set_codegen(CodeGen())
    plain.recompile()
    forward = plain.forward
    return lambda x: forward(x)[0]
