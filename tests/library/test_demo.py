"""The whole loop in one command, with fewer requests than by default."""

from pathlib import Path

import mlflow
from conftest import Project

SMALL = ("model=sklearn_sgd", "demo.requests=120", "demo.per_second=40", "monitor.labels_with_drift=150")


def test_the_loop_closes_by_itself(project: Project):
    parameters = [word for one in SMALL for word in ("-P", one)]
    done = project.run("mlflow", "run", ".", "-e", "demo", "--env-manager", "local", *parameters)
    told = done.stdout + done.stderr
    assert "evaluate: PROMOTE" in told and "0 failed requests" in told
    (run,) = project.runs("tags.step = 'demo'")
    metrics = run.data.metrics
    assert metrics["failed_requests"] == 0
    assert metrics["accuracy_turned"] < metrics["accuracy_after"] - 0.2 < metrics["accuracy_before"]
    mlflow.set_tracking_uri(project.uri)
    picture = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="demo.png"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not project.runs("attributes.status = 'RUNNING'")
    versions = project.client.search_model_versions("name = 'demo'")
    champion = project.client.get_model_version_by_alias("demo", "champion")
    assert champion.tags["parent_version"] == "1" and {"1", str(champion.version)} <= {str(v.version) for v in versions}


def test_a_name_in_use_is_left_alone(project: Project):
    project.step("pipeline", "model=sklearn_sgd", "registered_model_name=ours")
    assert (
        "a name of its own"
        in project.run("python", "-m", "examples.demo.demo", *SMALL, "registered_model_name=ours", code=2).stderr
    )
    assert str(project.client.get_model_version_by_alias("ours", "champion").version) == "1"
