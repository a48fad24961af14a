"""What stands at the end of a pipeline, as plain numpy: from (n, k) float64 to labels and probabilities.

A head does what the estimator's own predict and predict_proba do, in the same order, without their checks. It raises
ValueError for numbers that the estimator refuses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit

if TYPE_CHECKING:
    from alacarte.formats.torch_network import TorchNetwork

# (n,) labels, and (n, n_classes) probabilities where they cost no second pass.
Answer = tuple[np.ndarray, np.ndarray | None]
Head = Callable[[np.ndarray], Answer]

# From so many rows on, a call per tree costs less than one that goes through all of them: measured with 80 to 800 trees.
MANY_FOR_FOREST, MANY_FOR_BOOSTING = 40, 100

# Of all trees together, above which they are not joined, as this takes their memory a second time.
MAX_NODES = 2_000_000

LINEAR_CLASSIFIERS = {
    *("LogisticRegression", "LogisticRegressionCV", "SGDClassifier", "LinearSVC", "RidgeClassifier"),
    *("RidgeClassifierCV", "Perceptron", "PassiveAggressiveClassifier"),
}
LINEAR_REGRESSORS = {
    *("LinearRegression", "Ridge", "RidgeCV", "Lasso", "LassoCV", "ElasticNet", "ElasticNetCV", "SGDRegressor"),
    *("LinearSVR", "HuberRegressor"),
}
FORESTS = {"RandomForestClassifier", "RandomForestRegressor", "ExtraTreesClassifier", "ExtraTreesRegressor"}
TREES = {"DecisionTreeClassifier", "DecisionTreeRegressor", "ExtraTreeClassifier", "ExtraTreeRegressor"}


class NotKnown(Exception):
    """A part that is not known here."""


def make_head(model: Any) -> Head:
    name = type(model).__name__
    if not is_sklearn(model):
        raise NotKnown(name)
    if name in LINEAR_CLASSIFIERS:
        return _linear_classifier(model)
    if name in LINEAR_REGRESSORS and model.coef_.ndim == 1:
        return _linear_regressor(model)
    if name in ("MLPClassifier", "MLPRegressor"):
        return _network(model)
    if name in FORESTS | TREES and model.n_outputs_ == 1:
        return _forest(model)
    if name.startswith("HistGradientBoosting"):
        return _histogram_boosting(model)
    if name == "GradientBoostingClassifier":
        return _gradient_boosting(model)
    return _as_it_is(model)


def is_sklearn(part: Any) -> bool:
    return type(part).__module__.startswith("sklearn.")


def nameless(part: Any) -> Any:
    """The same part, for arrays: one that knows names of columns warns at each call that an array has none."""
    plain = copy.copy(part)
    vars(plain).pop("feature_names_in_", None)
    return plain


def finite(x: np.ndarray, width: int | None = None, nan: bool = False) -> np.ndarray:
    """x, without what models refuse: another width, infinite numbers, and nan unless they know it."""
    if (width and x.shape[1] != width) or (not math.isfinite(x.sum()) and (not nan or np.isinf(x).any())):
        raise ValueError("numbers that only the model itself can judge")
    return x


def _as_it_is(model: Any) -> Head:
    """Any other estimator of scikit-learn, without a DataFrame on its way."""
    plain = nameless(model)

    def predict(x: np.ndarray) -> Answer:
        labels = plain.predict(x)
        if labels.ndim != 1:
            raise ValueError("more than one label per row")
        return labels, None

    return predict


def _linear_classifier(model: Any) -> Head:
    coefficients, intercept, classes = model.coef_.T, model.intercept_, model.classes_
    if "multilabel" in getattr(getattr(model, "_label_binarizer", None), "y_type_", ""):
        raise NotKnown("more than one label per row")
    name, loss = type(model).__name__, getattr(model, "loss", None)
    logistic = name.startswith("LogisticRegression")
    has_probabilities = logistic or (name == "SGDClassifier" and loss == "log_loss")

    def predict(x: np.ndarray) -> Answer:
        scores = finite(x) @ coefficients + intercept
        if scores.ndim == 1 or scores.shape[1] == 1:
            scores = scores.reshape(-1)
            return classes[(scores > 0).astype(int)], _two(expit(scores)) if has_probabilities else None
        labels = classes[scores.argmax(axis=1)]
        if not has_probabilities:
            return labels, None
        return labels, _softmax(scores) if logistic else _each_alone(scores)

    return predict


def _two(p: np.ndarray) -> np.ndarray:
    return np.stack([1 - p, p], axis=1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def _each_alone(scores: np.ndarray) -> np.ndarray:
    """Of one class against the rest each, made to sum to 1; alike where all are 0."""
    p = expit(scores)
    total = p.sum(axis=1, keepdims=True)
    p[total[:, 0] == 0] = 1
    return p / np.where(total == 0, p.shape[1], total)


def _linear_regressor(model: Any) -> Head:
    coefficients, intercept = model.coef_, model.intercept_
    return lambda x: (finite(x) @ coefficients + intercept, None)


def _network(model: Any) -> Head:
    from sklearn.neural_network._base import ACTIVATIONS

    names = [model.activation] * (len(model.coefs_) - 1) + [model.out_activation_]
    layers = list(zip(model.coefs_, model.intercepts_, [ACTIVATIONS[name] for name in names], strict=True))
    classes, one = getattr(model, "classes_", None), model.n_outputs_ == 1
    if not one and model.out_activation_ != "softmax":
        raise NotKnown("a network of more than one label per row")

    def predict(x: np.ndarray) -> Answer:
        finite(x)
        for weights, bias, activate in layers:
            x = x @ weights
            x += bias
            activate(x)  # in place
        if classes is None:
            return x[:, 0], None
        if one:
            return classes[(x[:, 0] > 0.5).astype(int)], _two(x[:, 0])
        return classes[x.argmax(axis=1)], x

    return predict


def _gradient_boosting(model: Any) -> Head:
    plain, classes, probabilities = nameless(model), model.classes_, model._loss.predict_proba

    def predict(x: np.ndarray) -> Answer:
        scores = plain._raw_predict(finite(np.ascontiguousarray(x, "float32"), model.n_features_in_))
        return _of_scores(classes, scores, scores[:, 0] >= 0), probabilities(scores)

    return predict


def _of_scores(classes: np.ndarray, scores: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Labels from (n, n_classes) scores, or, with two classes, where `second` is true the second one."""
    return classes[second.astype(int) if scores.shape[1] == 1 else scores.argmax(axis=1)]


# --- trees ---


# A call of scikit-learn per tree costs more than the walk through it, so T trees are joined to one. Each of n rows goes in
# T times, first all rows for tree 0, then for tree 1, ... Column 0 holds the number t of the tree, by which a search tree
# above all the roots sends the row there. Nothing is copied T times: what goes in is a window that slides over the line
# [0 n times, ..., T-1 n times, x_0 of all rows, ..., x_d-1 of all rows]. Row i for tree t starts at place n*t + i, and its
# columns are n places apart, so that it has x_f in column T - t + f: the one that the nodes of tree t are made to name.


def _window(x: np.ndarray, trees: int) -> np.ndarray:
    """(T * n, T + d) from (n, d)."""
    n, d = x.shape
    line = np.empty(n * (2 * trees + d), x.dtype)  # as long as the window thinks it reaches
    line[: n * trees].reshape(trees, n)[:] = np.arange(trees)[:, None]
    line[n * trees : n * (trees + d)].reshape(d, n)[:] = x.T
    return np.ndarray((n * trees, trees + d), x.dtype, line, strides=(x.itemsize, n * x.itemsize))


def _join(trees: list[np.ndarray], left: str, right: str, feature: str, threshold: str) -> np.ndarray:
    """One array of nodes from those of T trees, the root first in each; the names are those of its fields."""
    n_above = len(trees) - 1
    above = np.zeros(n_above, trees[0].dtype)
    roots = n_above + np.cumsum([0, *map(len, trees[:-1])])
    free = iter(range(n_above))

    def search(low: int, high: int) -> int:
        """The node that leads to trees low..high-1, made with all below it."""
        if high - low == 1:
            return roots[low]
        node, middle = next(free), (low + high) // 2
        above[threshold][node] = middle - 0.5
        above[left][node], above[right][node] = search(low, middle), search(middle, high)
        return node

    search(0, len(trees))
    moved = [above]
    for i, tree in enumerate(trees):
        nodes = tree.copy()
        inner = nodes[left] > 0  # no node leads to the root; leaves have 0 or -1 here
        nodes[left][inner] += nodes[left].dtype.type(roots[i])
        nodes[right][inner] += nodes[right].dtype.type(roots[i])
        nodes[feature][inner] += len(trees) - i
        moved.append(nodes)
    return np.concatenate(moved)


def _forest(model: Any) -> Head:
    trees = [each.tree_ for each in getattr(model, "estimators_", [model])]
    classes, n_inputs = getattr(model, "classes_", None), model.n_features_in_
    joined = _joined_forest(trees) if sum(tree.node_count for tree in trees) <= MAX_NODES else None

    def predict(x: np.ndarray) -> Answer:
        x = finite(x.astype("float32"), n_inputs)  # as the trees were grown
        if joined and len(x) < MANY_FOR_FOREST:
            # added up one after the other as scikit-learn does: another order rounds otherwise
            total = joined.predict(_window(x, len(trees))).reshape(len(trees), len(x), -1).cumsum(axis=0)[-1]
        else:
            total = sum(tree.predict(x) for tree in trees)
        total = total / len(trees)
        return (total[:, 0], None) if classes is None else (classes[total.argmax(axis=1)], total)

    return predict


def _joined_forest(trees: list[Any]) -> Any:
    from sklearn.tree._tree import Tree

    states = [tree.__getstate__() for tree in trees]
    nodes = _join([state["nodes"] for state in states], "left_child", "right_child", "feature", "threshold")
    above = np.zeros((len(trees) - 1, *trees[0].value.shape[1:]))
    values = np.concatenate([above, *(state["values"] for state in states)])
    tree = Tree(len(trees) + trees[0].n_features, trees[0].n_classes, 1)
    depth = max(state["max_depth"] for state in states) + len(trees)
    tree.__setstate__({"max_depth": depth, "node_count": len(nodes), "nodes": nodes, "values": values})
    return tree


def _histogram_boosting(model: Any) -> Head:
    # one thread: a thread per processor waits for the others once per tree, for seconds when the machine is busy
    from sklearn.ensemble._hist_gradient_boosting._predictor import _predict_from_raw_data

    if model.is_categorical_ is not None:
        raise NotKnown("categories in trees")
    trees = [tree.nodes for iteration in model._predictors for tree in iteration]
    first, n_scores, n_inputs = model._baseline_prediction, model.n_trees_per_iteration_, model.n_features_in_
    classes, loss = getattr(model, "classes_", None), model._loss
    known, places = model._bin_mapper.make_known_categories_bitsets()
    rest = (model._predictors[0][0].raw_left_cat_bitsets, known, places, 1)  # no categories, one thread
    small = sum(map(len, trees)) <= MAX_NODES
    joined = _join(trees, "left", "right", "feature_idx", "num_threshold") if small else None

    def predict(x: np.ndarray) -> Answer:
        finite(x, n_inputs, nan=True)
        if joined is not None and len(x) < MANY_FOR_BOOSTING:
            parts = np.empty((len(trees) // n_scores + 1, n_scores, len(x)))
            parts[0] = first.T
            _predict_from_raw_data(joined, _window(x, len(trees)), *rest, parts[1:].reshape(-1))
            scores = parts.cumsum(axis=0)[-1].T
        else:
            scores, part = np.zeros((len(x), n_scores), order="F") + first, np.empty(len(x))
            for i, tree in enumerate(trees):
                _predict_from_raw_data(tree, x, *rest, part)
                scores[:, i % n_scores] += part
        if classes is None:
            return loss.link.inverse(scores[:, 0]), None
        return _of_scores(classes, scores, scores[:, 0] > 0), loss.predict_proba(scores)

    return predict


# --- torch ---


def make_torch_head(predictor: TorchNetwork) -> Head:
    import torch

    network, net = predictor.network, predictor.net
    classes = None if net["classes"] is None else np.asarray(net["classes"])
    target = net["target"]

    def predict(x: np.ndarray) -> Answer:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(finite(x).astype("float32"))).numpy()
        if classes is None:
            return outputs[:, 0].astype("float64") * target["scale"] + target["mean"], None
        return classes[outputs.argmax(axis=1)], _softmax(outputs.astype("float64"))

    return predict
