"""The other ways to a workspace, `mlflow run` and the tasks of a bundle, and what goes wrong there."""

import json
import subprocess
from types import SimpleNamespace

import mlflow
import pytest
from conftest import ROOT, environment
from preloaded import programs
from registries import until
from there import EXPERIMENT, MODEL, SMALL, There

from alacarte import launch, tracking
from alacarte.databricks import endpoint, stage
from alacarte.databricks import submit as databricks


def test_mlflow_run_takes_every_form_there_that_it_takes_here(there: There):
    """The CLI submits and leaves; its run is the step's, with the configuration that the same words make here."""
    text = "@a  b=c, 'd' \"e\" {f} #g @h 50% $i `j` \\k"
    words = ("model=sklearn_sgd", "model.lr=1e-1", "data.drop=[pixel_0_0,pixel_0_1]", "save_to=", "data.name=two words",
             f"description={text}", "overrides=seed=7 data.stop=600")  # fmt: skip
    parameters = [part for word in words for part in ("-P", word)]
    there.here("stage")
    there.run(
        "mlflow", "run", "build/databricks", "-e", "train", "-b", "databricks", "--backend-config",
        "databricks/cluster.json", "--experiment-name", EXPERIMENT, *parameters,
    )  # fmt: skip
    job = there.workspace.jobs[max(there.workspace.jobs)]
    until(lambda: job.state["life_cycle_state"] == "TERMINATED")
    assert job.state["result_state"] == "SUCCESS", job.log
    run = there.runs()[0]
    assert run.info.status == "FINISHED" and run.data.tags["mlflow.note.content"] == text
    assert run.data.tags["mlflow.source.git.commit"] and run.data.tags["exit_code"] == "0"
    pairs = [word.partition("=") for word in words]  # as `mlflow run` hands parameters to a step
    here = launch.compose("train", [part for key, _, value in pairs for part in (f"--{key}", value)])
    assert run.data.tags["config_hash"] == tracking.config_hash(here)
    upload = next(call for call in reversed(there.workspace.calls) if call.endswith(".tar.gz"))
    assert there.workspace.dbfs(upload.split()[1]).stat().st_size < 1_000_000


# --- tasks of databricks.yml -------------------------------------------------------------------------------------------


def task(there: There, *words: str, code: int = 0) -> str:
    """Run the boot script as a task does: the file itself, beside it, with whole words."""
    folder, env = there.root / "databricks", environment(**there.workspace.env())
    command = (f"{programs()}/python", "-P", str(folder / "boot.py"), *words)
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_tasks_hand_over_by_the_number_of_their_job(there: There):
    from_job = (f"@experiment={EXPERIMENT}", "@job=77")
    there.workspace.secrets["alacarte/feedback"] = "s3cret"
    (there.root / "project" / "told.py").write_text("import os, sys\n\nprint(sys.argv, os.environ['PGPASSWORD'])\n")
    task(there, "steps.train", *from_job, *SMALL, "overrides=seed=5 description='two words'")
    (train,) = there.runs("tags.job_run_id = '77'")
    assert train.data.tags["mlflow.note.content"] == "two words" and train.data.params["seed"] == "5"
    command = ("project.told", "@secret=PGPASSWORD:alacarte/feedback", f"@experiment={EXPERIMENT}", "a=b  c")
    output = task(there, *command, "@job=77", "@run_id=train")
    assert f"told.py', 'a=b  c', 'run_id={train.info.run_id}'] s3cret" in output
    assert "no finished run of train" in task(there, *command, "@job=78", "@run_id=train", code=1)

    experiment = there.client.get_experiment_by_name(EXPERIMENT)
    tags = {"step": "monitor", "job_run_id": "77", "retrain": "no"}
    run = there.client.create_run(experiment.experiment_id, tags=tags)
    there.client.set_terminated(run.info.run_id)
    output = task(there, *command, "@job=77", "@if=monitor")
    assert "monitor did not ask for it: nothing to do" in output and "s3cret" not in output
    assert not there.running()


def test_an_endpoint_follows_the_champion_and_keeps_the_rest(there: There, capsys, monkeypatch):
    for key, value in there.workspace.env().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(mlflow.MlflowClient, "get_model_version_by_alias", lambda *_: SimpleNamespace(version="7"))
    monkeypatch.setattr("mlflow.get_registry_uri", lambda: "databricks-uc")
    other = {"name": "other", "entity_name": "main.default.other", "entity_version": "3", "state": {"x": 1}}
    ours = {"name": "champion", "entity_name": MODEL, "entity_version": "1", "workload_size": "Small", "creator": "me"}
    traffic = {"routes": [{"served_model_name": "champion", "traffic_percentage": 100}]}
    there.workspace.endpoints["there"] = {"config": {"served_entities": [other, ours], "traffic_config": traffic}}
    assert endpoint.main(["there", MODEL]) == 0
    assert "goes over to version 7" in capsys.readouterr().out
    config = there.workspace.endpoints["there"]["config"]
    assert config["served_entities"] == [
        {"name": "other", "entity_name": "main.default.other", "entity_version": "3"},
        {"name": "champion", "entity_name": MODEL, "entity_version": "7", "workload_size": "Small"},
    ]
    assert config["traffic_config"] == traffic
    before = len(there.workspace.calls)
    assert endpoint.main(["there", MODEL]) == 0
    assert "already" in capsys.readouterr().out
    assert not [call for call in there.workspace.calls[before:] if call.startswith("PUT")]
    for arguments, line in (
        (["nowhere", MODEL], "endpoint nowhere cannot be read"),
        (["there", "main.default.none"], "serves main.default.other, main.default.digits, not main.default.none"),
        (["there", "none"], "such as main.default.none"),
    ):
        assert endpoint.main(arguments) == 2
        assert line in capsys.readouterr().err


# --- failures --------------------------------------------------------------------------------------------------------


MISTAKE = ("data=table", "data.path=/nowhere/houses.csv", "data.target=y")


def test_a_step_that_fails_there_fails_here_also_when_an_answer_does_not_come(there: There):
    # With 400, so that no client asks again by itself.
    there.workspace.once_running = lambda: setattr(there.workspace, "refuse_once", "/api/2.0/jobs/runs/get")
    output = there.job("train", *MISTAKE, code=2)
    assert "no answer, asked again" in output
    assert "train failed, its run is FAILED: train: data.path=/nowhere/houses.csv" in output
    assert there.runs()[0].info.status == "FAILED" and not there.running()


@pytest.mark.parametrize(
    ("path", "cluster", "line"),
    [
        (".tar.gz", {}, "refused"),
        (None, {"node_type_id": "none"}, "Invalid node_type_id"),
        (None, {"num_workers": 99}, "Over quota"),
    ],
)
def test_what_fails_before_the_step_leaves_a_failed_run(there: There, path: str | None, cluster: dict, line: str):
    config = there.root.parent / "cluster.json"
    config.write_text(json.dumps({**stage.read_cluster(ROOT / "databricks" / "cluster.json"), **cluster}))
    if path:
        (there.root / "project" / "networks.py").open("a").write("# another archive\n")
    there.workspace.refuse_once = path
    before = len(there.runs())
    output = there.job("train", *SMALL, "--backend-config", str(config), code=1)
    assert line in output and "Traceback" not in output
    assert len(there.runs()) == before + 1
    assert there.runs()[0].info.status == "FAILED" and not there.running()


def test_a_driver_that_dies_leaves_a_failed_run(there: There):
    there.workspace.once_running = lambda: there.workspace.jobs[max(there.workspace.jobs)].process.kill()
    assert "train failed, its run is FAILED: Workload failed" in there.job("train", *SMALL, code=1)
    assert not there.running()


def test_a_token_that_expires_before_the_submit_leaves_a_run_that_the_next_launch_closes(there: There, monkeypatch):
    there.workspace.expire_after = "/api/2.0/mlflow/runs/create"
    output = there.job("train", *SMALL, code=1)
    assert "expired" in output and "stays RUNNING" in output and databricks.SETTLE in output
    (left,) = there.running()
    there.workspace.renew("n" * 36)
    there.here("settle", "--experiment-name", EXPERIMENT)
    assert there.running(), "a run that may just be being submitted is left alone"
    monkeypatch.setattr(databricks, "MAX_SUBMIT_SECONDS", 0)
    there.here("settle", "--experiment-name", EXPERIMENT)
    assert there.client.get_run(left.info.run_id).info.status == "FAILED" and not there.running()


def test_a_token_that_expires_during_the_job_leaves_the_step_to_end_its_run(there: There):
    there.workspace.once_running = lambda: setattr(there.workspace, "expired", True)
    try:
        assert "goes on unseen" in there.job("train", *MISTAKE, code=1)
    finally:
        there.workspace.renew("m" * 36)
    until(lambda: there.runs()[0].data.tags.get("exit_code") == "2")
    assert there.runs()[0].info.status == "FAILED" and not there.running()


def test_whoever_stops_waiting_stops_the_job(there: There):
    program = "import sys; from alacarte.databricks import submit; submit.POLL_SECONDS = 0.1; sys.exit(submit.main(sys.argv[1:]))"
    slow = ("--experiment-name", EXPERIMENT, "model=sklearn_hgb", "model.max_iter=100000")
    env = environment(**there.workspace.env())
    command = [f"{programs()}/python", "-c", program, "run", "train", *slow]
    process = subprocess.Popen(command, cwd=there.root, env=env, stdout=subprocess.PIPE, text=True)
    there.workspace.once_running = process.terminate
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and "its job with it" in output, output
    assert there.runs()[0].info.status == "KILLED"
    assert there.workspace.jobs[max(there.workspace.jobs)].state["result_state"] == "CANCELED"
