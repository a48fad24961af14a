"""The whole loop in one command, with fewer requests than by default."""

from pathlib import Path

import mlflow
from conftest import Project, tracking

SMALL = ("model=sklearn_sgd", "demo.requests=120", "demo.per_second=40", "monitor.labels_with_drift=150")


def test_the_loop_closes_by_itself(project: Project):
    parameters = [word for each in SMALL for word in ("-P", each)]
    result = project.run("mlflow", "run", ".", "-e", "demo", "--env-manager", "local", *parameters)
    output = result.stdout + result.stderr
    assert "evaluate: verdict   PROMOTE" in output and "0 failed requests" in output
    (run,) = project.runs("tags.step = 'demo'")
    metrics = run.data.metrics
    assert metrics["failed_requests"] == 0
    assert metrics["accuracy_turned"] < metrics["accuracy_after"] - 0.2 < metrics["accuracy_before"]
    with tracking(project.uri):
        picture = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="demo.png"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not project.runs("attributes.status = 'RUNNING'")
    champion = project.client.get_model_version_by_alias("demo", "champion")
    assert champion.tags["parent_version"] == "1"
    # The champion of another model is left alone.
    project.client.create_registered_model("ours")
    version = project.client.create_model_version("ours", str(project.root))
    project.client.set_registered_model_alias("ours", "champion", version.version)
    refused = project.run("python", "-m", "examples.demo.demo", *SMALL, "registered_model_name=ours", code=2)
    assert "a name of its own" in refused.stderr
    assert str(project.client.get_model_version_by_alias("ours", "champion").version) == "1"
