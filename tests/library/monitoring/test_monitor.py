"""`monitor` as a user calls it: real stores, real runs, a loop that retrains by itself."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from unittest.mock import Mock

import mlflow
import pytest
from conftest import ROOT, Project, environment
from hydra import compose, initialize_config_dir
from preloaded import programs
from reports import report
from test_retrain import DIGITS, Case

import steps.monitor
from alacarte.errors import StoreError, UserError
from alacarte.monitoring.drift import Decision
from project.data import load_digits


@pytest.fixture
def case(trained: Project, tmp_path: Path, request: pytest.FixtureRequest) -> Case:
    return Case(trained, request.node.name.removeprefix("test_"), tmp_path)


def monitor(case: Case, *arguments: str, code: int = 0) -> str:
    return case.project.step("monitor", *case.names, *arguments, code=code).stdout


def test_a_shift_is_seen_and_reported(case: Case):
    rows = load_digits()
    X, y = rows.drop(columns="digit"), rows["digit"].to_numpy()
    report(case.store, case.name, X[:400], y[:400], case.model.predict(X[:400]), classes=DIGITS, age=5 * 3600)
    case.report(200, seed=1, annotator="<b>alice</b>", age=60)
    output = monitor(case, "monitor.hours=1", "metrics=cost", code=3)
    assert "retrain   yes" in output and "distributions moved" in output and "audit labels is proved below" in output
    (run,) = case.runs("monitor")
    assert output.splitlines()[-1] == f"run_id={run.info.run_id}" and run.info.status == "FINISHED"
    assert run.data.tags["retrain"] == "yes" and run.data.metrics["drift_share"] > 0.2
    assert run.data.metrics["audit_accuracy"] < 0.6 and run.data.metrics["audit_cost"] > 0.4
    page = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/report.html")
    assert "<b>alice</b>" not in page and "&lt;b&gt;alice&lt;/b&gt;" in page and "data:image/png" in page
    files = {file.path for file in case.client.list_artifacts(run.info.run_id)}
    assert {"drift.json", "drift.png", "answers.png", "decision.json", "report.html", "config.yaml"} <= files
    assert json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/decision.json"))["retrain"] is True


def test_nothing_is_decided_from_too_few(case: Case):
    case.report(50, seed=1)
    assert "retrain   no, 50 predictions" in monitor(case)
    assert "monitor.hours=0" in case.project.step("monitor", "monitor.hours=0", code=2).stderr


def test_drift_wants_labels_and_labels_want_nothing_else(case: Case):
    case.report(400, seed=1)
    dear = ("monitor.act=true", "monitor.labels_with_drift=100000")
    output = monitor(case, *dear, "monitor.labels=100000")
    assert "retrain   yes" in output and "not retrained" in output and not case.runs("retrain")
    output = monitor(
        case, *dear, "monitor.labels=5", "retrain.max_share_per_annotator=10", "gate.dry_run=true", "explain=false"
    )
    assert "retrain: from version 1" in output and "not retrained" not in output and len(case.runs("retrain")) == 1


def test_a_loop_continues_after_an_error_unless_it_is_of_the_first_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        url = f"feedback.url=sqlite:///{tmp_path}/feedback.db"
        cfg = compose("monitor", ["registered_model_name=m", url, "monitor.every=0.01"])
    no, wrong, locked = (Decision(False, ""), 0), UserError("the data have changed"), StoreError("locked")
    for windows, end in (([no, wrong, locked, wrong], KeyboardInterrupt), ([locked, wrong], UserError)):
        judge_window = Mock(side_effect=[*windows, KeyboardInterrupt])
        monkeypatch.setattr(steps.monitor, "judge_window", judge_window)
        with pytest.raises(end):
            steps.monitor.main.__wrapped__(cfg, None)
        assert capsys.readouterr().out.count("locked\n") == 1
    assert judge_window.call_count == 2


def test_two_loops_retrain_once(case: Case):
    """Two monitors look at one store: one of them retrains, the new version is champion, and both end when told to."""
    case.report(400, seed=1)
    settings = ("retrain.max_share_per_annotator=10", "monitor.every=2", "monitor.act=true", "explain=false")
    command = ["python", "-m", "steps.monitor", *case.names, *settings]
    env = environment(MLFLOW_TRACKING_URI=case.project.uri)
    env["PATH"] = f"{programs()}{os.pathsep}{env['PATH']}"
    loops = [subprocess.Popen(command, cwd=case.project.root, env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    try:
        end = time.monotonic() + 120
        while case.champion() == "1" and time.monotonic() < end:
            time.sleep(0.5)
        while len(case.runs("monitor")) < 4 and time.monotonic() < end:
            time.sleep(0.5)
    finally:
        for loop in loops:
            loop.send_signal(signal.SIGTERM)
        outputs = [loop.communicate(timeout=60)[0] for loop in loops]
    assert [loop.returncode for loop in loops] == [143, 143]
    assert case.champion() == "2" and len(case.runs("retrain")) == 1
    assert sum("retrain: from version 1" in each for each in outputs) == 1
    assert not case.project.runs("attributes.status = 'RUNNING'")
    (retrained,) = case.runs("retrain")
    assert retrained.data.tags["reason"].startswith("monitor: ")
