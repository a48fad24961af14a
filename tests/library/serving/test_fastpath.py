"""The numpy path against the models themselves: labels exactly, probabilities to the last bits."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import test_serve as contract
from conftest import Project
from learning import FAMILIES, fitted, learner, table
from people import people
from registries import until
from servers import register_constant, serving
from sklearn import datasets, ensemble, linear_model, naive_bayes, neural_network
from sklearn.base import BaseEstimator, TransformerMixin, clone, is_classifier
from sklearn.compose import TransformedTargetRegressor, make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from alacarte.serving.fastpath import estimators
from alacarte.serving.fastpath.transformers import compile_model

pytestmark = pytest.mark.filterwarnings("ignore")


def rows_of(X: pd.DataFrame, numeric: bool) -> np.ndarray | list[np.ndarray]:
    """As the server has them: one float array, or a column of plain Python values each, None where missing."""
    if numeric:
        return X.to_numpy("float64")
    columns = []
    for name in X:
        column = np.empty(len(X), dtype=object)
        column[:] = [None if pd.isna(value) else value for value in X[name].tolist()]
        columns.append(column)
    return columns


def agree(model, X: pd.DataFrame, numeric: bool = False, made=None, close: float = 1e-9) -> None:
    """On X, on parts of it, and on single rows."""
    fast = made or compile_model(model, list(X.columns), numeric)
    for part in [X, X[:60], X[:20], *(X[i : i + 1] for i in range(0, len(X), len(X) // 6 + 1))]:
        rows = rows_of(part, numeric)
        kept = np.copy(rows) if numeric else [np.copy(column) for column in rows]
        labels, probabilities = fast(rows)
        expected = model.predict(part)
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(labels, expected, rtol=close)
        else:
            assert labels.tolist() == expected.tolist()
        if probabilities is not None:
            np.testing.assert_allclose(probabilities, model.predict_proba(part), rtol=0, atol=close)
        np.testing.assert_equal(rows, kept)  # untouched


def perturbed(X: pd.DataFrame, rows: int = 1000, seed: int = 1) -> pd.DataFrame:
    """Each column shuffled on its own, with more missing values, new categories, new dates and far numbers."""
    random, out = np.random.default_rng(seed), {}
    for name, column in X.items():
        values = column.sample(rows, replace=True, random_state=seed + len(out)).tolist()
        if column.dtype.kind in "if":
            values = [value * random.choice([1, 1, -40]) for value in values]
        if column.dtype == "str":
            values[: rows // 9] = ["1999-12-31T23:59:58" if name in ("listed", "since") else "Zürich"] * (rows // 9)
        for i in random.choice(rows, rows // 5, replace=False):
            values[i] = None
        out[name] = pd.Series(values, dtype=column.dtype if column.dtype.kind in "fM" else object)
    return pd.DataFrame(out)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("kind", ["numeric", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, kind: str, task: str):
    made, (X, _), numeric = fitted(family, kind, task), table(kind, task), kind == "numeric"
    model = made if family == "torch_mlp" else made.model
    fast = compile_model(model, list(X.columns), numeric)
    for each in (X, perturbed(X)):
        agree(model, each, numeric, fast, close=1e-5 if family == "torch_mlp" else 1e-9)
    probabilities = fast(rows_of(X, numeric))[1]
    assert (probabilities is None) == (task == "regression")


def test_values_that_are_text_in_one_row_and_numbers_in_another():
    X, _ = table("mixed", "classification")
    X = X.assign(town=[None, 3, True, "Lyon", 2.5, "Lyon\0"] * 26 + ["Bonn"] * 4).astype({"town": object})
    made = learner("sklearn_sgd")
    made.fit(X, table("mixed", "classification")[1], X, None, task="classification", seed=0)
    agree(made.model, X)
    agree(fitted("sklearn_sgd", "mixed", "classification").model, X)


MODELS = [
    LogisticRegression(),
    LogisticRegression(solver="newton-cg", fit_intercept=False),
    linear_model.SGDClassifier(loss="log_loss", random_state=0),
    linear_model.RidgeClassifier(),
    neural_network.MLPClassifier([8], max_iter=20, random_state=0),
    ensemble.RandomForestClassifier(7, random_state=0),
    ensemble.ExtraTreesClassifier(30, min_samples_leaf=4, random_state=0, n_jobs=2),
    ensemble.GradientBoostingClassifier(n_estimators=5),
    ensemble.HistGradientBoostingClassifier(max_iter=9),
    ensemble.VotingClassifier([("a", LogisticRegression()), ("b", naive_bayes.GaussianNB())], voting="soft"),
    linear_model.LinearRegression(),
    linear_model.SGDRegressor(random_state=0),
    ensemble.RandomForestRegressor(11, random_state=0),
    ensemble.HistGradientBoostingRegressor(max_iter=9, loss="poisson"),
    TransformedTargetRegressor(linear_model.Ridge(), func=np.log1p, inverse_func=np.expm1),
    TransformedTargetRegressor(linear_model.Ridge(), transformer=StandardScaler()),
]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_estimators_others_log(model, classes):
    X, y = datasets.make_classification(240, 9, n_informative=5, n_classes=classes, random_state=0)
    X = pd.DataFrame(X, columns=list("abcdefghi"))
    y = np.array(["no", "yes", "maybe"])[y] if is_classifier(model) else y + np.exp(X["a"])
    model = clone(model).fit(X, y)
    agree(model, X, numeric=True)
    agree(make_pipeline(StandardScaler(), model).fit(X.to_numpy(), y), X.set_axis(range(9), axis=1), numeric=True)


def refuses(fast, rows) -> None:
    with pytest.raises(ValueError):
        fast(rows)


def test_rows_that_only_the_model_can_judge_raise():
    for task, family in (("classification", "sklearn_forest"), ("regression", "sklearn_hgb")):
        refuses(compile_model(fitted(family, "numeric", task).model, list("abcd"), True), np.array([[np.inf, 0, 0, 0]]))
    numbers, y = people()[["age", "income"]].to_numpy(), people()["y"]
    for model in (LogisticRegression(), ensemble.RandomForestClassifier(3)):
        fast = compile_model(model.fit(numbers, y), ["age", "income"], True)
        for bad in (np.nan, np.inf, -np.inf):
            refuses(fast, np.array([[1.0, bad]]))
    forest = ensemble.RandomForestRegressor(3).fit(numbers, y == "no")
    refuses(compile_model(forest, ["a", "b"], True), np.array([[1.0, 1e300]]))


class Foreign(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return X


def test_a_step_that_is_not_known_raises():
    X, y = people()[["age", "income", "city"]], people()["y"]
    numbers = X[["age", "income"]]
    encoder = make_column_transformer((OneHotEncoder(), ["city"]), remainder="passthrough")
    for model, rows in (
        (make_pipeline(Foreign(), LogisticRegression()), numbers),
        (make_pipeline(FunctionTransformer(lambda X: X), LogisticRegression()), numbers),
        (make_pipeline(encoder, LogisticRegression()), X),
        (ensemble.HistGradientBoostingClassifier(max_iter=2), numbers.astype({"age": "category"})),
    ):
        with pytest.raises(estimators.NotKnown):
            compile_model(model.fit(rows, y), list(rows.columns), rows is numbers)
    with pytest.raises(estimators.NotKnown, match="other columns"):
        compile_model(LogisticRegression().fit(X[["income", "age"]], y), ["age", "income"], True)


@pytest.mark.parametrize(
    ("family", "attributes"),
    [
        (ensemble.RandomForestClassifier(3), {"n_estimators": 10**7}),
        (ensemble.HistGradientBoostingClassifier(max_iter=2), {"classes_": np.arange(10**6)}),
        (ensemble.HistGradientBoostingClassifier(max_iter=2), {"_baseline_prediction": np.zeros(0)}),
    ],
)
def test_treelite_gets_no_wrong_number_of_trees(family, attributes):
    """It would read behind its arrays."""
    X, y = people()[["age", "income"]].fillna(0.0), people()["y"]
    model = clone(family).fit(X, y if is_classifier(family) else X["age"])
    vars(model).update(attributes)
    with pytest.raises(estimators.NotKnown, match="number of trees"):
        estimators.compile_estimator(model)


@pytest.mark.parametrize("many", [0, 10**9], ids=["by the estimator", "by treelite"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_values_at_the_thresholds_of_trees(task, many, monkeypatch):
    monkeypatch.setattr(estimators, "MANY", many)
    X, y = table("numeric", task)
    X = X.to_numpy()
    kind = {"classification": "Classifier", "regression": "Regressor"}[task]
    for family, settings in (
        ("ExtraTrees", {"n_estimators": 20, "random_state": 0}),
        ("HistGradientBoosting", {"max_iter": 9}),
    ):
        model = getattr(ensemble, family + kind)(**settings).fit(X, y)
        if family.startswith("Hist"):
            nodes = np.concatenate([each.nodes for step in model._predictors for each in step])
            places, thresholds = nodes["feature_idx"], np.where(nodes["is_leaf"], 0, nodes["num_threshold"])
        else:
            trees = [each.tree_ for each in np.ravel(model.estimators_)]
            places, thresholds = (
                np.concatenate([getattr(each, name) for each in trees]) for name in ("feature", "threshold")
            )
        values = np.tile(X[:1], (3 * len(places), 1))
        around = [np.nextafter(thresholds, -np.inf), thresholds, np.nextafter(thresholds, np.inf)]
        values[np.arange(len(values)), np.tile(places, 3)] = np.concatenate(around)
        agree(model, pd.DataFrame(values), numeric=True)


def test_ties_go_to_the_class_that_scikit_learn_takes():
    X, y = np.array([[0.0], [1.0], [0.0], [1.0]] * 6), np.array(["b", "a", "c", "c"] * 6)
    agree(ensemble.RandomForestClassifier(4, bootstrap=False).fit(X, y), pd.DataFrame(X), numeric=True)
    zero = LogisticRegression().fit(X, y)
    zero.coef_, zero.intercept_ = np.zeros((3, 1)), np.zeros(3)
    agree(zero, pd.DataFrame(X), numeric=True)
    halves = LogisticRegression().fit(X, y == "c")
    halves.coef_, halves.intercept_ = np.zeros((1, 1)), np.zeros(1)
    agree(halves, pd.DataFrame(X), numeric=True)
    never = linear_model.SGDClassifier(loss="log_loss").fit(X, y)
    never.coef_, never.intercept_ = np.zeros((3, 1)), np.full(3, -1e4)
    agree(never, pd.DataFrame(X), numeric=True)


def test_threads_do_not_disturb_each_other():
    X, _ = table("mixed", "classification")
    for family in ("sklearn_forest", "sklearn_hgb", "sklearn_mlp"):
        model = fitted(family, "mixed", "classification").model
        fast = compile_model(model, list(X.columns), False)
        parts = [X[i : i + 1 + i % 30] for i in range(120)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda part: fast(rows_of(part, False))[0].tolist(), parts))  # noqa: B023
        assert answers == [model.predict(part).tolist() for part in parts]


def test_a_server_without_the_folder_passes_the_contract_tests(project: Project):
    shutil.rmtree(project.root / "alacarte/serving/fastpath")
    register_constant(project, contract.NAME, 1)
    with serving(project, f"registered_model_name={contract.NAME}", "feedback.audit_share=0.5") as server:
        server.wait()
        contract.test_an_answer_says_which_version_gave_it(server)
        contract.test_every_route_answers(server)
        contract.test_feedback_on_a_prediction_of_just_now(server)
        contract.test_a_web_page_elsewhere_cannot_reach_an_open_server(server)
        (cases,) = contract.test_a_bad_request_gets_one_line.pytestmark
        for path, body, status in cases.args[1]:
            contract.test_a_bad_request_gets_one_line(server, path, body, status)
        assert server.ask("/status").body["path"] == "pyfunc"
        output = "no fast path: ModuleNotFoundError"  # after the search was tried in a child process
        until(lambda: any(output in line for line in server.lines), lambda: server.lines)
