"""The answers of ServedModel beside those of `mlflow models serve`: every format, and what nobody should send."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from bodies import JSON, SECRET, bad, good
from learning import fitted, table
from mlflow.models import infer_signature
from mlflow.pyfunc import scoring_server
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from threadpoolctl import threadpool_limits

from alacarte.serving import requests
from alacarte.serving.model import RequestError, ServedModel
from alacarte.serving.requests import read_numbers

MAX_ROWS = 1000


def numeric_table(rows: int = 60) -> tuple[pd.DataFrame, np.ndarray]:
    names = [*(f"x{i}" for i in range(29)), "x[29]"]
    X = pd.DataFrame(np.random.default_rng(0).normal(size=(rows, 30)), columns=names)
    return X, np.where(X["x0"] + X["x1"] > 0, "yes", "no")


def save_sklearn(folder: Path, model: Any, X: Any, **settings: Any) -> Path:
    answers = getattr(model, settings.get("pyfunc_predict_fn", "predict"))(X)
    settings = {"signature": infer_signature(X, answers), "input_example": X[:5], **settings}
    mlflow.sklearn.save_model(
        model, folder, pip_requirements=["scikit-learn"], **{"serialization_format": "skops", **settings}
    )
    return folder


def rows_of(name: str) -> pd.DataFrame:
    """Rows as JSON holds them: numbers, text and None."""
    if name == "numeric":
        return numeric_table()[0][:3]
    X, _ = table("mixed", "classification")
    rows = X[:12].copy()
    rows["sold"] = rows["sold"].astype(str).replace("NaT", None)
    rows = rows.astype(object)
    rows.loc[1, "town"] = "Oslo"
    rows.loc[2] = None
    return rows.where(rows.notna(), None)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Boosted trees start a thread per processor and tree, which on a busy machine wait for each other."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    X, y = numeric_table()
    save_sklearn(root / "numeric", make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y), X)
    for name, family, task in (("torch", "torch_mlp", "classification"), ("boosted", "sklearn_hgb", "regression")):
        mixed, _ = table("mixed", task)
        fitted(family, "mixed", task).save(root / name, example=mixed.head(8), metadata={"about": "this"})
    return {name: root / name for name in ("numeric", "torch", "boosted")}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, tuple[ServedModel, ServedModel]]:
    """Each model as it was loaded, and compiled."""
    matches = {name: (ServedModel.load(path, False), ServedModel.load(path, False)) for name, path in folders.items()}
    for _, quick in matches.values():
        quick.find_fast_path()
    return matches


def ask_mlflow(pyfunc: mlflow.pyfunc.PyFuncModel, kind: str, body: bytes) -> list | None:
    """What the function behind `mlflow models serve` predicts; None for a refusal."""
    try:
        answer = scoring_server.invocations(body, kind, pyfunc, pyfunc.metadata.get_input_schema())
    except Exception:
        return None
    return json.loads(answer.response)["predictions"] if answer.status == 200 else None


def ours(model: ServedModel, kind: str, body: bytes) -> list | None:
    """What ServedModel predicts; None for a refusal, which is checked to be one line that echoes nothing."""
    try:
        answer = model.predict([model.parse(body, kind, MAX_ROWS)])[0]
    except RequestError as error:
        answer = error
    if isinstance(answer, RequestError):
        assert 400 <= answer.status < 500 and answer.message and "\n" not in answer.message, answer
        assert SECRET not in answer.message and "Error:" not in answer.message and len(answer.message) < 300
        return None
    assert answer.confidence is None or all(0 <= value <= 1 for value in answer.confidence)
    return answer.labels


def equal(matches: list | None, expected: list | None) -> bool:
    if matches is None or expected is None or not expected or not isinstance(expected[0], float):
        return matches == expected
    return np.allclose(matches, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["numeric", "torch", "boosted"])
def test_it_answers_as_mlflow_does(name: str, models: dict, folders: dict[str, Path]):
    slow, quick = models[name]
    assert (slow.path_in_use, quick.path_in_use) == ("pyfunc", "numpy")
    ask = partial(ask_mlflow, mlflow.pyfunc.load_model(str(folders[name])))
    rows = rows_of(name)
    strange = list(bad(rows))[:: 2 if name == "numeric" else 8]
    for label, kind, body in [*good(rows), *strange]:
        expected = None if b"prompt" in body or b"messages" in body else ask(kind, body)
        for model in (slow, quick):
            assert equal(ours(model, kind, body), expected), (label, model.path_in_use, expected)


def test_what_is_stored_of_a_request(models: dict) -> None:
    rows = rows_of("numeric")
    for model in models["numeric"]:
        for label, kind, body in good(rows):
            parsed = model.parse(body, kind, MAX_ROWS)
            how, stored = parsed.encode(frozenset(["x1"]))
            numbers = np.frombuffer(stored, "<f8").reshape(parsed.n, 29)
            sent = (rows if parsed.n == 3 else part for part in (rows[:1], rows[-1:]))
            assert how == "f8" and any(np.allclose(numbers, part.drop(columns="x1")) for part in sent), label
    rows = rows_of("torch")
    for model in models["torch"]:
        body = json.dumps({"dataframe_split": {"columns": list(rows), "data": rows.to_numpy(dtype=object).tolist()}})
        parsed = model.parse(body.encode(), JSON, MAX_ROWS)
        how, stored = parsed.encode(frozenset(["town"]))
        values = json.loads(stored)
        assert how == "json" and len(values) == parsed.n == 12 and values[2] == [None] * 5
        assert values[0][4] == rows["listed"][0] and values[3][:2] == rows.iloc[3, :2].tolist()
        assert values[1][3].startswith(rows["sold"][1])


def test_what_a_refusal_says(models: dict) -> None:
    def refusal(name: str, content: object) -> str:
        model = models[name][1]
        with pytest.raises(RequestError) as refused:
            rows = model.parse(content if isinstance(content, bytes) else json.dumps(content).encode(), JSON, MAX_ROWS)
            raise model.predict([rows])[0]
        return refused.value.message

    row = rows_of("torch").to_dict(orient="records")[0]
    assert refusal("torch", {"dataframe_records": [{**row, "area": SECRET}]}) == "column 'area' must be double"
    assert refusal("torch", {"dataframe_records": [{"area": 1.0, "town": "x"}]}).startswith(
        "missing columns: floors, garden"
    )
    assert "dataframe_split" in refusal("torch", [])
    assert refusal("torch", b"{") == "the body is no JSON in UTF-8"
    assert refusal("numeric", b"[" * 100_000) == "the body nests too deep"


def test_other_signatures(tmp_path: Path) -> None:
    """Whole numbers, text that an encoder refuses, an array, probabilities as the answer, and no input example."""
    rng = np.random.default_rng(0)
    X = pd.DataFrame(
        {"n": rng.integers(0, 9, 40), "b": rng.random(40) > 0.5, "t": ["x", "y"] * 20, "f": rng.random(40)}
    )
    y = X["n"] * 2.0 + X["f"]
    encode = make_column_transformer((OneHotEncoder(), ["t"]), remainder="passthrough")
    numbers = X[["n", "f"]]
    array = rng.normal(size=(40, 3))
    classify = LogisticRegression().fit(numbers, y > 8)
    made = {
        "mixed": (make_pipeline(encode, LinearRegression()).fit(X, y), X, {}),
        "whole": (LinearRegression().fit(numbers, y), numbers, {}),
        "array": (LinearRegression().fit(array, array[:, 0]), array, {}),
        "narrow": (LinearRegression().fit(array, array[:, 0]), array.astype("float32"), {}),
        "proba": (classify, numbers, {"pyfunc_predict_fn": "predict_proba"}),
        "blind": (classify, numbers, {"input_example": None}),
    }
    cells = [1, 2.5, True, None, "x", "z", 10**17, -3, 0.5]
    for name, (model, rows, settings) in made.items():
        folder = save_sklearn(tmp_path / name, model, rows, **settings)
        served, pyfunc = ServedModel.load(folder, False), mlflow.pyfunc.load_model(str(folder))
        served.find_fast_path()
        assert (served.path_in_use == "pyfunc") == (name in ("narrow", "proba", "blind")), name
        assert len(served.columns) == rows.shape[1] and (served.example is None) == (name == "blind")
        base = np.asarray(rows, dtype=object)[:2].tolist()
        sent = [base, [[cells[(i + j) % 9] for j in range(rows.shape[1])] for i in range(9)]]
        sent += [[[*base[0][:i], cell, *base[0][i + 1 :]]] for i in range(rows.shape[1]) for cell in cells]
        for data in sent:
            split = {"dataframe_split": {"columns": served.columns, "data": data}}
            records = [dict(zip(served.columns, row, strict=True)) for row in data]
            for body in (split, {"inputs": data}, {"instances": records}, {"dataframe_records": records}):
                raw = json.dumps(body).encode()
                assert equal(ours(served, JSON, raw), ask_mlflow(pyfunc, JSON, raw)), (name, raw)


def test_every_path_gives_the_same_confidence(models: dict) -> None:
    for name, (slow, quick) in models.items():
        rows = rows_of(name).to_numpy(dtype=object).tolist()
        body = json.dumps({"dataframe_split": {"columns": slow.columns, "data": rows}}).encode()
        before, after = (model.predict([model.parse(body, JSON, MAX_ROWS)])[0].confidence for model in (slow, quick))
        if name == "boosted":  # a regression
            assert before is None and after is None
        else:
            best = [max(row.values()) for row in slow.probabilities(slow.parse(body, JSON, MAX_ROWS))]
            assert before == best and after == pytest.approx(best, rel=1e-5)


def test_simdjson_reads_only_what_mlflow_reads_too(models: dict) -> None:
    slow, n_read = models["numeric"][0], 0
    for label, kind, body in [*good(rows_of("numeric")), *bad(rows_of("numeric"))]:
        numbers = read_numbers(body, slow.columns) if kind == JSON else None
        if numbers is not None:
            n_read += 1
            assert np.array_equal(numbers, slow.parse(body, JSON, MAX_ROWS).data), label
    assert n_read > 10


@pytest.mark.parametrize("many_bytes", [0, 10**6], ids=["simdjson", "msgspec"])
def test_numbers_mean_the_same_to_all_readers(models: dict, many_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What simdjson, msgspec and Python's json make of the same digits."""
    monkeypatch.setattr(requests, "MANY_BYTES", many_bytes)
    slow, quick = models["numeric"]
    rng = np.random.default_rng(1)
    texts = [repr(float(value)) for value in rng.normal(size=300) * 10.0 ** rng.integers(-300, 14, 300)]
    texts += [f"{value}e{power}" for value, power in rng.integers(-(10**6), 10**6, (150, 2)) % (10**6, 9)]
    texts += ["0", "-0", "1E2", "1e-320", "2.2250738585072011e-308", "9007199254740993", "0.1", "123456789012345"]
    for i in range(0, 450, 30):
        body = (
            f'{{"dataframe_split":{{"columns":{json.dumps(quick.columns)},"data":[[{",".join(texts[i : i + 30])}]]}}}}'
        )
        matches, expected = quick.parse(body.encode(), JSON, 9), slow.parse(body.encode(), JSON, 9)
        if matches.fast:
            assert matches.numbers[0].tolist() == expected.data.iloc[0].tolist()
