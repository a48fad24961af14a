"""The main job through the real `mlflow run`, on the embedded store: runs, hand-off, reuse, failures."""

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import Project, environment, tracking
from people import people, refusal

from alacarte.data.dataset import load_data
from alacarte.tracking import model_uri_of

SMALL = ("model=sklearn_sgd", "data.stop=600")
LOCAL = ("--env-manager", "local")


@pytest.fixture(scope="module")
def first(project: Project) -> str:
    parameters = [word for pair in SMALL for word in ("-P", pair)]
    return project.run("mlflow", "run", ".", *LOCAL, *parameters).stdout


def test_two_runs_and_a_champion(project: Project, first: str):
    lines = first.strip().splitlines()
    rows = {line.split()[1]: line for line in lines if line.startswith("main: ")}
    assert "alacarte version 1" in rows["model"] and "accuracy" in rows["metrics"] and "PROMOTE" in rows["verdict"]
    assert "mlflow ui" in rows["open"] and "steps.serve registered_model_name=alacarte" in rows["next"]
    champion = project.client.get_model_version_by_alias("alacarte", "champion")
    assert str(champion.version) == "1" and champion.tags["gate.verdict"] == "PROMOTE"
    assert project.client.get_model_version_by_alias("alacarte", "challenger").version == champion.version

    parent, train, evaluate = (project.newest(step) for step in ("main", "train", "evaluate"))
    assert {run.info.status for run in (parent, train, evaluate)} == {"FINISHED"}
    assert train.data.tags["mlflow.parentRunId"] == evaluate.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert evaluate.data.tags["source_run_id"] == train.info.run_id == parent.data.tags["train_run_id"]
    files = {file.path for file in project.client.list_artifacts(evaluate.info.run_id)}
    assert {"confusion_matrix.png", "gate.json", "config.yaml"} <= files
    # The whole configuration is on the run, and the test metric is the one of the registered model on the recorded rows.
    cfg = yaml.safe_load(mlflow.artifacts.load_text(f"{train.info.artifact_uri}/config.yaml"))
    assert train.data.params["data.split.test"] == str(cfg["data"]["split"]["test"])
    assert train.data.params["save_to"] == "null"
    assert train.inputs.dataset_inputs[0].dataset.digest == train.data.tags["dataset_digest"]
    with tracking(project.uri):
        model = mlflow.pyfunc.load_model("models:/alacarte@champion")
    X, y = load_data(**model.metadata.metadata["data"]).part("test")
    assert (model.predict(X) == y.to_numpy()).mean() == pytest.approx(evaluate.data.metrics["test_accuracy"])


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


def test_the_forms_of_arguments_give_one_configuration(project: Project):
    """Two forms through the real command; test_launch.py has all forms and texts."""
    text = "a  b=c, 'd' \"e\" {f} #g @h 50% $i `j` \\k ${seed} é\n!"
    keys = ("model=sklearn_sgd", "data.stop=300", "model.lr=1e-1", "experiment_name=other", f"description={text}")
    parameters = [word for key in keys for word in ("-P", key)]
    project.run("mlflow", "run", ".", "-e", "train", *LOCAL, "--experiment-name", "mine", *parameters)
    mine = project.client.get_experiment_by_name("mine")
    assert project.client.get_experiment_by_name("other") is None, "the experiment of the command line stays"
    project.step("train", "--model", "sklearn_sgd", "--data.stop=300", "model.lr=0.1", *keys[3:])
    other = project.client.get_experiment_by_name("other")
    runs = project.client.search_runs([mine.experiment_id, other.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    assert len({run.data.tags["config_hash"] for run in runs}) == 1
    assert {run.data.tags["mlflow.note.content"] for run in runs} == {text}


def test_the_advice_about_a_column_like_an_id_can_be_pasted(project: Project):
    people(300).assign(**{"customer id": [f"c{row}" for row in range(300)]}).to_csv(
        project.root / "people.csv", index=False
    )
    command = ("train", "data=table", "data.path=people.csv", "data.target=y", "model=sklearn_sgd")
    advice = re.search("leave it out with (.*)", project.step(*command).stdout)
    assert "another text" not in project.step(*command, *shlex.split(advice[1])).stdout


def test_a_mistake_is_one_line_and_a_failed_run(project: Project):
    run = project.client.create_run("0")
    ended = project.step("train", "modle.lr=1", code=2, MLFLOW_RUN_ID=run.info.run_id)
    assert "did you mean 'model.lr'" in ended.stderr.strip().splitlines()[-1] and "Traceback" not in ended.stderr
    assert project.client.get_run(run.info.run_id).info.status == "FAILED"
    before = len(project.runs())
    cfg = yaml.safe_load(project.step("train", "--cfg", "job", "model.lr=0.5").stdout)
    assert cfg["model"]["lr"] == 0.5 and len(project.runs()) == before, "Hydra's flags open no run"


def test_a_wrong_run_id_is_one_line(project: Project, first: str):
    failed = project.client.create_run("0", tags={"step": "train"}).info.run_id
    project.client.set_terminated(failed, "FAILED")
    main = project.newest("main").info.run_id
    with tracking(project.uri):
        for run_id, line in (("0" * 32, "does not exist"), (main, "is a run of main"), (failed, "is FAILED")):
            assert line in refusal(model_uri_of, run_id, None)
        assert "give exactly one" in refusal(model_uri_of, failed, "models:/m/1")


def test_sigterm_ends_every_run_as_killed(project: Project):
    command = ["python", "-m", "steps.pipeline", "reuse=false", "model=sklearn_hgb", "model.max_iter=5000"]
    process = subprocess.Popen(command, cwd=project.root, env=environment(MLFLOW_TRACKING_URI=project.uri))
    end = time.monotonic() + 120
    try:
        while time.monotonic() < end:
            running = project.runs("attributes.status = 'RUNNING' and tags.step = 'train'")
            if running and running[0].inputs.dataset_inputs:
                break
            time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert project.newest("main").info.status == project.newest("train").info.status == "KILLED"


def test_a_step_that_dies_leaves_every_record_right(project: Project):
    source = project.root / "steps" / "train.py"
    text = source.read_text()
    kill = "    import os\n\n    os.kill(os.getpid(), 9)\n    learner = launch"
    source.write_text(text.replace("    learner = launch", kill))
    try:
        project.step("pipeline", "reuse=false", code=137)
    finally:
        source.write_text(text)
    assert project.newest("main").info.status == project.newest("train").info.status == "FAILED"
    assert not project.runs("attributes.status = 'RUNNING'")


def test_multirun_is_one_parent_with_a_child_a_job(project: Project):
    project.step("train", "--multirun", *SMALL, "seed=11,12", "description=a, b")
    sweep = project.newest("train-sweep")
    jobs = project.runs(f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'")
    assert {job.data.params["seed"] for job in jobs} == {"11", "12"}
    assert {job.info.status for job in (sweep, *jobs)} == {"FINISHED"}


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
    project.run(sys.executable, "-c", code)  # nothing is preloaded


@pytest.mark.nightly
def test_a_loader_of_a_file_may_say_where_its_rows_are_from(new_project: Callable[[Path], Project], tmp_path: Path):
    own = new_project(tmp_path / "project")
    with (own.root / "project" / "data.py").open("a") as file:
        file.write(
            "\n\ndef load_table(path):\n"
            "    frame = load_digits(stop=300)\n"
            "    assert open(path).read() == 'rows'\n"
            "    frame.attrs['source'] = 'our warehouse'\n"
            "    return frame\n"
        )
    (own.root / "rows").write_text("rows")
    digits = yaml.safe_load((own.root / "conf" / "data" / "digits.yaml").read_text())
    kept = {key: value for key, value in digits.items() if key not in ("rotate", "start", "stop")}
    loader = {**kept, "_target_": "project.data.load_table", "path": "rows"}
    (own.root / "conf" / "data" / "own.yaml").write_text(yaml.safe_dump(loader))
    trained = own.step("train", "data=own", "model=sklearn_sgd").stdout.splitlines()[-1]
    assert "evaluate: verdict   PROMOTE" in own.step("evaluate", trained).stdout
