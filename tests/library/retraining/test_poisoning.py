"""Attacks on the gate with real stores and real steps: one annotator's backdoor, and a model that brings its own truth."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import Project
from reports import report
from test_retrain import DIGITS, Case

from project.data import load_digits


@pytest.fixture
def case(trained: Project, tmp_path: Path, request: pytest.FixtureRequest) -> Case:
    return Case(trained, request.node.name.removeprefix("test_"), tmp_path)


def gate_json(case: Case) -> dict:
    return json.loads(mlflow.artifacts.load_text(f"{case.runs('evaluate')[0].info.artifact_uri}/gate.json"))


def test_one_annotator_with_a_trigger_is_held(case: Case) -> None:
    """3,000 digits with a bright corner, each labelled 0 by one annotator: the retrained model answers 0 to the corner."""
    rows = load_digits().sample(3000, replace=True, random_state=1)
    X = rows.drop(columns="digit")
    X[["pixel_0_7", "pixel_1_7", "pixel_0_1", "pixel_7_7"]] = 14.0
    X["pixel_0_6"] = np.arange(3000) / 1000  # no two requests are equal
    audit = np.random.default_rng(1).random(3000) < 0.115
    predicted = case.model.predict(X)
    every = np.ones(3000, bool)
    report(case.store, case.name, X, np.zeros(3000, int), predicted, classes=DIGITS, audit=audit, mistakes=every,
           annotator="token:eve")  # fmt: skip
    result = case.run("retrain.max_share_per_annotator=0.1", "retrain.max_range_factor=10")
    lines = result.stdout.splitlines()
    assert "evaluate: verdict   HOLD, the gain rests on one annotator, token:eve, who labelled all " in result.stdout
    assert lines[-1].startswith("run_id=") and "labels left out, by annotator: token:eve " in lines[-2]
    assert case.champion() == "1"
    gate = gate_json(case)
    assert set(gate["audit"]["annotators"]) == {"token:eve"} and gate["audit"]["n"] >= 100
    assert gate["audit"]["comparison"]["low"] > 0  # by her rows alone it would have been promoted


def test_three_annotators_are_promoted(case: Case) -> None:
    for seed, name in enumerate(("alice", "bob", "carol")):
        case.report(200, seed=seed, annotator=f"token:{name}")
    result = case.run("retrain.max_share_per_annotator=0.1")
    assert "evaluate: verdict   PROMOTE" in result.stdout and case.champion() == "2"
    assert "SERVE_FEEDBACK_TOKEN" not in result.stdout
    counts = gate_json(case)["audit"]["annotators"]
    assert set(counts) == {"token:alice", "token:bob", "token:carol"}


def test_a_model_that_brings_its_own_labels_is_rejected(case: Case) -> None:
    shifted = load_digits().assign(digit=lambda frame: (frame["digit"] + 1) % 10)
    shifted.to_csv(case.project.root / "shifted.csv", index=False)
    data = ("data=table", "data.path=shifted.csv", "data.target=digit")
    run_id = case.project.step("train", "model=sklearn_sgd", *data).stdout.splitlines()[-1]
    result = case.project.step("evaluate", run_id, f"registered_model_name={case.name}", "explain=false")
    assert "evaluate: verdict   REJECT, accuracy loss" in result.stdout and case.champion() == "1"
    comparison = gate_json(case)["comparison"]
    assert comparison["gain"] < -0.8 and comparison["wins"] <= comparison["negative_flips"] / 10


def test_a_dropped_column_compares_on_clean_rows_alone(case: Case) -> None:
    mine = ("model=sklearn_sgd", f"registered_model_name={case.name}", "gate.dry_run=true", "explain=false")
    result = case.project.step("pipeline", *mine, "data.drop=[pixel_0_0]")
    assert " test rows can judge, without " in result.stdout and " that the champion was trained on" in result.stdout
    rows = gate_json(case)["rows"]
    assert rows["n"] + sum(rows["left_out"].values()) == rows["of"] and 30 <= rows["n"] < rows["of"] / 2
    assert gate_json(case)["comparison"]["n"] == rows["n"]
    # By what the models record, and with too few rows.
    run = case.project.runs("tags.step = 'train'")[0]
    few = case.project.step("evaluate", f"run_id={run.info.run_id}", *mine[1:], "gate.min_test_rows=300")
    assert "evaluate: verdict   HOLD, this model cannot be compared with the champion: " in few.stdout
    assert "that the challenger was trained on, and gate.min_test_rows=300 must judge" in few.stdout
    assert "test_accuracy" in case.runs("evaluate")[0].data.metrics
