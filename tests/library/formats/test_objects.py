"""Attributes and arrays in forged skops files: refused after loading, before a method of the object is called."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier, RadiusNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, SplineTransformer, StandardScaler
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier
from test_check import LABELS, NUMBERS, X, dump, load_unchecked

from alacarte import formats
from alacarte.errors import UserError

# --- attributes ---


def scaler(**attributes: object) -> StandardScaler:
    model = StandardScaler().fit(X)
    vars(model).update(attributes)
    return model


@pytest.mark.parametrize(
    ("model", "output"),
    [
        (make_pipeline(StandardScaler(), memory="cache"), r"Pipeline\.memory is str 'cache', allowed is null"),
        (make_pipeline(StandardScaler(), verbose=StandardScaler()), r"Pipeline\.verbose is StandardScaler"),
        (GridSearchCV(LogisticRegression(), {}, scoring=np.log), r"GridSearchCV\.scoring is ufunc"),
        (GridSearchCV(LogisticRegression(), {}, scoring={"a": np.log}), r"GridSearchCV\.scoring is dict"),
        (GridSearchCV(LogisticRegression(), {}, n_jobs=StandardScaler()), r"GridSearchCV\.n_jobs is StandardScaler"),
        (GridSearchCV(LogisticRegression(), {}, pre_dispatch="exit()"), r"GridSearchCV\.pre_dispatch is str"),
        (LogisticRegression(random_state=StandardScaler()), r"LogisticRegression\.random_state is StandardScaler"),
        (TfidfVectorizer(input="filename"), r"TfidfVectorizer\.input is str 'filename', allowed is content"),
        (make_pipeline(make_pipeline(scaler(_skl_callbacks=[StandardScaler()]))), r"StandardScaler\._skl_callbacks"),
        (scaler(_listener_handle=("socket", "")), r"StandardScaler\._listener_handle"),
        (scaler(_parent_callback_ctx=StandardScaler()), r"StandardScaler\._parent_callback_ctx"),
        (scaler(callback=np.log), r"StandardScaler\.callback is ufunc"),
        (scaler(__sklearn_tags__=np.asarray), r"StandardScaler\.__sklearn_tags__"),
        (scaler(__class__=StandardScaler()), r"StandardScaler\.__class__"),
        (scaler(transform=np.asarray), r"StandardScaler\.transform would take the place of a method"),
        (scaler(_validate_params=np.asarray), r"StandardScaler\._validate_params would take the place"),
        (scaler(**{"not a name": 1}), r"StandardScaler\.not a name"),
        (scaler(hidden=np.array([None, {"deep": [scaler(memory=1)]}], dtype=object)), r"StandardScaler\.memory"),
    ],
)  # fmt: skip
def test_attributes_that_scikit_learn_acts_on(model: Any, output: str, tmp_path: Path) -> None:
    path = dump(model, tmp_path / "model.skops")
    formats.check_types(path)  # no name in it is refused
    for act in (lambda: formats.load_skops(path), lambda: formats.save_skops(model, tmp_path / "other.skops")):
        with pytest.raises(UserError, match=output):
            act()


def test_a_file_named_in_a_request_is_not_read(tmp_path: Path) -> None:
    """The mechanism: a text model with input="filename" opens the file that its row names."""
    (tmp_path / "secret").write_text("red green")
    model = TfidfVectorizer().fit(["red green", "blue"])
    model.input = "filename"
    path = dump(model, tmp_path / "model.skops")
    assert load_unchecked(path).transform([str(tmp_path / "secret")]).nnz == 2, "the forged file is no attack any more"
    with pytest.raises(UserError, match=r"TfidfVectorizer\.input"):
        formats.load_skops(path)


# --- arrays ---


def forest() -> RandomForestClassifier:
    return RandomForestClassifier(3, random_state=0, max_depth=4).fit(X, LABELS)


def boosted() -> HistGradientBoostingClassifier:
    rows = np.column_stack([X, np.arange(40) % 4])
    model = HistGradientBoostingClassifier(max_iter=3, min_samples_leaf=2, categorical_features=[4])
    return model.fit(rows, np.arange(40) % 2)


def gradient() -> GradientBoostingClassifier:
    return GradientBoostingClassifier(n_estimators=3).fit(X, LABELS)


def neighbours(algorithm: str = "kd_tree") -> KNeighborsClassifier:
    return KNeighborsClassifier(3, algorithm=algorithm, leaf_size=4).fit(X, LABELS)


def change(tree: Any, place: int, change_part: Callable[[Any], Any]) -> None:
    """Change one part of the state of a KDTree or BallTree."""
    state = list(tree.__getstate__())
    state[place] = change_part(state[place].copy() if hasattr(state[place], "copy") else state[place])
    tree.__setstate__(tuple(state))


def put(array: np.ndarray, place: Any, value: Any) -> np.ndarray:
    array[place] = value
    return array


def forge_forest(field: str, value: int) -> RandomForestClassifier:
    model = forest()
    getattr(model.estimators_[1].tree_, field)[0] = value
    return model


def forge_boosted(field: str, value: int, node: int = 0) -> HistGradientBoostingClassifier:
    model = boosted()
    nodes = model._predictors[1][0].nodes
    nodes[field][np.flatnonzero(nodes["is_categorical" if field == "bitset_idx" else "depth"] >= node)[0]] = value
    return model


def forge_neighbours(algorithm: str, place: int, change_part: Callable[[Any], Any]) -> KNeighborsClassifier:
    model = neighbours(algorithm)
    change(model._tree, place, change_part)
    return model


def other_width(model: Any, tree: Any) -> Any:
    """A tree of 4 columns in a model that takes 3 only."""
    assert tree.n_features == 4
    model.n_features_in_ = 3
    return model


def changed(model: Any, **attributes: Any) -> Any:
    vars(model).update(attributes)
    return model


def sparse(index: int) -> csr_matrix:
    matrix = csr_matrix(np.eye(3))
    matrix.indices[0] = index
    return matrix


def swapped(model: GradientBoostingClassifier) -> GradientBoostingClassifier:
    """Two trees an iteration, where the scores have one column: the second tree would write beside them."""
    model.estimators_ = np.column_stack([model.estimators_, model.estimators_])
    return model


def forge_categories(model: HistGradientBoostingClassifier) -> HistGradientBoostingClassifier:
    model._bin_mapper.is_categorical_ = np.zeros(5, "uint8")
    model._bin_mapper.n_bins_non_missing_[0] += 1  # the column of categories
    return model


def forge_bits(model: HistGradientBoostingClassifier) -> HistGradientBoostingClassifier:
    model._predictors[0][0].raw_left_cat_bitsets = np.zeros((9, 1), "uint32")
    return model


def forge_bins(column: int, limits: np.ndarray, **attributes: Any) -> HistGradientBoostingClassifier:
    """Bins of one column; with `attributes` of the bins, or of the model for max_bins."""
    model = boosted()
    mapper = model._bin_mapper
    mapper.bin_thresholds_[column] = limits
    mapper.n_bins_non_missing_[column] = len(limits) + (column != 0)  # column 0 holds categories
    vars(mapper).update({name: value for name, value in attributes.items() if name != "max_bins"})
    return changed(model, max_bins=attributes.get("max_bins", model.max_bins))


def precomputed() -> SVC:
    return SVC(kernel="precomputed").fit(X @ X.T, LABELS)


def one_row_for_all(model: GradientBoostingRegressor) -> GradientBoostingRegressor:
    """First scores of one row, however many rows are asked for: the scores of the others would be written behind them."""
    mean = FunctionTransformer(np.mean, kw_args={"axis": 0, "keepdims": True})
    return changed(model, init_=make_pipeline(mean, DummyRegressor()).fit(X, NUMBERS[:1]))


FORGED: dict[str, tuple[Callable[[], Any], str]] = {
    "child far away": (lambda: forge_forest("children_left", 10**9), "not one after it"),
    "child itself": (lambda: forge_forest("children_right", 0), "not one after it"),
    "child below": (lambda: forge_forest("children_right", -2), "not one after it"),
    "column far away": (lambda: forge_forest("feature", 10**6), "column that does not exist"),
    "column below": (lambda: forge_forest("feature", -1), "column that does not exist"),
    "width of a forest": (lambda: other_width(model := forest(), model.estimators_[0].tree_), "number of columns"),
    "width of boosting": (lambda: other_width(model := gradient(), model.estimators_[0, 0].tree_), "number of columns"),
    "more trees than scores": (lambda: swapped(gradient()), "another number of trees"),
    "boosted child far away": (lambda: forge_boosted("left", 2**32 - 1), "not one after it"),
    "boosted child itself": (lambda: forge_boosted("right", 0), "not one after it"),
    "boosted column": (lambda: forge_boosted("feature_idx", 10**9), "column that does not exist"),
    "boosted set": (lambda: forge_boosted("bitset_idx", 10**6, node=1), "set that does not exist"),
    "boosted categories": (lambda: forge_categories(boosted()), "categories of a column"),
    "boosted bits": (lambda: forge_bits(boosted()), "no sets of bits"),
    "boosted thresholds": (lambda: forge_bins(1, np.arange(400.0)), "more thresholds than bins"),
    "boosted bins": (lambda: forge_bins(1, np.zeros(3), n_bins=7), "another number of bins"),
    "boosted fewer bins": (lambda: forge_bins(1, np.arange(9.0), max_bins=3, n_bins=4), "bin for missing"),
    "boosted missing": (lambda: forge_bins(1, np.zeros(3), missing_values_bin_idx_=99), "bin for missing"),
    "boosted counts": (lambda: forge_bins(1, np.zeros(3), n_bins_non_missing_=np.full(5, 9)), "number of thresholds"),
    "boosted category": (lambda: forge_bins(0, np.array([0.0, 900.0])), "no place in a set of bits"),
    **{f"{algorithm} {name}": (lambda algorithm=algorithm, place=place, part=part: forge_neighbours(algorithm, place, part), said)
       for algorithm in ("kd_tree", "ball_tree")
       for name, place, part, said in (
           ("index", 1, lambda index: put(index, 0, 10**9), "no order of its rows"),
           ("rows", 2, lambda nodes: put(nodes, 0, (0, 10**9, 1, 1.0)), "rows that do not exist"),
           ("leaf", 2, lambda nodes: put(nodes, -1, (0, 1, 0, 1.0)), "node that does not exist"),
           ("bounds", 3, lambda bounds: bounds[:, :, :1].copy(), "another shape"),
           ("leaf size", 4, lambda size: 1, "number of levels"),
           ("nodes", 6, lambda count: count * 1000, "number of nodes"),
       )},
    "support vectors": (lambda: changed(m := SVC().fit(X, LABELS), _n_support=m._n_support * 1000), "number of support vectors"),
    "support coefficients": (lambda: changed(m := SVC().fit(X, LABELS), _dual_coef_=m._dual_coef_[:, :1]), "another shape"),
    "support intercepts": (lambda: changed(SVR().fit(X, NUMBERS), _intercept_=np.zeros(0)), "number of intercepts"),
    "support vectors twice": (lambda: changed(m := SVC().fit(X, LABELS), _n_support=m._n_support * 2), "number of support"),
    "support far away": (lambda: changed(m := precomputed(), support_=m.support_ + 10**6), "support vector that does not"),
    "votes far away": (lambda: changed(m := neighbours("brute"), _y=m._y + 10**6), "class that does not exist"),
    "votes below": (lambda: changed(m := RadiusNeighborsClassifier().fit(X, LABELS), _y=m._y - 1), "class that does not exist"),
    "fewer first scores": (lambda: one_row_for_all(GradientBoostingRegressor(n_estimators=2).fit(X, NUMBERS)), "number of trees"),
    "an array to write into": (lambda: FunctionTransformer(np.negative, kw_args={"out": np.zeros(3)}), "an argument out"),
    "an array to write into by place": (lambda: FunctionTransformer(partial(np.negative, np.zeros(3))), "have no names"),
    "sparse": (lambda: changed(StandardScaler(), extra=sparse(10**6)), "indices must be < 3"),
    "spline": (lambda: changed(m := SplineTransformer().fit(X), bsplines_=[changed(m.bsplines_[0], k=10**6)]), "[Kk]nots|spline"),
    "random state": (lambda: StandardScaler(copy=position(np.random.RandomState(0), 10**9)), "no position"),
}  # fmt: skip


def position(random: np.random.RandomState, place: int) -> np.random.RandomState:
    state = random.get_state(legacy=False)
    state["state"]["pos"] = place
    random.set_state(state)
    return random


@pytest.mark.parametrize("name", FORGED)
def test_forged_arrays_are_refused(name: str, tmp_path: Path) -> None:
    make, output = FORGED[name]
    path = dump(make(), tmp_path / "model.skops")
    with pytest.raises(UserError, match=output):
        formats.load_skops(path)


def test_a_tree_that_says_it_has_more_nodes_is_refused(tmp_path: Path) -> None:
    """node_count is a number beside the array; the compiled code believes the number."""
    model = DecisionTreeClassifier(max_depth=2).fit(X, LABELS)
    state = model.tree_.__getstate__()
    model.tree_.__setstate__({**state, "nodes": state["nodes"].copy(), "node_count": 10**9})
    with pytest.raises(UserError, match="more nodes than there are"):
        formats.objects.check_object(model, "the model")


@pytest.mark.parametrize(
    "make",
    [
        *(
            forest,
            boosted,
            gradient,
            neighbours,
            lambda: neighbours("ball_tree"),
            lambda: IsolationForest(n_estimators=5).fit(X),
        ),
        precomputed,
        *(lambda: SVR().fit(X, NUMBERS), lambda: KNeighborsClassifier().fit(X, np.column_stack([LABELS, LABELS]))),
        lambda: GradientBoostingClassifier(n_estimators=2, init=LogisticRegression()).fit(X, LABELS),
    ],
)
def test_what_fit_leaves_passes(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    formats.save_skops(model, tmp_path / "model.skops")
    rows = np.zeros((2, model.n_features_in_))
    assert (formats.load_skops(tmp_path / "model.skops").predict(rows) == model.predict(rows)).all()
