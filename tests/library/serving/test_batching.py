"""Concurrent requests to one predict, and predictions that do not end."""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.models import infer_signature
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from alacarte.serving import batching
from alacarte.serving.batching import Batcher
from alacarte.serving.model import Answer, RequestError, Rows, ServedModel

X = pd.DataFrame({"a": [0.0, 1.0, 2.0, 5.0]})
pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class Slow(mlflow.pyfunc.PythonModel):
    """Answers a; 1 loops, 2 sleeps in a loop, 3 loops on when it is stopped, three times, 4 is one long call of C, 5 leaves."""

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict | None = None) -> list:
        import sys
        import time

        what = model_input["a"].iloc[0]
        while what == 1:
            pass
        while what == 2:
            time.sleep(0.01)
        swallowed = 0
        while what == 3 and swallowed < 3:
            try:
                while True:
                    pass
            except BaseException:
                swallowed += 1
        if what == 4:
            time.sleep(2.5)
        if what == 5:
            sys.exit("enough")
        return model_input["a"].tolist()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = tmp_path_factory.mktemp("models") / "slow"
    mlflow.pyfunc.save_model(
        folder, python_model=Slow(), signature=infer_signature(X, [1.0]), pip_requirements=["mlflow"]
    )
    return ServedModel.load(folder, trust_code=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = tmp_path_factory.mktemp("models") / "quick"
    model = make_pipeline(StandardScaler(), LinearRegression()).fit(X, 3 * X["a"])
    mlflow.sklearn.save_model(
        model, folder, serialization_format="skops", signature=infer_signature(X, model.predict(X)), input_example=X,
        pip_requirements=["scikit-learn"],
    )  # fmt: skip
    served = ServedModel.load(folder, trust_code=False)
    served.find_fast_path()
    assert served.path_in_use == "numpy"
    return served


def rows(model: ServedModel, *values: Any) -> Rows:
    body = {"dataframe_split": {"columns": ["a"], "data": [[value] for value in values]}}
    return model.parse(json.dumps(body).encode(), "application/json", 10_000)


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not happened():
            await asyncio.sleep(0.01)


class Spy:
    """Counts the calls of a real model, and the threads they come from."""

    def __init__(self, model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int, str]] = []
        for name in ("predict", "predict_fast"):
            monkeypatch.setattr(model, name, self._watched(name, getattr(model, name)))

    def _watched(self, name: str, function: Callable) -> Callable:
        def call(requests: list[Rows]) -> list:
            self.calls.append((name, len(requests), threading.current_thread().name))
            return function(requests)

        return call


async def test_what_arrives_together_is_one_call(quick: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(quick, monkeypatch)
    batcher = Batcher(timeout=10, max_rows=100)
    answer = await batcher.predict(quick, rows(quick, 2.0))
    assert answer.labels == pytest.approx([6.0]) and spy.calls == [("predict_fast", 1, "MainThread")]
    spy.calls.clear()
    waiting = [batcher.predict(quick, rows(quick, *[float(i)] * (1 + i % 3))) for i in range(20)]
    for i, answer in enumerate(await asyncio.gather(*waiting)):
        assert answer.labels == pytest.approx([3.0 * i] * (1 + i % 3))
    assert spy.calls == [("predict_fast", 20, "MainThread")]
    spy.calls.clear()
    await asyncio.gather(*[batcher.predict(quick, rows(quick, *[1.0] * 40)) for _ in range(5)])
    assert [count for _, count, _ in spy.calls] == [2, 2, 1]  # max_rows


async def test_what_takes_long_leaves_the_loop_free(quick: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "cost", lambda n: 1.0)
    spy = Spy(quick, monkeypatch)
    batcher = Batcher(timeout=10, max_rows=100)
    answers = await asyncio.gather(*[batcher.predict(quick, rows(quick, float(i))) for i in range(10)])
    assert [answer.labels[0] for answer in answers] == pytest.approx([3.0 * i for i in range(10)])
    assert {thread for name, _, thread in spy.calls if name == "predict"} == {"predict"}


async def test_a_bad_request_among_good_ones(quick: ServedModel) -> None:
    batcher = Batcher(timeout=10, max_rows=100)
    sent = [rows(quick, 1.0), rows(quick, None), rows(quick, 2.0), rows(quick, 1e300)]
    answers = await asyncio.gather(*[batcher.predict(quick, each) for each in sent], return_exceptions=True)
    assert isinstance(answers[0], Answer) and answers[0].labels == pytest.approx([3.0])
    assert isinstance(answers[2], Answer) and answers[2].labels == pytest.approx([6.0])
    assert isinstance(answers[1], RequestError) and answers[1].status == 400
    assert isinstance(answers[3], Answer) and answers[3].labels == pytest.approx([3e300])


async def test_a_client_that_goes_lets_nobody_down(quick: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(quick, monkeypatch)
    batcher = Batcher(timeout=10, max_rows=100)
    tasks = [asyncio.create_task(batcher.predict(quick, rows(quick, float(i)))) for i in range(3)]
    asyncio.get_running_loop().call_soon(tasks[0].cancel)  # just before it would start the call
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert [answer.labels[0] for answer in answers[1:]] == pytest.approx([3.0, 6.0])
    assert spy.calls == [("predict_fast", 2, "MainThread")]


@pytest.mark.parametrize("what", [1.0, 2.0, 3.0])
async def test_a_predict_that_does_not_end_is_stopped(what: float, slow: ServedModel) -> None:
    batcher = Batcher(timeout=0.3, max_rows=100)
    with pytest.raises(TimeoutError):
        await batcher.predict(slow, rows(slow, what))
    thread = batcher._stopped[0].thread
    assert (await batcher.predict(slow, rows(slow, 7.0))).labels == [7.0]  # by another thread
    await until(lambda: not thread.is_alive())
    assert not batcher.stuck and not batcher._stopped


async def test_one_long_call_of_c_is_told_of(slow: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "PATIENCE", 0.2)
    batcher = Batcher(timeout=0.2, max_rows=100)
    with pytest.raises(TimeoutError):
        await batcher.predict(slow, rows(slow, 4.0))
    assert not batcher.stuck
    await until(lambda: batcher.stuck)
    assert (await batcher.predict(slow, rows(slow, 7.0))).labels == [7.0]
    await until(lambda: not batcher.stuck)  # it ended after all


async def test_work_that_nobody_waits_for_is_not_started(slow: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(slow, monkeypatch)
    batcher = Batcher(timeout=0.4, max_rows=100)
    stuck = asyncio.create_task(batcher.predict(slow, rows(slow, 2.0)))
    await asyncio.sleep(0.05)
    queued = [asyncio.create_task(batcher.predict(slow, rows(slow, 7.0))) for _ in range(5)]
    await asyncio.sleep(0.05)
    for task in queued[:4]:
        task.cancel()
    with pytest.raises(TimeoutError):
        await stuck
    assert (await queued[4]).labels == [7.0]  # it had time left when the thread was replaced
    assert sum(name == "predict" for name, _, _ in spy.calls) == 2


async def test_a_model_that_leaves(slow: ServedModel) -> None:
    batcher = Batcher(timeout=10, max_rows=100)
    with pytest.raises(RuntimeError, match="SystemExit"):
        await batcher.predict(slow, rows(slow, 5.0))
    assert (await batcher.predict(slow, rows(slow, 7.0))).labels == [7.0]
