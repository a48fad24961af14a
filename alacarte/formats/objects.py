"""What the objects in a model file may hold: checked after skops has made them and before one of their methods is called.

The names in a file are checked before (check.py). Two dangers are left in the data. scikit-learn acts on some attributes:
it opens a cache folder that `memory` names, reads the files that a text with `input="filename"` names, and calls the
functions it finds. And compiled code follows indices without a check: one that is out of bounds ends the process, one that
leads back keeps a core busy for ever. The arrays of trees, neighbours and support vectors are checked here. What remains
can be tried in a child process only.
"""

import ctypes
import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from alacarte.errors import UserError
from alacarte.formats.classes import is_class

INTEGER, NUMBER = (int, np.integer), (int, float, np.number, np.bool_)
SEEDS = (int, str, np.integer, np.random.RandomState)  # a word such as "deprecated" is refused by scikit-learn
FOREIGN = r"^__|^_skl_|^_listener|callback(?!s?$)|(?<!^)callback"  # names that only callbacks of scikit-learn set, and dunders
PRE_DISPATCH = r"all|\d+|(\d+ ?\* ?)?n_jobs"

# Attributes that scikit-learn or joblib act on, and the values that are harmless.
ATTRIBUTES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "memory": ("null", lambda value: value is None),
    "callback": ("null", lambda value: value is None),
    "callbacks": ("null", lambda value: value is None),
    "verbose": ("a number", lambda value: isinstance(value, NUMBER)),
    "scoring": ("null or names", lambda value: all(leaf is None or isinstance(leaf, str) for leaf in _leaves(value))),
    "n_jobs": ("null or a whole number", lambda value: value is None or isinstance(value, INTEGER)),
    "pre_dispatch": ("a number, all or 2*n_jobs", lambda value: bool(re.fullmatch(PRE_DISPATCH, str(value)))),
    "random_state": ("null, a whole number or a RandomState", lambda value: value is None or isinstance(value, SEEDS)),
    "input": ("content", lambda value: value == "content"),
}


def check_object(model: object, path: str) -> None:
    """UserError, with `path` and the reason, where an attribute or an array in `model` is not as fit leaves it."""
    try:
        parts = list(_parts(model))
        for part in parts:
            _check_attributes(part)
            _check_arguments(part)
        for checks in (STRUCTURES, ENSEMBLES):  # an ensemble may be asked only when its trees are known to be sound
            for part in parts:
                for cls in type(part).__mro__:  # a class of `project` can inherit from one of scikit-learn
                    if check := checks.get(cls.__name__):
                        check(part)
                if checks is STRUCTURES and hasattr(part, "check_format"):  # a sparse matrix
                    part.check_format(full_check=True)
    except Exception as error:  # a forged object can lack any attribute; it is refused whatever the error is
        reason = " ".join(str(error).split())[:200]
        label = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{path}: {label}{reason}: not loaded or saved") from error


def _parts(model: object) -> Iterator[Any]:
    """Every object that can be reached from `model`, each once."""
    branches: list[Any] = [model]
    seen: dict[int, Any] = {}
    while branches:
        part = branches.pop()
        if id(part) in seen or isinstance(part, (str, bytes, *NUMBER)):
            continue
        seen[id(part)] = part  # kept alive, so that no other object gets its id
        yield part
        if isinstance(part, dict):
            branches.extend(part.values())
        elif isinstance(part, list | tuple | set):
            branches.extend(part)
        elif isinstance(part, np.ndarray) and part.dtype == object:
            branches.extend(part.ravel().tolist())
        elif isinstance(part, partial):
            branches.extend((part.func, part.args, part.keywords, vars(part)))
        elif _is_listed(part) or _is_own(part):
            branches.extend(vars(part).values() if hasattr(part, "__dict__") else part.__getstate__() or ())


def _is_listed(part: object) -> bool:
    """Whether the class of an object, or one that it inherits from, is on the list."""
    return any(is_class(cls.__module__, cls.__name__) for cls in type(part).__mro__)


def _is_own(part: object) -> bool:
    return type(part).__module__.startswith("project.")


def _check_attributes(part: Any) -> None:
    if not (_is_listed(part) or _is_own(part)) or not hasattr(part, "__dict__"):
        return
    for name, value in vars(part).items():
        label = f"{type(part).__name__}.{name}"
        if not isinstance(name, str) or not name.isidentifier() or re.search(FOREIGN, name):
            raise ValueError(f"{label} is no attribute that fit sets")
        if hasattr(inspect.getattr_static(type(part), name, None), "__get__"):
            raise ValueError(f"{label} would take the place of a method")
        allowed, is_harmless = ATTRIBUTES.get(name, ("", None))
        if is_harmless and _is_listed(part) and not is_harmless(value):
            raise ValueError(f"{label} is {type(value).__name__} {str(value)[:60]!r}, allowed is {allowed}")


def _check_arguments(part: Any) -> None:
    """Arguments for a function. One that writes into an array of the model would undo what is checked here."""
    if isinstance(part, partial):
        _require(not part.args, "a function with arguments that have no names")
    elif isinstance(part, dict):
        _require(
            not isinstance(part.get("out"), np.ndarray | tuple | list), "an argument out, into which functions write"
        )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _require(condition: Any, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


# --- arrays that compiled code reads without a check ---


def _check_children(left: np.ndarray, right: np.ndarray, inner: np.ndarray, name: str) -> None:
    """A child comes after its parent, as scikit-learn writes them, so every walk through the tree ends."""
    index, count = np.flatnonzero(inner), len(inner)
    for child in (left[inner], right[inner]):
        _require(((child > index) & (child < count)).all(), f"{name}: a node leads to a node that is not one after it")


def _check_tree(tree: Any) -> None:
    _require(0 < tree.node_count <= tree.capacity, "Tree: it says that it has more nodes than there are")
    _require(tree.n_outputs > 0 and (tree.n_classes > 0).all(), "Tree: no outputs")
    nodes = tree.__getstate__()["nodes"]
    inner = nodes["left_child"] != -1
    _check_children(nodes["left_child"], nodes["right_child"], inner, "Tree")
    feature = nodes["feature"][inner]
    _require(((feature >= 0) & (feature < tree.n_features)).all(), "Tree: a node reads a column that does not exist")
    _require(tree.compute_node_depths().max() - 1 <= tree.max_depth, "Tree: it is deeper than it says")


def _check_tree_predictor(tree: Any) -> None:
    from sklearn.ensemble._hist_gradient_boosting.common import PREDICTOR_RECORD_DTYPE

    nodes, bitsets = tree.nodes, (tree.raw_left_cat_bitsets, tree.binned_left_cat_bitsets)
    _require(
        nodes.dtype == PREDICTOR_RECORD_DTYPE and nodes.ndim == 1 and len(nodes), "TreePredictor: no array of nodes"
    )
    for bits in bitsets:
        _require(bits.dtype == np.uint32 and bits.ndim == 2 and bits.shape[1] == 8, "TreePredictor: no sets of bits")
    inner = nodes["is_leaf"] == 0
    _check_children(nodes["left"], nodes["right"], inner, "TreePredictor")
    categorical = nodes["bitset_idx"][inner & (nodes["is_categorical"] != 0)]
    _require((categorical < min(map(len, bitsets))).all(), "TreePredictor: a node reads a set that does not exist")


def _check_neighbours(tree: Any) -> None:
    """A KDTree or BallTree: sizes as its constructor computes them."""
    data, index, nodes, bounds, leaf_size, n_levels, n_nodes, *_, metric, weight = tree.__getstate__()
    (n, d), name = data.shape, type(tree).__name__
    _require(n > 0 and leaf_size > 0, f"{name}: no rows")
    _require(n_levels == int(math.log2(max(1, (n - 1) / leaf_size)) + 1), f"{name}: it has another number of levels")
    _require(n_nodes == 2**n_levels - 1 == len(nodes), f"{name}: it has another number of nodes")
    _require(bounds.shape == (1 + (name == "KDTree"), n_nodes, d), f"{name}: bounds of another shape")
    _require(np.array_equal(np.sort(index), np.arange(n)), f"{name}: its index is no order of its rows")
    start, end = nodes["idx_start"], nodes["idx_end"]
    _require(((start >= 0) & (start <= end) & (end <= n)).all(), f"{name}: a node holds rows that do not exist")
    _require((nodes["is_leaf"][n_nodes // 2 :] == 1).all(), f"{name}: a node leads to a node that does not exist")
    _require(weight is None or weight.shape == (n,), f"{name}: weights of another number of rows")
    metric._validate_data(data)


def _check_spline(spline: Any) -> None:
    type(spline)(spline.t, spline.c, spline.k)  # the constructor checks what its compiled code relies on


def _check_state(random: np.random.RandomState) -> None:
    _require(0 <= random.get_state(legacy=False)["state"]["pos"] <= 624, "RandomState: no position in its numbers")


def _check_generator(random: np.random.Generator) -> None:
    _require(type(random.bit_generator) is np.random.PCG64, "Generator: allowed is PCG64")


def _check_support_vectors(model: Any) -> None:
    if not hasattr(model, "support_vectors_"):
        return
    per_class, name = model._n_support, type(model).__name__
    n, n_classes = model.support_.shape[0], len(per_class)
    pairs = n_classes * (n_classes - 1) // 2
    total = n if name in ("SVC", "NuSVC") else 2 * n
    _require((per_class >= 0).all() and per_class.sum() == total, f"{name}: another number of support vectors")
    if model.kernel == "precomputed":  # a support vector is a column of the rows to predict
        in_reach = (model.support_ >= 0) & (model.support_ < model.shape_fit_[0])
        _require(in_reach.all(), f"{name}: a support vector that does not exist")
    else:
        _require(model.support_vectors_.shape[0] == n, f"{name}: numbers of other support vectors")
        _require(isinstance(model.kernel, str), f"{name}: a kernel that is a function")
    _require(model._dual_coef_.shape == (max(1, n_classes - 1), n), f"{name}: coefficients of another shape")
    _require(model._intercept_.shape == (pairs,), f"{name}: another number of intercepts")
    for values in (model._probA, model._probB):
        _require(values.shape in ((0,), (pairs,)), f"{name}: another number of probabilities")


def _check_labels_of_neighbours(model: Any) -> None:
    """Compiled code counts the votes of neighbours: it adds to the place that the label of a neighbour names."""
    if hasattr(model, "_y"):
        labels, name = np.asarray(model._y), type(model).__name__
        classes = model.classes_ if isinstance(model.classes_, list) else [model.classes_]
        _require(labels.dtype.kind == "i" and labels.shape[:1] == model._fit_X.shape[:1], f"{name}: no label per row")
        columns = labels.reshape(len(labels), -1).T
        sound = len(columns) == len(classes) and all(
            ((column >= 0) & (column < len(known))).all() for column, known in zip(columns, classes, strict=True)
        )
        _require(sound, f"{name}: a neighbour has a class that does not exist")


# In the names of LightGBM's settings for files and other machines.
NOT_A_SETTING = r"(^|_)(config|file|filename|fs|machines?|mlist|nodes|port|splits|workers)(_|$)"


def _check_booster(booster: Any) -> None:
    """LightGBM or XGBoost has read the trees. Only a trial in a child process finds trees that crash it."""
    handle = vars(booster).get("_handle", vars(booster).get("handle"))
    _require(isinstance(handle, ctypes.c_void_p) and bool(handle), "Booster: it holds no trees")
    _check_settings(vars(booster).get("params", {}))


def _check_boosted_model(model: Any) -> None:
    """LightGBM joins its settings to one text, so that a text with a space could contain settings that open files."""
    _check_settings({name: value for name, value in vars(model).items() if isinstance(value, str)})
    for name in ("_other_params", "kwargs"):
        _check_settings(vars(model).get(name, {}))


def _check_settings(settings: dict) -> None:
    for name, value in settings.items():
        _require(not re.search(NOT_A_SETTING, name), f"Booster: a setting {name!r}")
        for leaf in _leaves(value):
            plain = leaf is None or isinstance(leaf, NUMBER) or re.fullmatch(r"[\w:.-]*", str(leaf))
            _require(bool(plain), f"Booster: {name} is neither a number nor a word")


STRUCTURES: dict[str, Callable[[Any], None]] = {
    "Tree": _check_tree,
    "TreePredictor": _check_tree_predictor,
    "KDTree": _check_neighbours,
    "BallTree": _check_neighbours,
    "BSpline": _check_spline,
    "RandomState": _check_state,
    "Generator": _check_generator,
    **dict.fromkeys(("KNeighborsClassifier", "RadiusNeighborsClassifier"), _check_labels_of_neighbours),
    "Booster": _check_booster,
    **{f"{kind}{task}": _check_boosted_model for kind in ("LGBM", "XGB") for task in ("Classifier", "Regressor")},
    **dict.fromkeys(("SVC", "NuSVC", "SVR", "NuSVR", "OneClassSVM"), _check_support_vectors),
}


# --- ensembles: their trees read the rows that they have checked ---


def _check_width(model: Any) -> None:
    """One tree, or a forest whose trees all read the same columns; nothing for a model that is not fitted."""
    trees = [model] if hasattr(model, "tree_") else list(np.ravel(getattr(model, "estimators_", [])))
    for tree in trees:
        fits = tree.tree_.n_features == tree.n_features_in_ == model.n_features_in_
        _require(fits, f"{type(model).__name__}: a tree reads another number of columns")


def _check_boosting(model: Any) -> None:
    _check_width(model)
    if hasattr(model, "estimators_"):
        rows = np.zeros((3, model.n_features_in_), "float32")
        shape, name = model._raw_predict_init(rows).shape, type(model).__name__
        _require(shape == (3, model.estimators_.shape[1]), f"{name}: another number of trees per iteration")


def _check_histogram_boosting(model: Any) -> None:
    if not hasattr(model, "_predictors"):
        return
    width, name = model.n_features_in_, type(model).__name__
    _check_bins(model._bin_mapper, model.max_bins, width, name)
    categories = np.asarray(model._bin_mapper.is_categorical_, bool)
    for tree in (tree for iteration in model._predictors for tree in iteration):
        inner = tree.nodes[tree.nodes["is_leaf"] == 0]
        column = inner["feature_idx"]
        _require(((column >= 0) & (column < width)).all(), f"{name}: a node reads a column that does not exist")
        categorical = column[inner["is_categorical"] != 0]
        _require(categories[categorical].all(), f"{name}: a node reads categories of a column that has none")


def _check_bins(mapper: Any, max_bins: int, width: int, name: str) -> None:
    """Further training counts rows per bin in arrays of `n_bins` places."""
    thresholds, categorical = mapper.bin_thresholds_, np.asarray(mapper.is_categorical_, bool)
    _require(categorical.shape == (width,) and len(thresholds) == width, f"{name}: bins of another number of columns")
    n_bins = max_bins + 1
    _require(3 <= n_bins <= 256 and mapper.n_bins == n_bins, f"{name}: another number of bins")
    _require(mapper.missing_values_bin_idx_ == n_bins - 1, f"{name}: another bin for missing values")
    used = np.array([len(limits) + 1 for limits in thresholds]) - categorical
    _require(max(used) < n_bins, f"{name}: more thresholds than bins")
    _require(np.array_equal(mapper.n_bins_non_missing_, used), f"{name}: another number of thresholds than bins")
    for limits in (limits for limits, is_category in zip(thresholds, categorical, strict=True) if is_category):
        _require(((limits >= 0) & (limits < 256)).all(), f"{name}: a category that has no place in a set of bits")


FORESTS = ("RandomForest", "ExtraTrees", "DecisionTree", "ExtraTree")
ENSEMBLES: dict[str, Callable[[Any], None]] = {
    "RandomTreesEmbedding": _check_width,
    **{f"{name}{task}": _check_width for name in FORESTS for task in ("Classifier", "Regressor")},
    **{f"GradientBoosting{task}": _check_boosting for task in ("Classifier", "Regressor")},
    **{f"HistGradientBoosting{task}": _check_histogram_boosting for task in ("Classifier", "Regressor")},
}
