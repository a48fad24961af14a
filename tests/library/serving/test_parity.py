"""Which path a model takes: a path that does not give MLflow's answers is refused, and own code goes through a DataFrame."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from bodies import JSON
from mlflow.models import Model, infer_signature
from mlflow.pyfunc import PyFuncModel
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from test_model import ask_mlflow

from alacarte.serving.fastpath import transformers
from alacarte.serving.model import ServedModel
from alacarte.serving.rows import Answer, RequestError

NUMBERS = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 3)), columns=list("abc"))
TEXT = NUMBERS.assign(word=["red", "green", None] * 20, code=pd.Series([1, 2.5, 3] * 20, dtype=object))
LABELS = np.where(NUMBERS["a"] > 0, "yes", "no")


def with_squares(X: pd.DataFrame) -> pd.DataFrame:
    return X.assign(square=X["a"] ** 2)


def without_mean(X: pd.DataFrame) -> pd.DataFrame:
    """What no feature should do: the rows of a request change each other's answers."""
    return X - X.mean()


def as_text(X: pd.DataFrame) -> pd.DataFrame:
    return X[["word", "code"]].astype(str)


def served(folder: Path, model: Pipeline, X: pd.DataFrame) -> ServedModel:
    """A model with functions of this file, as if these were in `project/`, before its fast path is looked for."""
    mlflow.sklearn.save_model(
        model, folder, signature=infer_signature(X, model.predict(X)), input_example=X[:6], pip_requirements=[],
        serialization_format="cloudpickle",
    )  # fmt: skip
    pyfunc = PyFuncModel(Model.load(str(folder)), model, "predict")
    pyfunc.input_example = X[:6]
    return ServedModel(folder, "sklearn", model, pyfunc)


def body_of(X: pd.DataFrame) -> bytes:
    rows = X.astype(object).where(X.notna(), None)
    return json.dumps({"dataframe_split": {"columns": list(X), "data": rows.to_numpy().tolist()}}).encode()


@pytest.mark.parametrize(
    ("function", "X", "joint"),
    [(with_squares, NUMBERS, True), (as_text, TEXT, True), (without_mean, NUMBERS, False)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_own_features_go_through_a_frame(function: Callable, X: pd.DataFrame, joint: bool, tmp_path: Path):
    scale = OneHotEncoder(handle_unknown="ignore") if function is as_text else StandardScaler()
    model = make_pipeline(FunctionTransformer(function), scale, LogisticRegression()).fit(X, LABELS)
    slow, quick = served(tmp_path / "model", model, X), served(tmp_path / "again", model, X)
    quick.find_fast_path()
    assert (slow.path_in_use, quick.path_in_use) == ("pyfunc", "frame")
    pyfunc = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    parts = [X[i : i + 1 + i % 3] for i in range(0, 40, 2)]
    requests = [quick.parse(body_of(part), JSON, 99) for part in parts]
    fast = [rows for rows in requests if rows.fast]
    assert len(fast) > 5 and all(quick.can_join(rows) == joint for rows in fast)
    for part, answer in zip(parts, quick.predict(requests), strict=True):
        (expected,) = slow.predict([slow.parse(body_of(part), JSON, 99)])
        assert isinstance(answer, Answer) and isinstance(expected, Answer)
        assert answer.labels == expected.labels == ask_mlflow(pyfunc, JSON, body_of(part))
        assert answer.confidence == pytest.approx(expected.confidence)


def spoiled(answer: Callable[[Any], tuple]) -> dict[str, Callable[[Any], tuple]]:
    def refuse_single_rows(rows: np.ndarray) -> tuple:
        if len(rows) == 1:
            raise ValueError
        return answer(rows)

    return {
        "other numbers": lambda rows: (answer(rows)[0] * (1 + 1e-4), None),
        "no confidence": lambda rows: (answer(rows)[0], None),
        "fills missing values": lambda rows: answer(np.nan_to_num(rows)),
        "refuses single rows": refuse_single_rows,
    }


@pytest.mark.parametrize(
    ("estimator", "fault", "path"),
    [
        (LinearRegression(), "other numbers", "frame"),
        (LogisticRegression(), "no confidence", "frame"),
        (LogisticRegression(), "fills missing values", "numpy"),
        (LinearRegression(), "refuses single rows", "numpy"),
    ],
)
def test_a_path_that_disagrees_is_not_taken(estimator: Any, fault: str, path: str, tmp_path: Path, monkeypatch) -> None:
    compile_model = transformers.compile_model
    monkeypatch.setattr(transformers, "compile_model", lambda *arguments: spoiled(compile_model(*arguments))[fault])
    y = LABELS if isinstance(estimator, LogisticRegression) else NUMBERS["a"]
    model = served(tmp_path / "model", make_pipeline(StandardScaler(), estimator).fit(NUMBERS, y), NUMBERS)
    model.find_fast_path()
    assert model.path_in_use == path
    missing = model.parse(body_of(NUMBERS[:1].assign(a=np.nan)), JSON, 9)
    assert isinstance(model.predict([missing])[0], RequestError)  # as of MLflow
