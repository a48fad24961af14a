"""The Open Inference Protocol and /openapi.json: a real server for a table of several types."""

import json
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from conftest import Project, tracking
from registries import register
from servers import Answered, Served, serving
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

MIXED = pd.DataFrame(
    {
        "amount": [0.5, 1.5, 2.0, 2.5],
        "count": [1, 2, 3, 4],
        "word": ["a", "b", "a", "c"],
        "flag": [True, False, True, False],
        "day": pd.to_datetime(["2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04"]),
    }
)
DATATYPES = {"amount": "FP64", "count": "INT64", "word": "BYTES", "flag": "BOOL", "day": "BYTES"}
ROWS = [[0.5, 1, "a", True, "2026-01-01T00:00:00"], [2.5, 4, "c", False, "2026-01-04T00:00:00"]]
MARK = "zqxjkv"  # is sent in wrong requests, and must not be in an answer


@pytest.fixture(scope="module")
def mixed(project: Project) -> Iterator[Served]:
    encoder = make_column_transformer((OneHotEncoder(), ["word"]), ("passthrough", ["amount", "count"]))
    model = make_pipeline(encoder, LogisticRegression(C=1e6)).fit(MIXED, ["x", "y", "x", "z"])
    with tracking(project.uri):
        project.client.set_registered_model_alias("mixed", "champion", register("mixed", rows=MIXED, model=model))
    with serving(project, "registered_model_name=mixed") as served:
        served.wait()
        yield served
        assert not [line for line in served.lines if "Traceback" in line]


def tensor(name: str, shape: list[int], datatype: str, data: list[Any]) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def by_column(**changed: dict[str, Any]) -> dict[str, Any]:
    columns = zip(MIXED, zip(*ROWS, strict=True), strict=True)
    tensors = {name: tensor(name, [2], DATATYPES[name], list(values)) for name, values in columns}
    return {"inputs": [{**made, **changed.get(name, {})} for name, made in tensors.items()]}


def outputs(answer: Answered) -> dict[str, Any]:
    assert answer.status == 200, answer
    return {output["name"]: output for output in answer.body["outputs"]}


def test_one_tensor_for_each_column_gets_the_answer_of_invocations(mixed: Served):
    expected = mixed.ask("/invocations", {"dataframe_split": {"columns": list(MIXED), "data": ROWS}}).body
    assert expected["predictions"] == ["x", "z"]
    for path in ("/v2/models/mixed/infer", "/v2/models/mixed/versions/1/infer"):
        answer = mixed.ask(path, {"id": "mine", **by_column(word={"shape": [2, 1], "data": [["a"], ["c"]]})})
        assert (answer.body["model_name"], answer.body["model_version"], answer.body["id"]) == ("mixed", "1", "mine")
        assert outputs(answer)["predictions"] == tensor("predictions", [2], "BYTES", ["x", "z"])
        for prediction_id in outputs(answer)["prediction_ids"]["data"]:
            label = {"prediction_id": prediction_id, "label": "x"}
            assert mixed.ask("/feedback", label).body["results"][0]["state"] == "accepted", "the prediction is stored"


def test_health_and_metadata(mixed: Served):
    assert mixed.ask("/v2").body["name"] == "alacarte"
    assert mixed.ask("/v2/health/live").body == {"live": True} and mixed.ask("/v2/health/ready").body == {"ready": True}
    for path in ("/v2/models/mixed", "/v2/models/mixed/versions/1"):
        assert mixed.ask(f"{path}/ready").body == {"name": "mixed", "ready": True}
        metadata = mixed.ask(path).body
        assert metadata["name"] == "mixed" and metadata["versions"] == ["1"]
        assert metadata["inputs"] == [
            {"name": name, "datatype": kind, "shape": [-1]} for name, kind in DATATYPES.items()
        ]
        assert [output["datatype"] for output in metadata["outputs"]] == ["BYTES", "BYTES"]


@pytest.mark.parametrize(
    ("status", "path", "body"),
    [
        (404, "models/other/infer", by_column()),
        (404, "models/mixed/versions/2/infer", by_column()),
        (405, "models/mixed/infer", None),
        (400, "models/mixed/infer", [MARK]),
        (400, "models/mixed/infer", b"[" * 100_000),
        (400, "models/mixed/infer", by_column(word={"name": MARK})),
        (400, "models/mixed/infer", by_column(word={"data": [1, 2]})),
        (400, "models/mixed/infer", by_column(count={"data": [MARK, 2]})),
        (400, "models/mixed/infer", by_column(count={"shape": [3]})),
        (400, "models/mixed/infer", by_column(count={"shape": [-1, -2]})),
        (400, "models/mixed/infer", by_column(count={"shape": [10**18] * 40_000})),
        (400, "models/mixed/infer", {"inputs": [tensor("rows", [2**31] * 9, "FP64", [1])]}),
        *[
            (400, "models/mixed/infer", {"inputs": [tensor("rows", shape, "FP64", [])]})
            for shape in ([0, 5], [0, 2**62], [0, 10**30], [2**64, 0], [2**31, 0], [2**31, 2**31])
        ],
        (400, "models/mixed/infer", {"inputs": [tensor("rows", [2, 3], "FP64", [1] * 6)]}),
        (400, "models/mixed/infer", {**by_column(), "outputs": [{"name": MARK}]}),
        (413, "models/mixed/infer", by_column(count={"data": [1] * 6_000_000})),
        (413, "models/mixed/infer", {"inputs": [tensor(name, [10_001], "FP64", [None] * 10_001) for name in DATATYPES]}),
    ],
)  # fmt: skip
def test_an_error_is_one_line_that_repeats_no_input(mixed: Served, status: int, path: str, body: object):
    answer = mixed.ask(f"/v2/{path}", body)
    assert answer.status == status, answer
    assert list(answer.body) == ["error"] and answer.body["error"] and "\n" not in answer.body["error"]
    assert MARK not in json.dumps(answer.body)


def test_the_description_names_columns_and_an_example(mixed: Served):
    description = mixed.ask("/openapi.json").body
    body = description["paths"]["/invocations"]["post"]["requestBody"]["content"]["application/json"]
    record = body["schema"]["properties"]["dataframe_records"]["items"]
    assert {name: kind["type"][0] for name, kind in record["properties"].items()} == {
        "amount": "number", "count": "integer", "word": "string", "flag": "boolean", "day": "string",
    }  # fmt: skip
    assert mixed.ask("/invocations", body["example"]).body["predictions"] == ["x"]
    tensors = description["paths"]["/v2/models/{model_name}/infer"]["post"]["requestBody"]["content"][
        "application/json"
    ]
    assert outputs(mixed.ask("/v2/models/mixed/infer", tensors["example"]))["predictions"]["data"] == ["x"]
    (scheme,) = description["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert description["paths"]["/invocations"]["post"]["security"]
    hidden = mixed.ask("/openapi.json", Host="evil.example")
    assert hidden.status == 200 and '"example": {' not in json.dumps(hidden.body), "only callers learn about the model"
