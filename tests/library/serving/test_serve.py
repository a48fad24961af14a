"""The server as a whole: the real step, a real registry, real requests."""

import json
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pandas as pd
import pytest
from conftest import Project
from hydra import compose, initialize_config_dir
from learning import CONF
from omegaconf import OmegaConf
from registries import until
from servers import ROWS, Served, register_constant, serving

from alacarte.errors import UserError
from alacarte.feedback import Store
from alacarte.serving.cache import Cache
from alacarte.serving.server import listen
from alacarte.serving.settings import Settings
from examples.demo.people import Traffic

NAME = "constant"
GET_ROUTES = ("/ping", "/health", "/version", "/livez", "/readyz", "/status", "/metrics", "/docs", "/openapi.json", "/")


@pytest.fixture(scope="module")
def server(project: Project) -> Iterator[Served]:
    """It starts before there is a model."""
    command = ("mlflow", "run", ".", "-e", "serve", "--env-manager", "local", "-P", f"registered_model_name={NAME}",
               "-P", "serve.port=0", "-P", "serve.poll_seconds=0.2", "-P", "feedback.audit_share=0.5")  # fmt: skip
    with serving(project, command=command) as served:
        assert served.ask("/livez").status == 200
        answer = served.ask("/readyz")
        assert answer.status == 503 and "no champion" in answer.body["message"]
        assert served.ask("/invocations", ROWS).status == 503
        register_constant(project, NAME, 1)
        served.wait("/status", model_version="1")
        yield served
        assert not [line for line in served.lines if "Duplicate" in line or "Traceback" in line]


def test_an_answer_says_which_version_gave_it(server: Served):
    answer = server.ask("/invocations", ROWS).body
    assert answer["predictions"] == [1, 1] and answer["model_version"] == "1"
    assert len(set(answer["prediction_ids"])) == 2 and set(answer.get("audit_ids", [])) <= set(answer["prediction_ids"])
    answer = server.ask("/invocations?probabilities=true", ROWS).body
    assert answer["probabilities"][0] == {"0": 0.0, "1": 1.0, "2": 0.0, "3": 0.0}


def test_every_route_answers(server: Served):
    assert server.ask("/invocations", ROWS).status == 200
    for path in GET_ROUTES:
        assert server.ask(path).status == 200 == server.ask(path, method="HEAD").status, path
    assert {"model_version", "run_id", "since", "swaps", "last_error"} <= set(server.ask("/status").body)
    metrics = server.ask("/metrics").body
    assert 'serve_requests_total{path="/invocations"' in metrics and 'serve_rows_total{model_version="1"' in metrics
    assert [column["name"] for column in server.ask("/model").body["inputs"]] == ["a", "b"]
    routes = server.ask("/openapi.json").body["paths"]
    ids = [operation["operationId"] for route in routes.values() for operation in route.values()]
    assert len(ids) == len(set(ids))
    assert server.ask("/nothing").status == 404 and server.ask("/invocations").status == 405


def test_feedback_on_a_prediction_of_just_now(server: Served):
    """feedback/test_labels.py has all cases."""
    first, second = server.ask("/invocations", ROWS).body["prediction_ids"]
    confirmed = server.ask("/feedback", {"prediction_id": first, "label": 1, "source": "me"}).body["results"][0]
    assert confirmed["state"] == "accepted" == server.ask(f"/feedback/{first}").body["state"]
    conflict = [{"prediction_id": second, "label": 3, "comment": "was a three"}, {"prediction_id": second, "label": 2}]
    results = server.ask("/feedback", conflict).body["results"]
    assert {result["message"] for result in results} == {
        "differs from another label of this row: an administrator decides"
    }
    assert [label["state"] for label in server.ask(f"/feedback/{second}").body["labels"]] == ["new", "new"]


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
    (rejected,) = [item for item in server.ask("/feedback?state=rejected").body if item["prediction_id"] == identifier]
    assert rejected["annotator"] == "address:127.0.0.1"


def test_while_the_database_is_locked_predictions_go_on_and_labels_are_refused(project: Project, server: Served):
    """feedback/test_outages.py has a database that is locked, full, gone or replaced, and looks at what is stored."""
    with closing(sqlite3.connect(project.root / "feedback.db", isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer = server.ask("/invocations", ROWS).body
        label = {"prediction_id": answer["prediction_ids"][0], "label": 1}
        assert answer["predictions"] == [1, 1]
        refused = server.ask("/feedback", label)
        assert refused.status == 503 and refused.body["message"].startswith("nothing was stored: ")
        refused = server.ask(f"/feedback/{label['prediction_id']}")
        assert refused.status == 503 and refused.body["message"].startswith("the feedback store does not work: ")
        server.wait("/status", store_healthy=False)
        assert server.ask("/invocations", ROWS).status == 200
    until(lambda: server.ask("/feedback", label).status == 200)
    server.wait("/status", store_healthy=True, dropped=0)


def test_one_tensor_for_all_columns_nested_or_flat(server: Served):
    """test_inference_protocol.py has one tensor for each column."""
    for data in ([0, 1, 2.0, 1], [[0, 1], [2, 1]]):
        rows = {"name": "rows", "shape": [2, 2], "datatype": "FP64", "data": data}
        sent = {"inputs": [rows], "outputs": [{"name": "predictions"}, {"name": "probabilities"}]}
        predictions, probabilities = server.ask(f"/v2/models/{NAME}/infer", sent).body["outputs"]
        assert predictions == {"name": "predictions", "datatype": "INT64", "shape": [2], "data": [1, 1]}
        assert probabilities["shape"] == [2, 4] and probabilities["data"] == [0, 1, 0, 0] * 2


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/invocations", b"", 400),
        ("/invocations", b"{", 400),
        ("/invocations", b'{"dataframe_split": {"columns": ["a"], "data": [[1]]}}', 400),
        ("/invocations", b'{"dataframe_split": {"columns": ["a", "b"], "data": [["secret-input", 1]]}}', 400),
        ("/invocations", b'{"inputs": ' + b"[1]," * 9_000_000 + b"1}", 413),
        ("/feedback", b"{", 422),
        ("/feedback", b"[]", 400),
        ("/feedback", b'{"prediction_id": "x"}', 422),
        ("/feedback", b'{"prediction_id": "x", "label": {"secret-input": 1}}', 422),
        ("/feedback", b'[{"prediction_id": "x", "label": 1, "secret-input": 1}]', 422),
        ("/events", b"{}", 404),
    ],
)
def test_a_bad_request_gets_one_line(server: Served, path: str, body: bytes, status: int):
    answer = server.ask(path, body)
    assert answer.status == status
    assert "\n" not in answer.body["message"] and "secret-input" not in json.dumps(answer.body)


def test_a_web_page_elsewhere_cannot_reach_an_open_server(server: Served):
    assert server.ask("/invocations", ROWS, Host="evil.example").status == 403
    routes = ("/invocations", "/feedback", "/feedback/x/review", "/events", f"/v2/models/{NAME}/infer")
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):  # a page may send these without permission
        assert {server.ask(route, b"{}", Content_Type=content_type).status for route in routes} == {415}


def test_each_right_needs_its_token_and_a_label_bears_the_name_of_its_token(project: Project, server: Served):
    arguments = (f"registered_model_name={NAME}", "feedback.url=sqlite:///named.db", "serve.feedback_per_minute=3",
                 "feedback.review=manual")  # fmt: skip
    tokens = {"SERVE_PREDICT_TOKEN": "p", "SERVE_FEEDBACK_TOKEN": "alice:a, bob:b,c", "SERVE_ADMIN_TOKEN": "admin"}
    with serving(project, *arguments, **tokens) as served:
        served.wait()

        def ask(path: str, body: object, token: str):
            return served.ask(path, body, Authorization=f"Bearer {token}")

        assert served.ask("/invocations", ROWS).status == ask("/invocations", ROWS, "a").status == 401
        assert served.ask(f"/v2/models/{NAME}/infer", {}).status == 401
        assert '"example": {' not in json.dumps(served.ask("/openapi.json").body)
        assert '"example": {' in json.dumps(ask("/openapi.json", None, "p").body)
        rows = {"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2]] * 4}}
        ids = ask("/invocations", rows, "p").body["prediction_ids"]
        for identifier, token in zip(ids, ("a", "b", "c", "admin"), strict=True):
            label = {"prediction_id": identifier, "label": 1, "source": "me"}
            answer = ask("/feedback", label, token)
            assert answer.status == 200 and answer.body["results"][0]["state"] == "new"
            assert ask("/feedback", {**label, "annotator": "x"}, token).status == 422
        for wrong in ("p", "alice:a", "alice", "aa", "a,", ""):
            assert ask("/feedback", label, wrong).status == 401
        assert ask("/feedback", [label] * 3, "a").status == 429, "one of three labels was used"
        assert ask("/feedback", [label] * 2, "b").status == 200
        assert "bob" not in str(ask(f"/feedback/{ids[1]}", None, "a").body)
        assert ask("/feedback?state=new", None, "a").status == 401
        waiting = ask("/feedback?state=new", None, "admin").body
        assert {"token:alice", "token:bob", "token:"} == {item["annotator"] for item in waiting}
        review = f"/feedback/{ids[0]}/review"
        assert ask(review, {"accept": True}, "a").status == 401
        assert ask(review, {"accept": True}, "admin").body["state"] == "accepted"
    about = Store(f"sqlite:///{project.root}/named.db").labelled(NAME, "accepted").about
    assert about["annotator"].tolist() == ["token:alice"] and about["source"].tolist() == ["me"]


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
    assert "label: expected text of at most 1000 characters, a number, true or false" in people.failures[-1]


# --- settings ---


def make_settings(*overrides: str) -> Settings:
    with initialize_config_dir(str(CONF), version_base=None):
        config = OmegaConf.to_container(compose("serve", list(overrides)))
    return Settings.make(registered_model_name=NAME, feedback=config["feedback"], **config["serve"])


def refusal(*overrides: str) -> str:
    """The error for a configuration; fails the test if that is not one line."""
    with pytest.raises(UserError) as error:
        make_settings(*overrides)
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
    message = refusal(key)
    assert key.lstrip("+").partition("=")[0] in message and ("must" in message or "no such key" in message)


def test_an_open_address_needs_tokens_and_a_webhook_needs_an_address(monkeypatch: pytest.MonkeyPatch):
    assert "SERVE_PREDICT_TOKEN, SERVE_FEEDBACK_TOKEN, SERVE_ADMIN_TOKEN" in refusal("serve.host=0.0.0.0")
    for kind in ("PREDICT", "FEEDBACK", "ADMIN"):
        monkeypatch.setenv(f"SERVE_{kind}_TOKEN", kind)
    assert make_settings("serve.host=0.0.0.0")
    assert "serve.webhook_url=http://" in refusal("serve.host=0.0.0.0", "serve.webhook=true")
    assert "SERVE_VERDICT_KEY" in refusal("serve.require_verdict=true")


@pytest.mark.parametrize("tokens", ["secret-a,", "alice:", ":secret-a", "alice:secret-a,bob:secret-a", " ",
                                    "bob:secret-admin"])  # fmt: skip
def test_tokens_that_are_none(monkeypatch: pytest.MonkeyPatch, tokens: str):
    monkeypatch.setenv("SERVE_ADMIN_TOKEN", "secret-admin")
    monkeypatch.setenv("SERVE_FEEDBACK_TOKEN", tokens)
    message = refusal()
    assert "SERVE_FEEDBACK_TOKEN" in message and "secret" not in message


@pytest.mark.parametrize(
    "variables",
    [("PREDICT_TOKEN", "ADMIN_TOKEN"), ("PREDICT_TOKEN", "FEEDBACK_TOKEN"), ("FEEDBACK_TOKEN", "ADMIN_TOKEN"),
     ("WEBHOOK_SECRET", "ADMIN_TOKEN"), ("WEBHOOK_SECRET", "PREDICT_TOKEN"), ("WEBHOOK_SECRET", "FEEDBACK_TOKEN")],
)  # fmt: skip
def test_no_two_rights_share_a_secret(monkeypatch: pytest.MonkeyPatch, variables: tuple[str, str]):
    for variable in ("PREDICT_TOKEN", "FEEDBACK_TOKEN", "ADMIN_TOKEN", "WEBHOOK_SECRET"):
        name = "alice:" if variable == "FEEDBACK_TOKEN" else ""
        monkeypatch.setenv(f"SERVE_{variable}", name + ("zqxjkv" if variable in variables else variable.lower()))
    message = refusal()
    assert all(f"SERVE_{variable}" in message for variable in variables) and "zqxjkv" not in message


def test_an_address_or_a_cache_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch):
    for kind in ("PREDICT", "FEEDBACK", "ADMIN"):
        monkeypatch.setenv(f"SERVE_{kind}_TOKEN", kind)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"serve.port={other.getsockname()[1]}"
        for setting, advice in ((taken, "serve.port=0"), ("serve.host=192.0.2.1", "serve.host=127.0.0.1")):
            with pytest.raises(UserError) as error:
                listen(make_settings(setting))
            assert setting in str(error.value) and advice in str(error.value)
    with pytest.raises(UserError, match=r"serve\.cache=/proc/none: .*choose a folder that can be written"):
        Cache("/proc/none", NAME)
