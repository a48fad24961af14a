"""Short bodies that ask for much memory or time are refused before pandas makes their tables."""

import asyncio
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pandas as pd
import psutil
import pytest
from mlflow.models import infer_signature
from sklearn.dummy import DummyClassifier
from stores import settings

from alacarte.feedback import StoreError
from alacarte.serving import prediction_log
from alacarte.serving.limits import ALL_BODIES, CHARACTERS, Bodies
from alacarte.serving.model import ServedModel
from alacarte.serving.prediction_log import PredictionLog
from alacarte.serving.rows import Answer, RequestError

MAX_ROWS = 10_000
MAX_MEMORY = 500_000_000  # bytes beyond the largest size of this process before
JSON, CSV = "application/json", "text/csv"
X = pd.DataFrame({"a": [0.0, 1.0, 2.0], "t": ["x", 'y, "z"\n', "é"]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = tmp_path_factory.mktemp("limits") / "model"
    estimator = DummyClassifier().fit(X, [0, 1, 1])
    mlflow.sklearn.save_model(
        estimator, folder, signature=infer_signature(X, estimator.predict(X)), input_example=X,
        serialization_format="skops", pip_requirements=["scikit-learn"],
    )  # fmt: skip
    return ServedModel.load(Path(folder), trust_code=False)


def peak() -> int:
    """The largest size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refusal(model: ServedModel, body: bytes, kind: str) -> tuple[int, str]:
    before = peak()
    with pytest.raises(RequestError) as refused:
        model.parse(body, kind, MAX_ROWS)
    assert peak() - before < MAX_MEMORY
    return refused.value.status, refused.value.message


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (JSON, '{"inputs":{' + ",".join(f'"{i}":[1]' for i in range(2000)) + "}}"),
        (JSON, '{"dataframe_records":[{' + ",".join(f'"{i}":1' for i in range(2000)) + "}]}"),
        (JSON, '{"instances":[1,{' + ",".join(f'"{i}":1' for i in range(2000)) + "}]}"),
        (JSON, '{"dataframe_split":{"data":[[' + "1," * 2000 + "1]]}}"),
        (JSON, '{"dataframe_records":[' + ",".join(f'{{"{i % 1000}":1}}' for i in range(5000)) + "]}"),
        (JSON, '{"dataframe_split":{"columns":[' + "1," * 2000 + '1],"index":[1,2,3],"data":0}}'),
        (JSON, '{"dataframe_records":[{"t":"' + "x" * 150_000 + '"}' + ',{"t":"y"}' * 900 + "]}"),
        (JSON, '{"inputs":[' + "[0]," * 10_000 + "[0]]}"),
        (CSV, "," * 2000 + "\n1\n"),
        (CSV, "a,t\n1" + "," * 2000 + "\n"),
        (CSV, "\r\n\n" + '"a\n\r\n",' + "," * 2000 + "\n1\n"),
        (CSV, "," * 900 + "\n" + "1\n" * 1_000_000),
        (CSV, "," * 900 + "\r" + "1\r" * 1_000_000),
    ],
    ids=["inputs", "records", "mixed", "split", "sparse", "index", "text", "rows",
         "header", "first row", "quoted", "short rows", "returns"],
)  # fmt: skip
def test_a_table_of_few_bytes_and_many_cells_is_refused(model: ServedModel, kind: str, body: str):
    assert len(body) < 3_000_000 and refusal(model, body.encode(), kind)[0] == 413


def test_honest_tables_are_read_whole(model: ServedModel):
    rows = pd.concat([X] * 1000, ignore_index=True)
    rows["t"] = rows["t"] + (rows.index % 700).astype(str)
    rows.loc[5, "t"] = "x" * (CHARACTERS // 10_000)
    long = pd.DataFrame({"a": [1.0, 2.0], "t": ["x" * 200_000, "y"]})
    for table in (rows, long):
        assert model.parse(table.to_csv(index=False).encode(), CSV, MAX_ROWS).data["t"].tolist() == table["t"].tolist()


class Refusing:
    """A store that does not work."""

    database = SimpleNamespace(timeout=0.1)

    def write_predictions(self, _: list) -> None:
        raise StoreError("the database is locked")


def test_requests_that_wait_for_the_store_take_little_memory(model: ServedModel, monkeypatch: pytest.MonkeyPatch):
    """Each has one long text: in a column that the model does not take, and in an array of texts of the same length."""
    monkeypatch.setattr(prediction_log, "MAX_BYTES", 20_000_000)
    monkeypatch.setattr(prediction_log, "BATCH_BYTES", 1_000_000)
    log = PredictionLog(Refusing(), settings())  # type: ignore[arg-type]
    table = pd.DataFrame({"a": [1.0] * 500, "t": ["y"] * 500, "x": ["z"] * 500})
    table.loc[0, "t"] = table.loc[0, "x"] = "x" * 100_000
    extra = table[:1].assign(x="x" * 2_000_000)
    columns = {"inputs": table.to_dict(orient="list")}
    bodies = [
        (JSON, json.dumps(body).encode()) for body in (columns, {"dataframe_records": extra.to_dict(orient="records")})
    ]
    bodies.append((CSV, extra.to_csv(index=False).encode()))
    before = psutil.Process().memory_info().rss
    for kind, body in bodies * 5 + bodies[1:] * 45:
        rows = model.parse(body, kind, MAX_ROWS)
        assert model.predict([rows])[0].labels == [1] * rows.n  # type: ignore[union-attr]
        log.add("1", rows, Answer([1] * rows.n, None), 0.001)
    assert log.dropped >= 90, "the received bytes are counted"
    with pytest.raises(StoreError):
        log.flush()
    assert psutil.Process().memory_info().rss - before < 100_000_000


def test_the_bodies_of_all_clients_have_a_limit_together():
    """Otherwise each of `max_connections` clients could hold `max_body` bytes. A small body is taken all the same."""
    bodies, large = Bodies(max_body=10_000_000), b"x" * 9_000_000

    async def read(body: bytes) -> bytes:
        async def receive() -> dict:
            return {"type": "http.request", "body": body, "more_body": False}

        return await bodies.read({}, receive, 10_000_000)

    async def test() -> None:
        for _ in range(ALL_BODIES // len(large)):
            await read(large)
        for _ in range(2):
            with pytest.raises(RequestError) as refused:
                await read(large)
            assert refused.value.status == 503
        assert await read(b"{}")
        bodies.release(large)
        assert await read(large)

    asyncio.run(test())
