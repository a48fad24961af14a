"""What the server must survive: flips under load, kill -9, broken versions, lost and forged events, slow clients, loops.
At full size: FULL_SIZE=1 make test-all ARGS=tests/library/serving/test_survival.py; with figures: python benchmarks/survival.py
"""

import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import Project, copy_project
from mlflow import MlflowClient
from mlflow.webhooks.delivery import _generate_hmac_signature
from registries import Registry, until, webhook_registry
from servers import ROWS, Answered, KeptAlive, Served, figure, load, register_code, register_constant, size
from servers import serving_alone as serving

NAME = "survivor"
SECRET = "the secret"
NOWHERE = "serve.webhook_url=http://127.0.0.1:1/events"
POLLING = (f"registered_model_name={NAME}", "serve.poll_seconds=0.5", "serve.cache=.polling", "serve.timeout=1",
           "serve.idle_seconds=4",
           "feedback.url=sqlite:///polling.db", "serve.webhook=true", NOWHERE)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def registry(folder: Path) -> Iterator[Registry]:
    with webhook_registry(folder) as made:
        yield made


@pytest.fixture(scope="module")
def project(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """With two versions of a model, which answer 1 and 2."""
    made = Project(copy_project(tmp_path_factory.mktemp("project")), registry.uri)
    assert [register_constant(made, NAME, label, champion=label == 1) for label in (1, 2)] == ["1", "2"]
    return made


def point(project: Project, version: str) -> None:
    project.client.set_registered_model_alias(NAME, "champion", version)


def rows(n: int) -> dict:
    return {"dataframe_split": {"columns": ["a", "b"], "data": [[float(i), 1.0] for i in range(n)]}}


def predict(connection: KeptAlive | Served, n: int) -> dict:
    """Ask for n rows; fails when the answer is none, or is not that of one version throughout."""
    answer = connection.ask("/invocations", rows(n))
    assert answer.status == 200 and answer.body["predictions"] == [int(answer.body["model_version"])] * n, answer
    return answer.body


class Slow:
    """A client that sends the headers and a share of the body (-1: half the headers), and the rest when it is told to."""

    def __init__(self, served: Served, path: str = "/invocations", sent: float = 0.5) -> None:
        host, port = served.url.removeprefix("http://").split(":")
        body = json.dumps(ROWS).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        whole = head.encode() + body
        cut = len(head) + int(len(body) * sent) if sent >= 0 else len(head) // 2
        self._rest, self.connection = whole[cut:], socket.create_connection((host, int(port)), timeout=60)
        self.connection.sendall(whole[:cut])

    def answer(self, whole: bool = False) -> Answered:
        if whole:
            self.connection.sendall(self._rest)
        response = HTTPResponse(self.connection)
        response.begin()
        return Answered(response.status, json.loads(response.read()))


# --- following the registry by its events alone ---


@pytest.fixture(scope="module")
def notified(project: Project) -> Iterator[Served]:
    """A server that hears webhooks and reads the alias by itself every ten minutes only."""
    arguments = (f"registered_model_name={NAME}", "serve.webhook=true", "serve.poll_seconds=600", "serve.cache=.notified",
                 "feedback.url=sqlite:///notified.db")  # fmt: skip
    with serving(project, *arguments, SERVE_WEBHOOK_SECRET=SECRET) as served:
        served.wait("/status", model_version="1")
        yield served


def test_flips_under_load_lose_and_mix_nothing(project: Project, notified: Served):
    answers: Counter[str] = Counter()

    def work(connection: KeptAlive, number: int) -> None:
        answers[predict(connection, (1, 2, 500)[number % 3])["model_version"]] += 1

    flips = size(10, 50)
    with load(notified, work) as failures:
        for flip in range(flips):
            version = "21"[flip % 2]
            point(project, version)
            if flip % 3:  # else the next event comes while this event is on its way
                notified.wait("/status", model_version=version)
    notified.wait("/status", model_version=version)
    assert failures == [] and min(answers["1"], answers["2"]) > 0
    figure(f"{flips} flips at 32 connections: {answers.total()} requests, none failed or mixed, {dict(answers)}")


def event(notified: Served, *, delivery: str = "", secret: str = SECRET) -> Answered:
    """The answer to an event as MLflow sends it, which says that version 1 is champion."""
    data = {"name": NAME, "alias": "champion", "version": "1"}
    body = json.dumps({"entity": "model_version_alias", "action": "created", "timestamp": "2026-01-01", "data": data})
    delivery, at = delivery or uuid4().hex, str(int(time.time()))
    signed = {"X_MLflow_Delivery_Id": delivery, "X_MLflow_Timestamp": at,
              "X_MLflow_Signature": _generate_hmac_signature(secret, delivery, at, body)}  # fmt: skip
    return notified.ask("/events", body.encode(), **signed)


def test_only_a_genuine_event_is_heard_and_the_registry_is_believed(project: Project, notified: Served, folder: Path):
    """test_webhooks.py has every kind of event that is refused or ignored."""
    quietly = MlflowClient(f"sqlite:///{folder}/mlflow.db")  # past the server, which then sends nothing
    assert event(notified, delivery="once").body == {"status": "ok"}
    time.sleep(0.5)  # it has read the alias
    quietly.set_registered_model_alias(NAME, "champion", "2")
    assert event(notified, secret="another").status == 401
    assert event(notified, delivery="once").body == {"status": "ignored"}
    time.sleep(0.5)
    assert notified.ask("/status").body["model_version"] == "1"
    assert event(notified).body == {"status": "ok"}  # late: it tells of version 1
    notified.wait("/status", model_version="2", last_error=None)


# --- kill -9, and the end ---


def test_what_was_acknowledged_survives_a_kill(project: Project, notified: Served):
    point(project, "1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (f"registered_model_name={NAME}", f"serve.port={port}", "serve.webhook=true", "serve.cache=.killed",
                 "serve.feedback_per_minute=1000000000", "feedback.url=sqlite:///killed.db")  # fmt: skip
    answered: dict[str, float] = {}  # prediction -> when
    acknowledged: set[str] = set()

    def work(connection: KeptAlive, number: int) -> None:
        ids = predict(connection, 1 + number % 3)["prediction_ids"]
        answered.update(dict.fromkeys(ids, time.monotonic()))
        if number % 4 == 0:
            answer = connection.ask("/feedback", [{"prediction_id": ids[0], "label": 1}])
            assert answer.status == 200 and answer.body["results"][0]["state"] == "accepted", answer
            acknowledged.add(ids[0])

    old: list[str] = []  # answered more than one second before a kill
    for _ in range(size(1, 5)):
        with serving(project, *arguments) as served:
            served.wait()
            with load(served, work) as failures:
                time.sleep(size(15, 100) / 10)
                assert failures == []
                killed = time.monotonic()
                os.killpg(served.process.pid, signal.SIGKILL)
            old += [id for id, when in answered.items() if when < killed - 1 and id not in acknowledged]
            answered.clear()
    with serving(project, *arguments) as served:
        served.wait()
        assert acknowledged and old
        connection = KeptAlive(served.url)
        states = [connection.ask(f"/feedback/{id}", method="GET").body["state"] for id in acknowledged]
        assert set(states) == {"accepted"}
        for i in range(0, len(old), 1000):
            labels = [{"prediction_id": id, "label": 2} for id in old[i : i + 1000]]
            results = served.ask("/feedback", labels).body["results"]
            assert [result for result in results if result["state"] != "accepted"] == []
        figure(f"{size(1, 5)} times kill -9 under load: {len(acknowledged)} acknowledged labels and {len(old)} predictions of "
               "more than 1 s before, none lost")  # fmt: skip
        addresses = [webhook.url for webhook in project.client.list_webhooks()]
        assert sorted(addresses) == sorted(f"{server.url}/events" for server in (notified, served))
        slow = Slow(served)
        assert served.ask("/livez").status == 200  # came later, so the slow one is in the server's hands by now
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert slow.answer(whole=True).body["predictions"] == [1, 1] and served.process.wait(60) == 0
        assert [webhook.url for webhook in project.client.list_webhooks()] == [f"{notified.url}/events"]


# --- following by polls alone ---


@pytest.fixture(scope="module")
def polling(project: Project) -> Iterator[Served]:
    point(project, "1")
    with serving(project, *POLLING) as served:
        served.wait("/status", model_version="1")
        yield served


def test_slow_clients_hold_up_nobody(polling: Served):
    host, port = polling.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(size(200, 500))]
    silent = [Slow(polling, path, sent) for path in ("/invocations", "/feedback", "/events") for sent in (0.5, 0.0)]
    halves = [Slow(polling, sent=-1) for _ in range(20)]
    answers = [polling.ask("/invocations", ROWS).status for _ in range(50)]
    assert answers == [200] * 50 and polling.ask("/livez").status == 200
    assert [slow.answer().status for slow in silent] == [408] * len(silent)
    assert polling.ask("/invocations", ROWS).status == 200
    assert {client.recv(1) for client in (*idle, *(half.connection for half in halves))} == {b""}, "hung up on"
    figure(f"{len(idle)} idle connections and {len(silent) + len(halves)} that send half a request: others are served")


# --- a model that does not answer ---

LOOPING = """
import time, mlflow

class Looping(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        time.sleep(model_input["a"].max())  # one call of C, which nothing interrupts
        return model_input["a"].tolist()

mlflow.models.set_model(Looping())
"""


def test_a_predict_that_hangs_holds_up_nothing_else(project: Project):
    """test_batching.py stops loops of every kind."""
    project.client.set_registered_model_alias("looping", "champion", register_code(project, "looping", LOOPING))
    arguments = ("registered_model_name=looping", "serve.trust_code=true", "serve.timeout=1", "serve.cache=.looping")

    def asked(seconds: float) -> Answered:
        return served.ask("/invocations", {"dataframe_split": {"columns": ["a", "b"], "data": [[seconds, 0.0]]}})

    with serving(project, *arguments) as served, ThreadPoolExecutor() as others:
        served.wait()
        hanging = others.submit(asked, 60.0)
        while not hanging.done():
            assert served.ask("/status").status == served.ask("/model").status == 200
        assert hanging.result().status == 504
        until(lambda: served.ask("/livez").status == 503)
        assert served.ask("/livez").body["message"] == "a prediction hangs and does not stop"
        assert asked(0.0).status == 200, "another thread answers meanwhile"

        in_flight = others.submit(asked, 0.7)
        time.sleep(0.3)
        served.process.send_signal(signal.SIGINT)
        assert in_flight.result().body["predictions"] == [0.7] and served.process.wait(60) == 0


def test_the_registry_is_down(project: Project, polling: Served, registry: Registry):
    registry.stop()
    status = polling.wait("/status", error="the registry does not answer")
    assert status["model_version"] == "1" and polling.ask("/invocations", ROWS).body["predictions"] == [1, 1]
    idle = [socket.create_connection(("127.0.0.1", int(polling.url.rpartition(":")[2]))) for _ in range(50)]
    assert polling.stop() == 0 and idle
    port = int(registry.uri.rpartition(":")[2])  # test_cache.py has the restart where nobody listens there
    silent = socket.create_server(("127.0.0.1", port))  # takes connections, says nothing
    with silent, serving(project, *POLLING, MLFLOW_HTTP_REQUEST_TIMEOUT="1") as served:
        status = served.wait("/status", model_version="1")
        assert "the registry does not answer" in status["last_error"]
        assert served.ask("/readyz").status == 200 and served.ask("/invocations", ROWS).body["predictions"] == [1, 1]
