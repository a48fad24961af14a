"""The server as a whole: the real step, a real registry, real requests."""

import signal
import socket
import sqlite3
import threading

import pandas as pd
import pytest
from conftest import Project
from hydra import compose, initialize_config_dir
from learning import CONF
from mlflow import MlflowClient
from omegaconf import OmegaConf
from servers import ROWS, Served, register_constant, serving

from alacarte.errors import UserError
from alacarte.feedback import Store
from alacarte.serving.settings import Settings
from examples.demo.people import Traffic

NAME = "constant"


@pytest.fixture(scope="module")
def client(project: Project) -> MlflowClient:
    """A registry with two versions that answer 1 and 2; the first is champion."""
    assert [register_constant(project, NAME, label, champion=label == 1) for label in (1, 2)] == ["1", "2"]
    return project.client


@pytest.fixture(scope="module")
def server(project: Project, client: MlflowClient):
    with serving(project, f"registered_model_name={NAME}", "feedback.audit_share=0.5") as served:
        served.wait()
        yield served


def test_it_starts_before_there_is_a_model_and_ends_cleanly(project: Project):
    command = ("mlflow", "run", ".", "-e", "serve", "--env-manager", "local", "-P", "registered_model_name=later",
               "-P", "serve.port=0", "-P", "serve.poll_seconds=0.2")  # fmt: skip
    with serving(project, command=command) as served:
        assert served.ask("/livez").status == 200
        refused = served.ask("/readyz")
        assert refused.status == 503 and "no champion" in refused.body["message"]
        assert served.ask("/invocations", ROWS).status == 503
        register_constant(project, "later", 3)
        served.wait(model_version="1", path="/status")
        assert served.ask("/invocations", ROWS).body["predictions"] == [3, 3]
    with serving(project, "registered_model_name=later") as served:
        assert served.stop() == 0


def test_an_answer_says_which_version_gave_it(server: Served):
    answer = server.ask("/invocations", ROWS).body
    assert answer["predictions"] == [1, 1] and answer["model_version"] == "1"
    assert len(set(answer["prediction_ids"])) == 2 and set(answer.get("audit_ids", [])) <= set(answer["prediction_ids"])
    answer = server.ask("/invocations?probabilities=true", ROWS).body
    assert answer["probabilities"][0] == {"0": 0.0, "1": 1.0, "2": 0.0, "3": 0.0}


def test_every_route_answers(server: Served):
    assert server.ask("/invocations", ROWS).status == 200
    for path in (
        "/ping",
        "/health",
        "/version",
        "/livez",
        "/readyz",
        "/status",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/",
    ):
        assert server.ask(path).status == 200, path
    for path in ("/ping", "/health", "/version", "/livez", "/readyz", "/status", "/metrics", "/"):
        assert server.ask(path, method="HEAD").status == 200, path
    assert {"model_version", "run_id", "since", "swaps", "last_error"} <= set(server.ask("/status").body)
    assert 'serve_requests_total{path="/invocations"' in server.ask("/metrics").body
    assert [column["name"] for column in server.ask("/model").body["inputs"]] == ["a", "b"]
    described = server.ask("/openapi.json").body["paths"]
    ids = [operation["operationId"] for path in described.values() for operation in path.values()]
    assert len(ids) == len(set(ids)) and not [line for line in server.lines if "Duplicate" in line]
    assert server.ask("/nothing").status == 404 and server.ask("/invocations").status == 405


def test_feedback_on_a_prediction_of_just_now(server: Served):
    first, second = server.ask("/invocations", ROWS).body["prediction_ids"]
    confirmed = server.ask("/feedback", {"prediction_id": first, "label": 1, "source": "me"}).body["results"][0]
    assert confirmed["state"] == "accepted"
    assert server.ask(f"/feedback/{first}").body["state"] == "accepted"
    several = [
        {"prediction_id": second, "label": 3, "comment": "was a three"},
        {"prediction_id": second, "label": 3},
        {"prediction_id": second, "label": 2},
        {"prediction_id": second, "label": 9},
        {"prediction_id": "nobody", "label": 1},
    ]
    results = server.ask("/feedback", several).body["results"]
    assert len({result["message"] for result in results}) == len(results), "each case has its own answer"
    assert results[0]["state"] == server.ask(f"/feedback/{second}").body["labels"][0]["state"] == "new"
    assert [result["prediction_id"] for result in results][-1] == "nobody"


def test_one_label_or_a_review_that_is_not_possible_is_answered_with_its_reason(server: Served):
    (identifier, _) = server.ask("/invocations", ROWS).body["prediction_ids"]
    unknown, impossible = {"prediction_id": "nobody", "label": 1}, {"prediction_id": identifier, "label": "seven"}
    answer = server.ask("/feedback", unknown)
    assert answer.status == 404 and answer.body["message"] == "no such prediction is stored"
    answer = server.ask("/feedback", impossible)
    assert answer.status == 422 and answer.body["message"] == answer.body["results"][0]["message"]
    assert server.ask(f"/feedback/{identifier}").body["state"] == answer.body["results"][0]["state"] == "rejected"
    answer = server.ask("/feedback", [unknown, impossible])
    assert answer.status == 200 and [result["state"] for result in answer.body["results"]] == ["unknown", "rejected"]
    answer = server.ask(f"/feedback/{identifier}/review", {"accept": True})
    assert answer.status == 409 and answer.body["message"].startswith("the label cannot be accepted: the label ")
    assert server.ask("/feedback/nobody/review", {"accept": True}).status == 404
    (listed,) = [one for one in server.ask("/feedback?state=rejected").body if one["prediction_id"] == identifier]
    assert listed["annotator"] == "address:127.0.0.1"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/invocations", b"", 400),
        ("/invocations", b"{", 400),
        ("/invocations", b"[" * 100_000, 400),
        ("/invocations", b'{"dataframe_split": {"columns": ["a"], "data": [[1]]}}', 400),
        ("/invocations", b'{"dataframe_split": {"columns": ["a", "b"], "data": [["secret-input", 1]]}}', 400),
        ("/invocations", b'{"dataframe_split": {"columns": ["a", "b"], "data": [[1e999, 1]]}}', None),
        ("/invocations", b"\xff\xfe", 400),
        ("/invocations", b'{"inputs": ' + b"[1]," * 9_000_000 + b"1}", 413),
        ("/feedback", b"{", 422),
        ("/feedback", b"[]", 400),
        ("/feedback", b'{"prediction_id": "x"}', 422),
        ("/feedback", b'{"prediction_id": "x", "label": {"secret-input": 1}}', 422),
        ("/feedback", b"[" * 100_000, None),
        ("/events", b"{}", 404),
    ],
)
def test_a_bad_request_gets_one_line(server: Served, path: str, body: bytes, status: int | None):
    answer = server.ask(path, body)
    assert 400 <= answer.status < 500 or (status is None and answer.status == 200), answer
    assert status in (None, answer.status), answer
    if answer.status != 200:
        assert "\n" not in answer.body["message"] and "secret-input" not in answer.body["message"]


def test_a_web_page_elsewhere_cannot_reach_an_open_server(server: Served):
    assert server.ask("/invocations", ROWS, Host="evil.example").status == 403
    assert server.ask("/invocations", b"a,b\n1,2", Content_Type="text/plain").status == 415


def test_an_open_address_needs_tokens(project: Project, client: MlflowClient):
    done = project.step("serve", "serve.host=0.0.0.0", f"registered_model_name={NAME}", code=2)
    assert "SERVE_PREDICT_TOKEN" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    tokens = {"SERVE_PREDICT_TOKEN": "p", "SERVE_FEEDBACK_TOKEN": "f", "SERVE_ADMIN_TOKEN": "a"}
    with serving(
        project,
        f"registered_model_name={NAME}",
        "feedback.review=manual",
        "feedback.url=sqlite:///reviewed.db",
        **tokens,
    ) as served:
        served.wait()
        assert served.ask("/invocations", ROWS).status == 401
        assert served.ask("/invocations", ROWS, Authorization="Bearer f").status == 401
        answer = served.ask("/invocations", ROWS, Authorization="Bearer p")
        given = {"prediction_id": answer.body["prediction_ids"][0], "label": 2}
        assert served.ask("/feedback", given, Authorization="Bearer p").status == 401
        result = served.ask("/feedback", given, Authorization="Bearer f").body["results"][0]
        assert result["state"] == "new"
        assert served.ask("/feedback?state=new", Authorization="Bearer f").status == 401
        assert len(served.ask("/feedback?state=new", Authorization="Bearer a").body) == 1
        review = f"/feedback/{given['prediction_id']}/review"
        assert served.ask(review, {"accept": True}, Authorization="Bearer f").status == 401
        assert served.ask(review, {"accept": True}, Authorization="Bearer a").body["state"] == "accepted"


def test_simulated_people_count_what_fails_and_say_why(server: Served):
    rows = pd.DataFrame({"a": [1.0] * 4, "b": [2.0] * 4, "digit": [1, 1, 1, 1]})
    people = Traffic(target="digit", per_second=100, reports=1, people=1, url=server.url)
    people.send("right", rows, lambda sent: sent == 4, lambda: None)
    assert not people.failures and people.accuracy("right") == 1
    people.send("half a row", rows.drop(columns="b"), lambda sent: sent == 4, lambda: None)
    assert len(people.failures) == 4 and len(people.answers) == 4
    labels = people.labels
    people.send("no class", rows.assign(digit=[[]] * 4), lambda sent: sent == 4, lambda: None)
    assert len(people.failures) == 8 and people.accuracy("no class") == people.labels - labels == 0
    assert people.failures[0].startswith("HTTPError: /invocations 400: ") and "column" in people.failures[0]
    assert people.failures[-1].startswith("HTTPError: /feedback 422: ")
    assert "body.label: text of at most 1000 characters, a number, true or false is due" in people.failures[-1]


def test_a_label_bears_the_name_of_the_token_that_it_came_with(project: Project, client: MlflowClient):
    arguments = (f"registered_model_name={NAME}", "feedback.url=sqlite:///named.db", "serve.feedback_per_minute=3")
    tokens = "alice:secret-a, bob:secret-b,secret-c"
    with serving(project, *arguments, SERVE_FEEDBACK_TOKEN=tokens, SERVE_ADMIN_TOKEN="secret-d") as served:
        served.wait()
        ids = served.ask("/invocations", {"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2]] * 4}}).body[
            "prediction_ids"
        ]
        for identifier, token in zip(ids, ("secret-a", "secret-b", "secret-c", "secret-d"), strict=True):
            given = {"prediction_id": identifier, "label": 1, "source": "me"}
            assert served.ask("/feedback", given, Authorization=f"Bearer {token}").status == 200
            assert served.ask("/feedback", {**given, "annotator": "x"}, Authorization=f"Bearer {token}").status == 422
        for wrong in ("alice:secret-a", "alice", "secret", "secret-aa", "secret-a,", ""):
            assert served.ask("/feedback", given, Authorization=f"Bearer {wrong}").status == 401
        three = [given] * 3
        assert served.ask("/feedback", three, Authorization="Bearer secret-a").status == 429, "one has been taken"
        assert served.ask("/feedback", three[:2], Authorization="Bearer secret-b").status == 200
        assert "bob" not in str(served.ask(f"/feedback/{ids[1]}", Authorization="Bearer secret-a").body)
        shown = served.ask("/feedback?state=accepted", Authorization="Bearer secret-d").body
        assert [one["annotator"] for one in shown] == ["token:alice", "token:bob", "token:", "token:"]
    about = Store(f"sqlite:///{project.root}/named.db").labelled(NAME, "accepted").about
    assert about["annotator"].tolist() == ["token:alice", "token:bob", "token:", "token:"] and set(about["source"]) == {
        "me"
    }


def test_flips_under_load_lose_and_mix_nothing(project: Project, client: MlflowClient, server: Served):
    failures, stop = [], threading.Event()

    def load() -> None:
        while not stop.is_set():
            answer = server.ask("/invocations", ROWS)
            if answer.status != 200 or answer.body["predictions"] != [int(answer.body["model_version"])] * 2:
                failures.append(answer)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for flip in range(10):
        version = "2" if flip % 2 == 0 else "1"
        client.set_registered_model_alias(NAME, "champion", version)
        server.wait("/status", model_version=version)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_predictions_go_on_when_the_store_is_locked(project: Project, client: MlflowClient):
    with serving(project, f"registered_model_name={NAME}", "feedback.url=sqlite:///locked.db") as served:
        served.wait()
        before = served.ask("/invocations", ROWS).body["prediction_ids"][0]
        assert served.ask("/feedback", {"prediction_id": before, "label": 1}).status == 200
        with sqlite3.connect(project.root / "locked.db", isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            meanwhile = served.ask("/invocations", ROWS)
            assert meanwhile.status == 200
            given = {"prediction_id": meanwhile.body["prediction_ids"][0], "label": 1}
            assert served.ask("/feedback", given).status == 503
            other.execute("ROLLBACK")
        assert served.ask("/feedback", given).body["results"][0]["state"] == "accepted"


def test_what_was_acknowledged_survives_a_kill(project: Project, client: MlflowClient):
    arguments = (f"registered_model_name={NAME}", "feedback.url=sqlite:///killed.db")
    with serving(project, *arguments) as served:
        served.wait()
        ids = [served.ask("/invocations", ROWS).body["prediction_ids"][0] for _ in range(50)]
        for i in ids[:25]:
            assert served.ask("/feedback", {"prediction_id": i, "label": 1}).status == 200
        served.stop(signal.SIGKILL)
    with serving(project, *arguments) as served:
        served.wait()
        assert {served.ask(f"/feedback/{i}").body["state"] for i in ids[:25]} == {"accepted"}
        later = served.ask("/feedback", [{"prediction_id": i, "label": 1} for i in ids[:25]]).body["results"]
        assert len(later) == 25


def refused(*overrides: str) -> str:
    """What is said of a configuration; fails the test when that is not one line."""
    with initialize_config_dir(str(CONF), version_base=None):
        config = OmegaConf.to_container(compose("serve", list(overrides)))
    with pytest.raises(UserError) as error:
        Settings.make(registered_model_name=NAME, feedback=config["feedback"], **config["serve"])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "key",
    ["serve.max_rows=1.5", "serve.timeout=1e400", "serve.cache=null", "serve.host=null",
     "serve.port=70000", "serve.max_connections=0", "serve.idle_seconds=-1", "feedback.redact=name",
     "+serve.bogus=1", "+feedback.bogus=1", "serve.webhook=maybe", "serve.max_body=many", "feedback.keep_gb=0",
     "feedback.audit_share=2", "feedback.review=maybe"],
)  # fmt: skip
def test_wrong_settings(key: str):
    said = refused(key)
    assert key.lstrip("+").partition("=")[0] in said and (
        "allowed" in said or "needed" in said or "no such key" in said
    )


@pytest.mark.parametrize("tokens", ["secret-a,", "alice:", ":secret-a", "alice:secret-a,bob:secret-a", " ",
                                    "bob:secret-admin"])  # fmt: skip
def test_tokens_that_are_none(monkeypatch: pytest.MonkeyPatch, tokens: str):
    monkeypatch.setenv("SERVE_ADMIN_TOKEN", "secret-admin")
    monkeypatch.setenv("SERVE_FEEDBACK_TOKEN", tokens)
    said = refused()
    assert "SERVE_FEEDBACK_TOKEN" in said and "secret" not in said


@pytest.mark.parametrize(
    "variables",
    [("PREDICT_TOKEN", "ADMIN_TOKEN"), ("PREDICT_TOKEN", "FEEDBACK_TOKEN"), ("FEEDBACK_TOKEN", "ADMIN_TOKEN"),
     ("WEBHOOK_SECRET", "ADMIN_TOKEN"), ("WEBHOOK_SECRET", "PREDICT_TOKEN"), ("WEBHOOK_SECRET", "FEEDBACK_TOKEN")],
)  # fmt: skip
def test_no_two_rights_share_a_secret(monkeypatch: pytest.MonkeyPatch, variables: tuple[str, str]):
    for variable in ("PREDICT_TOKEN", "FEEDBACK_TOKEN", "ADMIN_TOKEN", "WEBHOOK_SECRET"):
        name = "alice:" if variable == "FEEDBACK_TOKEN" else ""
        monkeypatch.setenv(f"SERVE_{variable}", name + ("zqxjkv" if variable in variables else variable.lower()))
    said = refused()
    assert all(f"SERVE_{variable}" in said for variable in variables) and "zqxjkv" not in said


@pytest.mark.parametrize(
    ("key", "advice"), [("serve.host=192.0.2.1", "serve.host=127.0.0.1"), ("serve.port=1", "serve.port=0")]
)
def test_an_address_that_cannot_be_taken(project: Project, key: str, advice: str):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = key if "host" in key else f"serve.port={other.getsockname()[1]}"
        tokens = {f"SERVE_{kind}_TOKEN": kind for kind in ("PREDICT", "FEEDBACK", "ADMIN")}
        done = project.step("serve", "serve.port=0", taken, code=2, **tokens)
    assert len(done.stderr.strip().splitlines()) == 1 and taken in done.stderr and advice in done.stderr


@pytest.mark.parametrize("key", ["+serve.bogus=1", "serve.cache=/proc/none", "feedback.url=sqlite:///mlflow.db"])
def test_a_wrong_setting_ends_in_one_line(project: Project, key: str):
    done = project.step("serve", key, code=2)
    assert len(done.stderr.strip().splitlines()) == 1 and key.lstrip("+").partition("=")[0] in done.stderr
    assert done.stdout == ""
