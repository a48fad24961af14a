"""The main job through the real `mlflow run`, on the embedded store: runs, hand-off, reuse, failures."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import Project, copy_project, environment, tracking

from alacarte.errors import UserError
from alacarte.tracking import model_uri_of

SMALL = ("model=sklearn_sgd", "data.stop=600")


@pytest.fixture(scope="module")
def first(project: Project) -> str:
    parameters = [word for pair in SMALL for word in ("-P", pair)]
    return project.run("mlflow", "run", ".", "--env-manager", "local", *parameters).stdout


def newest(project: Project, step: str):
    return project.runs(f"tags.step = '{step}'")[0]


def test_two_runs_and_a_champion(project: Project, first: str):
    lines = first.strip().splitlines()
    assert "PROMOTE" in lines[-3]
    assert "alacarte version 1" in lines[-2]
    assert "mlflow ui" in lines[-1]
    champion = project.client.get_model_version_by_alias("alacarte", "champion")
    assert str(champion.version) == "1" and champion.tags["gate.verdict"] == "PROMOTE"
    assert project.client.get_model_version_by_alias("alacarte", "challenger").version == champion.version

    parent, train, evaluate = (newest(project, step) for step in ("main", "train", "evaluate"))
    assert {run.info.status for run in (parent, train, evaluate)} == {"FINISHED"}
    assert train.data.tags["mlflow.parentRunId"] == evaluate.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert evaluate.data.tags["source_run_id"] == train.info.run_id == parent.data.tags["train_run_id"]
    assert evaluate.data.metrics["test_accuracy"] > 0.9
    assert {"confusion_matrix.png", "gate.json", "config.yaml"} <= {
        file.path for file in project.client.list_artifacts(evaluate.info.run_id)
    }


def test_train_then_evaluate_agree_with_the_model_itself(project: Project, first: str):
    """The test metric is what the registered model gives on the recorded rows."""
    import mlflow

    from alacarte.data.dataset import load_data

    mlflow.set_tracking_uri(project.uri)
    model = mlflow.pyfunc.load_model("models:/alacarte@champion")
    X, y = load_data(**model.metadata.metadata["data"]).part("test")
    accuracy = (model.predict(X) == y.to_numpy()).mean()
    assert accuracy == pytest.approx(newest(project, "evaluate").data.metrics["test_accuracy"])


def test_configuration_is_whole_on_the_run(project: Project, first: str):
    import mlflow

    train = newest(project, "train")
    text = mlflow.artifacts.load_text(f"{train.info.artifact_uri}/config.yaml")
    cfg = yaml.safe_load(text)
    assert train.data.params["data.split.test"] == str(cfg["data"]["split"]["test"])
    assert train.data.params["save_to"] == "null"
    assert train.inputs.dataset_inputs[0].dataset.digest == train.data.tags["dataset_digest"]


def test_a_second_run_reuses_both_steps(project: Project, first: str):
    before = len(project.runs())
    again = project.step("pipeline", *SMALL).stdout
    assert "train: reused run" in again and "evaluate: reused run" in again
    assert len(project.runs()) == before + 1
    # An uncommitted edit of the source is another step, if the step imports it.
    elsewhere, source = project.root / "alacarte" / "serving" / "app.py", project.root / "project" / "data.py"
    texts = {path: path.read_text() for path in (elsewhere, source)}
    try:
        elsewhere.write_text(texts[elsewhere] + "\n# edited\n")
        again = project.step("pipeline", *SMALL, "gate.margin=0.03").stdout
        assert "train: reused run" in again and "evaluate: reused run" not in again
        source.write_text(texts[source] + "\n# edited\n")
        assert "reused" not in project.step("pipeline", *SMALL, "registered_model_name=other").stdout
    finally:
        for path, text in texts.items():
            path.write_text(text)


def test_every_form_of_arguments_gives_the_same_configuration(project: Project):
    """Each form once through the real command; the parser's own test has the details."""
    run = ("mlflow", "run", ".", "-e", "train", "--env-manager", "local", "--experiment-name", "mine")
    project.run(
        *run, *("-P", "model=sklearn_sgd", "-P", "data.stop=300", "-P", "model.lr=1e-1", "-P", "experiment_name=other")
    )
    project.run(*run, "-P", "overrides=model=sklearn_sgd data.stop=300 --model.lr 0.10 experiment_name=other")
    mine = project.client.get_experiment_by_name("mine")
    assert project.client.get_experiment_by_name("other") is None, "the experiment of the command line stays"
    project.step("train", "--model", "sklearn_sgd", "--data.stop=300", "model.lr=0.1", "experiment_name=other")
    other = project.client.get_experiment_by_name("other")
    runs = project.client.search_runs([mine.experiment_id, other.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert len({run.data.tags["config_hash"] for run in runs}) == 1


def test_free_text_survives_mlflow_run(project: Project):
    """Through the shell that `mlflow run` uses; a wrong step keeps it short."""
    text = "a  b=c, 'd' \"e\" {f} #g @h 50% $i `j` \\k ${seed} é\n!"
    command = ("mlflow", "run", ".", "-e", "evaluate", "--env-manager", "local", "-P", f"description={text}")
    assert "give exactly one" in project.run(*command, code=1).stderr
    run = newest(project, "evaluate")
    assert run.info.status == "FAILED"
    assert run.data.tags["mlflow.note.content"] == text


def test_a_mistake_is_one_line_and_a_failed_run(project: Project):
    run = project.client.create_run("0")
    ended = project.step("train", "modle.lr=1", code=2, MLFLOW_RUN_ID=run.info.run_id)
    assert "did you mean model.lr" in ended.stderr.strip().splitlines()[-1] and "Traceback" not in ended.stderr
    assert project.client.get_run(run.info.run_id).info.status == "FAILED"


def test_a_wrong_run_id_is_one_line(project: Project, first: str):
    failed = project.client.create_run("0", tags={"step": "train"}).info.run_id
    project.client.set_terminated(failed, "FAILED")
    main = newest(project, "main").info.run_id
    with tracking(project.uri):
        for run_id, line in (("0" * 32, "does not exist"), (main, "is a run of main"), (failed, "is FAILED")):
            with pytest.raises(UserError, match=line):
                model_uri_of(run_id, None)
        with pytest.raises(UserError, match="give exactly one"):
            model_uri_of(failed, "models:/m/1")


def test_sigterm_ends_every_run_as_killed(project: Project):
    command = ["python", "-m", "steps.pipeline", "reuse=false", "model=sklearn_hgb", "model.max_iter=5000"]
    process = subprocess.Popen(command, cwd=project.root, env=environment(MLFLOW_TRACKING_URI=project.uri))
    started = time.monotonic()
    try:
        while time.monotonic() - started < 120:
            running = project.runs("attributes.status = 'RUNNING' and tags.step = 'train'")
            if running and running[0].inputs.dataset_inputs:
                break
            time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert newest(project, "main").info.status == "KILLED"
    assert newest(project, "train").info.status == "KILLED"


def test_a_step_that_dies_leaves_every_record_right(project: Project):
    source = project.root / "steps" / "train.py"
    text = source.read_text()
    source.write_text(
        text.replace("    learner = launch", "    import os\n\n    os.kill(os.getpid(), 9)\n    learner = launch")
    )
    try:
        project.step("pipeline", "reuse=false", code=137)
    finally:
        source.write_text(text)
    assert newest(project, "main").info.status == "FAILED"
    assert newest(project, "train").info.status == "FAILED"
    assert not project.runs("attributes.status = 'RUNNING'")


def test_multirun_is_one_parent_with_a_child_a_job(project: Project):
    project.step("train", "--multirun", *SMALL, "seed=11,12", "description=a, b")
    sweep = newest(project, "train-sweep")
    jobs = project.runs(f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'")
    assert {job.data.params["seed"] for job in jobs} == {"11", "12"}
    assert {job.info.status for job in (sweep, *jobs)} == {"FINISHED"}


def test_hydra_flags_work_without_a_run(project: Project):
    before = len(project.runs())
    cfg = yaml.safe_load(project.step("train", "--cfg", "job", "model.lr=0.5").stdout)
    assert cfg["model"]["lr"] == 0.5
    assert len(project.runs()) == before


def test_a_step_without_torch_imports_no_torch(project: Project):
    code = """
import runpy, sys
sys.argv[1:] = ["model=sklearn_sgd", "data.stop=300"]
try:
    runpy.run_module("steps.train", run_name="__main__")
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules

# The modules that it did import are in its fingerprint.
from alacarte.source import modules_of
known = modules_of(["steps.train", "project.data.load_digits", "alacarte.learners.sklearn.SklearnLearner"])
used = {name for name in sys.modules if name.split(".")[0] in ("alacarte", "project", "steps")}
assert "project.data" in used and used <= {*known, "alacarte.source"}, used - set(known)
"""
    project.run("python", "-c", code)


def test_gate_json_and_the_tags_agree(project: Project, first: str):
    import mlflow

    run = project.runs("tags.step = 'evaluate' and attributes.status = 'FINISHED'")[0]
    report = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/gate.json"))
    assert report["verdict"] == run.data.tags["gate.verdict"]
    assert report["reason"] == run.data.tags["gate.reason"]


@pytest.mark.nightly
def test_a_loader_of_a_file_may_say_where_its_rows_are_from(tmp_path: Path):
    root = copy_project(tmp_path / "project")
    own = Project(root, f"sqlite:///{root}/mlflow.db")
    with (root / "project" / "data.py").open("a") as file:
        file.write(
            "\n\ndef load_table(path):\n"
            "    frame = load_digits(stop=300)\n"
            "    assert open(path).read() == 'rows'\n"
            "    frame.attrs['source'] = 'our warehouse'\n"
            "    return frame\n"
        )
    (root / "rows").write_text("rows")
    digits = (root / "conf" / "data" / "digits.yaml").read_text().split("\n")
    kept = [line for line in digits if not line.startswith(("_target_", "rotate", "start", "stop"))]
    (root / "conf" / "data" / "own.yaml").write_text(
        "\n".join([*kept, "_target_: project.data.load_table", "path: rows", ""])
    )
    trained = own.step("train", "data=own", "model=sklearn_sgd").stdout.splitlines()[-1]
    assert "evaluate: PROMOTE" in own.step("evaluate", trained).stdout
