"""Each family, from fit to a served answer, over numeric and mixed tables and both tasks."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, environment, tracking
from learning import ALL, FAMILIES, fitted, learner, table
from mlflow.pyfunc import scoring_server

from alacarte import features, learners
from alacarte.errors import UserError
from alacarte.features import TABULAR
from alacarte.serving.model import ServedModel

TASKS = ("classification", "regression")
MISSING = (None, np.nan, pd.NA, pd.NaT)


def equal(actual: object, expected: object) -> bool:
    actual, expected = np.asarray(actual), np.asarray(expected)
    if expected.dtype.kind == "f":
        return np.allclose(actual.astype(float), expected, rtol=1e-4)
    return actual.tolist() == expected.tolist()


def as_json(rows: pd.DataFrame) -> bytes:
    """Rows as the body of a request."""
    dates = {name: column.astype(str).replace("NaT", None) for name, column in rows.items() if column.dtype.kind == "M"}
    cells = rows.assign(**dates).astype(object)
    return json.dumps({"dataframe_split": cells.where(cells.notna(), None).to_dict("split", index=False)}).encode()


def served(model: mlflow.pyfunc.PyFuncModel, body: bytes, kind: str = "application/json") -> list:
    """The answer of the function behind `mlflow models serve`."""
    answer = scoring_server.invocations(body, kind, model, model.metadata.get_input_schema())
    return json.loads(answer.response)["predictions"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ALL)
def test_what_is_saved_answers_the_same_everywhere(
    family: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, (X, y) = fitted(family, "mixed", task), table("mixed", task)
    expected, is_network = made.predict(X), family in ("torch_mlp", "keras_mlp")
    if is_network:  # to MLflow, skops is a pickle too
        monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    if task == "classification":
        assert made.classes == ["high", "low", "mid"] and (expected == y).mean() > 0.5
        assert made.predict_proba(X).shape == (len(X), 3)
    else:
        assert made.classes is None and made.predict_proba(X) is None and expected.dtype.kind == "f"
        assert 1 - ((expected - y) ** 2).mean() / y.var() > 0.25
    folder = tmp_path / "model"
    made.save(folder, example=X.head(5), metadata={"about": "this"})

    again = learners.load(folder)
    assert (again.task, again.classes) == (made.task, made.classes) and equal(again.predict(X), expected)
    if task == "classification":
        assert np.allclose(again.predict_proba(X), made.predict_proba(X))
    stock = mlflow.pyfunc.load_model(str(folder))
    assert equal(stock.predict(X), expected) and equal(stock.predict(X[2:3]), expected[2:3])
    metadata = stock.metadata.metadata
    assert (metadata["about"], metadata["learner"]) == ("this", type(made).__module__)
    assert metadata["example_predictions"] == made.predict(X.head(5)).tolist()
    pins = (folder / "requirements.txt").read_text().split()
    assert all("==" in pin and "+" not in pin for pin in pins)
    assert any(pin.startswith("torch==") for pin in pins) == is_network
    package = family.removesuffix("_mlp") if family in ALL.keys() - FAMILIES else "scikit-learn"
    assert any(pin.startswith(package) for pin in pins)
    assert equal(stock.predict(stock.input_example), expected[:5])
    if is_network:
        import torch

        flavor, numbers = getattr(mlflow, "pytorch" if family == "torch_mlp" else "keras"), made.numbers(X)
        native = flavor.load_model(str(folder))(torch.from_numpy(numbers))
        assert np.allclose(native.detach().numpy(), made.outputs(numbers), atol=1e-5)
    else:
        assert equal(mlflow.sklearn.load_model(str(folder)).predict(X), expected)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("labels", [["yes", "no"], [3, 7], [True, False]])
def test_labels_stay_what_they_are(family: str, labels: list, tmp_path: Path) -> None:
    X, _ = table("numeric", "classification")
    y = pd.Series(np.where(X["a"] > 0, labels[0], labels[1]).tolist())
    made = learner(family)
    made.fit(X[:120], y[:120], X[120:], y[120:], task="classification", seed=0)
    made.save(tmp_path / "model", example=X.head(2), metadata={})
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    for answer in (made.predict(X), model.predict(X)):
        assert {type(label) for label in answer.tolist()} == {type(labels[0])}
        assert (answer == y).mean() > 0.7
    assert made.classes == sorted(labels) and json.dumps(made.classes)
    names = {str: "string", int: "long", bool: "boolean"}
    assert [column.type.name for column in model.metadata.signature.outputs] == [names[type(labels[0])]]
    assert served(model, X.to_csv(index=False).encode(), "text/csv") == model.predict(X).tolist()


@pytest.mark.parametrize("family", ["sklearn_hgb", "torch_mlp"])
def test_every_sign_of_a_missing_value_means_the_same(family: str) -> None:
    made, (X, _) = fitted(family, "mixed", "regression"), table("mixed", "regression")
    rows = X.head(3).astype(object)
    for name in X.columns:
        answers = []
        for sign in MISSING:
            changed = rows.copy()
            changed[name] = pd.Series([sign] * 3, dtype=object)
            answers.append(made.predict(changed))
        assert all(np.array_equal(answer, answers[0]) for answer in answers), name


@pytest.mark.parametrize("family", ["sklearn_forest", "torch_mlp"])
def test_rows_that_look_otherwise_than_in_training(family: str, tmp_path: Path) -> None:
    made, (X, _) = fitted(family, "mixed", "regression"), table("mixed", "regression")
    expected = made.predict(X)
    assert equal(made.predict(X[X.columns[::-1]].assign(other=1)), expected)
    for dtype in ("float64", "Int64", "int32", object):
        assert equal(made.predict(X.astype({"floors": dtype})), expected), dtype
    for unit in ("s", "ms", "ns"):
        assert equal(made.predict(X.assign(sold=X["sold"].dt.as_unit(unit))), expected), unit
    assert equal(made.predict(X.assign(garden=X["garden"].astype("boolean"))), expected)
    assert equal(made.predict(X.assign(town=X["town"].astype("category"))), expected)
    assert equal(made.predict(X.assign(listed=pd.to_datetime(X["listed"]))), expected)
    assert np.isfinite(made.predict(X.assign(town="Oslo", sold=pd.Timestamp("9999-12-31")))).all()
    with ThreadPoolExecutor(4) as pool:
        assert all(equal(answer, expected) for answer in pool.map(made.predict, [X] * 8))
    with pytest.raises(UserError, match="0 sample"):
        made.predict(X[:0])
    with pytest.raises(UserError, match="area"):
        made.predict(X.drop(columns="area"))
    with pytest.raises(UserError, match="yesterday"):
        made.predict(X.assign(listed="yesterday"))


def test_a_column_of_data_text_is_text_where_each_value_is_a_date() -> None:
    X = pd.DataFrame({"joined": ["2020-01-01", "2020-01-02"] * 4, "seen": ["2020-01-01", "2020-01-02"] * 4})
    made = features.make_features("alacarte.features.Tabular", TABULAR, ["joined"])
    for _ in range(2):  # also in a retraining from scratch
        preprocess, _ = made.fit_transform(X, X["seen"])
        assert [(kind, names) for kind, _, names in preprocess.transformers] == [
            ("text", ["joined"]),
            ("date", ["seen"]),
        ]
        made = features.unfitted(preprocess)


def test_columns_of_every_kind() -> None:
    days = pd.to_datetime(["2020-01-01", None, "9999-12-31", "1600-03-01"])
    X = pd.DataFrame(
        {
            "constant": 1,
            "nothing": [None] * 4,
            "nan": [np.nan] * 4,
            "unsigned": np.array([1, 2, 3, 4], "uint8"),
            "nullable": pd.array([1, None, 3, 4], "Int64"),
            "sizes": pd.Categorical([1, 2, None, 1]),
            "names": pd.Categorical(["x", None, "y", "x"]),
            "mixed": pd.Series(["x", 1, None, "y"], dtype=object),
            "codes": ["2020", "2021", None, "1999"],
            "zoned": days.tz_localize("Europe/Berlin"),
            "times": ["2020-01-01T10:00:00Z", "2020-01-01 10:00", None, "2020-01-01"],
            "dates": pd.Series([day.date() if pd.notna(day) else None for day in days], dtype=object),
            "almost": ["2020-01-01", "2020-13-01", None, "2020-01-02"],
        }
    )
    preprocess, _ = TABULAR.fit_transform(X)
    kinds = {name: kind for kind, _, names in preprocess.transformers_ if kind != "remainder" for name in names}
    dates, text = ["zoned", "times", "dates"], ["nothing", "names", "mixed", "codes", "almost"]
    assert kinds == {name: "date" if name in dates else "text" if name in text else "numeric" for name in X.columns}
    numbers = preprocess.transform(X)
    assert numbers.shape[0] == 4 and np.isfinite(numbers).all() and numbers.dtype == "float64"
    columns = features.signature(preprocess, X, None).inputs.input_dict()
    assert list(columns) == list(X.columns)
    types = {name: getattr(spec.type, "name", "any") for name, spec in columns.items()}
    assert types["codes"] == "string" and types["dates"] == "datetime" and types["nan"] == "double"
    assert types["zoned"] == types["constant"] == types["names"] == types["sizes"] == "any"
    for bad in ([[1], [2]], [1 + 2j, 3j], [b"x", b"y"]):
        with pytest.raises(UserError, match="column 'bad'"):
            TABULAR.fit_transform(pd.DataFrame({"bad": bad}))


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("torch_mlp", ["device=cuda:99"], r"model\.device=cuda:99"),
        ("torch_mlp", ["network._target_=collections.Counter"], r"model\.network\._target_=collections\.Counter"),
        ("torch_mlp", ["lr=1e30"], r"model\.lr=1e\+30"),
        ("torch_mlp", ["batch_size=0"], r"model\.batch_size=0: allowed are whole numbers from 1"),
        ("torch_mlp", ["network.hidden=abc"], r"model\.network: project\.networks\.MLP: .*size"),
        ("keras_mlp", ["network._target_=project.networks.MLP"], r"project\.networks\.MLP: allowed are functions"),
        ("keras_mlp", ["patience=0"], r"model\.patience=0: allowed are whole numbers from 1"),
        ("keras_mlp", ["network.hidden=abc"], r"model\.network: project\.networks\.keras_mlp: "),
        ("sklearn_sgd", ["lr=-1"], r"model: SGDClassifier: .*eta0"),
        ("lightgbm", ["num_leaves=1"], r"model: (?s:.*)num_leaves"),
        ("xgboost", ["max_depth=-5"], r"model: (?s:.*)max_depth"),
    ],
)
def test_a_setting_that_cannot_be_is_named(family: str, settings: list[str], words: str) -> None:
    X, y = table("numeric", "classification")
    with pytest.raises(UserError, match=words):
        made = learner(family, "classification", *(f"model.{setting}" for setting in settings))
        made.fit(X, y, X, y, task="classification", seed=0)


@pytest.mark.parametrize(("does", "asked"), [("Regressor", "classification"), ("Classifier", "regression")])
def test_an_estimator_of_another_task_is_named(does: str, asked: str) -> None:
    X, y = table("numeric", asked)
    made = learner("sklearn", "regression" if does == "Regressor" else "classification")
    with pytest.raises(UserError, match=rf"ExtraTrees{does}.*data\.task={asked}"):
        made.fit(X, y, X, y, task=asked, seed=0)


def test_the_seed_decides_what_is_drawn_at_random() -> None:
    X, y = table("numeric", "regression")
    for family in ("sklearn", "torch_mlp"):
        answers = []
        for seed in (0, 0, 1):
            made = learner(family, "regression")
            made.fit(X[:120], y[:120], X[120:], y[120:], task="regression", seed=seed)
            answers.append(made.predict(X))
        assert np.array_equal(answers[0], answers[1]) and not np.array_equal(answers[0], answers[2])


def test_torch_reports_its_epochs_and_stops_early(capfd: pytest.CaptureFixture[str]) -> None:
    X, y = table("numeric", "classification")
    seen: list[tuple[int, dict[str, float]]] = []
    made = learner("torch_mlp", "classification", "model.max_epochs=500", "model.patience=3", "model.lr=0.05")
    made.fit(
        *(X[:120], y[:120], X[120:], y[120:]),
        task="classification",
        seed=0,
        on_epoch=lambda *pair: seen.append(pair),
    )
    losses = [metrics["val_loss"] for _, metrics in seen]
    assert [epoch for epoch, _ in seen] == list(range(len(seen))) and len(seen) < 500
    assert set(seen[0][1]) == {"train_loss", "val_loss", "val_accuracy"}
    assert len(losses) - 1 - int(np.argmin(losses)) == 3
    best = seen[int(np.argmin(losses))][1]["val_accuracy"]
    assert (made.predict(X[120:]) == y[120:]).mean() == pytest.approx(best)
    assert "training on cpu" in capfd.readouterr().err


def test_scikit_learn_alone_imports_no_torch(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from learning import fitted, table
        from alacarte import learners
        X, _ = table("mixed", "classification")
        fitted("sklearn_sgd", "mixed", "classification").save(Path(sys.argv[1]), example=X.head(2), metadata={})
        learners.load(sys.argv[1]).predict(X)
        assert "torch" not in sys.modules
    """
    env = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests" / "library")]))
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], env=env, check=True)


def test_logged_models_answer_as_mlflow_serves_them(tmp_path: Path) -> None:
    """Over rows with values that are missing or were not in training."""
    X, _ = table("mixed", "classification")
    rows = X.head(20).astype({"floors": object})
    rows.loc[1, "floors"] = None  # missing in an integer column that had none in training
    rows.loc[2, "town"] = "Oslo"
    rows.loc[3] = None
    for family in ("sklearn_hgb", "torch_mlp"):
        made = fitted(family, "mixed", "classification")
        with tracking(f"sqlite:///{tmp_path}/mlflow.db"):
            experiment = mlflow.create_experiment(family, artifact_location=(tmp_path / "artifacts").as_uri())
            with mlflow.start_run(experiment_id=experiment) as run:
                info = made.log("model", example=X.head(5), metadata={"about": "this"})
                mlflow.log_metric("val_accuracy", 0.5, model_id=info.model_id)
            logged = mlflow.get_logged_model(info.model_id)
            assert logged.source_run_id == run.info.run_id and logged.metrics[0].key == "val_accuracy"
            version = mlflow.register_model(info.model_uri, family).version
            mlflow.MlflowClient().set_registered_model_alias(family, "champion", version)
            model = mlflow.pyfunc.load_model(f"models:/{family}@champion")
        assert model.metadata.metadata["about"] == "this"
        for part in (rows, rows[3:4]):
            assert served(model, as_json(part)) == made.predict(part).tolist()
        parquet = rows.astype({"floors": "Int64"}).to_parquet()
        assert served(model, parquet, "application/vnd.apache.parquet") == made.predict(rows).tolist()


@pytest.mark.parametrize("family", ["lightgbm", "xgboost"])
def test_our_server_answers_alike_on_each_path(family: str, tmp_path: Path) -> None:
    X, _ = table("mixed", "classification")
    made = fitted(family, "mixed", "classification")
    made.save(tmp_path / "model", example=X.head(5), metadata={})
    model = ServedModel.load(tmp_path / "model", trust_code=False)
    for path in ("MLflow's own path", "the fast path"):
        [answer] = model.predict([model.parse(as_json(X), "application/json", len(X))])
        assert answer.labels == made.predict(X).tolist(), path
        model.find_fast_path()
    assert model.path_in_use != "pyfunc"
