"""`retrain` as a user calls it: from a champion and a feedback store to the next champion, whatever comes between."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Project, tracking
from learning import learner
from mlflow import MlflowClient
from people import SPLIT, people, refusal
from reports import report

from alacarte import registry
from alacarte.data.dataset import DataReader, Dataset
from alacarte.evaluation.audit import for_gate
from alacarte.feedback import Store
from alacarte.feedback.locks import Lock, lock
from alacarte.registry import Located
from alacarte.retraining.champion import Champion, load_champion
from alacarte.retraining.recovery import recover
from benchmarks import retrain
from benchmarks.retrain_cases import make_case
from benchmarks.retrain_gate import print_simulation
from project.data import load_digits

DIGITS = list(range(10))
LOOSE = ("retrain.max_share_per_annotator=10", "retrain.max_range_factor=1000", "explain=false")


class Case:
    """One registered model with its champion and its store."""

    def __init__(self, project: Project, name: str, folder: Path) -> None:
        self.project, self.name, self.url = project, name, f"sqlite:///{folder}/feedback.db"
        self.names = (f"registered_model_name={name}", f"feedback.url={self.url}")
        mlflow.set_tracking_uri(project.uri)
        self.client, self.store = MlflowClient(project.uri), Store(self.url)
        run = project.runs("tags.step = 'train'")[-1]
        self.source = f"models:/{run.outputs.model_outputs[0].model_id}"
        self.client.create_registered_model(name)
        self.client.set_registered_model_alias(name, "champion", self.register())
        self.model = mlflow.sklearn.load_model(self.source)

    def register(self) -> str:
        return str(self.client.create_model_version(self.name, self.source).version)

    def report(self, n: int, seed: int, audit: float = 0.5, wrong: bool = False, **more: object) -> None:
        """n requests of digits turned by 25 degrees; mistakes are reported, a share is labelled at random."""
        rows = load_digits(rotate=25).sample(n, random_state=seed)
        X, y, draw = rows.drop(columns="digit"), rows["digit"].to_numpy(), np.random.default_rng(seed)
        predicted = self.model.predict(X)
        labels = (y + 1) % 10 if wrong else y
        more = {"audit": draw.random(n) < audit, "mistakes": predicted != y, "classes": DIGITS} | more
        report(self.store, self.name, X, labels, predicted, **more)

    def run(self, *arguments: str, kill: tuple[str, str] | None = None, code: int | None = 0, **env: str):
        more = (*LOOSE, *self.names, *arguments)
        if kill is None:
            return self.project.step("retrain", *more, code=code, **env)
        env["PYTHONPATH"] = str(ROOT / "tests" / "library")
        return self.project.run("python", "-m", "interrupted", *kill, "retrain", *more, code=code, **env)

    def champion(self) -> str:
        return str(self.client.get_model_version_by_alias(self.name, "champion").version)

    def states(self) -> dict[str, int]:
        labelled = self.store.labelled(self.name, "accepted", "used")
        states = labelled.about["state"].mask(for_gate(labelled), "gate")
        return states.value_counts().to_dict()

    def runs(self, step: str) -> list:
        return self.project.runs(f"tags.step = '{step}' and tags.registered_model_name = '{self.name}'")


@pytest.fixture
def case(trained: Project, tmp_path: Path, request: pytest.FixtureRequest) -> Case:
    return Case(trained, request.node.name.removeprefix("test_").partition("[")[0], tmp_path)


def test_from_labels_to_the_next_champion(case: Case):
    case.report(400, seed=1)
    before = case.states()
    result = case.run("reason=because")
    assert case.champion() == "2" and "PROMOTE" in result.stdout
    (run,) = case.runs("retrain")
    assert result.stdout.splitlines()[-1] == f"run_id={run.info.run_id}"
    assert result.stdout.count("SERVE_FEEDBACK_TOKEN=") == 1  # all labels come from this user: one party
    assert run.info.status == "FINISHED" and run.data.tags["reason"] == "because"
    assert case.states() == {"used": before["accepted"], "gate": before["gate"]}

    # Version -> run -> parent version -> the exact labels.
    version = case.client.get_model_version(case.name, "2")
    assert version.tags["retrain_run_id"] == run.info.run_id and version.tags["parent_version"] == "1"
    used = case.store.labelled(case.name, "used").about
    assert set(used["used_run_id"]) == {run.info.run_id} and set(used["used_version"]) == {"2"}
    feedback = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/feedback.json"))
    assert feedback["new"] == sorted(used["feedback_id"])
    metrics = run.data.metrics
    assert metrics["new_labels"] == before["accepted"] and metrics["samples_seen"] % metrics["epochs"] == 0

    n_runs = len(case.project.runs())
    output = case.project.step("promote", "history=true", f"registered_model_name={case.name}").stdout
    title, head, *rows, _ = output.splitlines()
    assert title == case.name and head.split()[:5] == ["version", "now", "from", "labels", "run_id"]
    last, before_last = (row.split() for row in rows)
    assert len(case.project.runs()) == n_runs, "reading the history opens no run"
    assert last[:5] == ["2", last[1], "1", str(len(used)), run.info.run_id] and "champion" in last[1]
    assert before_last[0] == "1" and before_last[2] == "scratch"

    # The gate judged by the other half of the audit rows.
    (evaluated,) = case.runs("evaluate")
    gate = json.loads(mlflow.artifacts.load_text(f"{evaluated.info.artifact_uri}/gate.json"))
    assert gate["audit"]["n"] == before["gate"] and not set(gate["audit"]["feedback_ids"]) & set(feedback["new"])
    assert evaluated.data.metrics["audit_accuracy"] > evaluated.data.metrics["audit_champion_accuracy"]
    assert evaluated.data.tags["mlflow.parentRunId"] == run.info.run_id

    # Nothing new: no run, exit code 0. Another round starts from version 2 and replays the labels of the first.
    assert "nothing to do" in case.run().stdout and len(case.runs("retrain")) == 1
    case.report(200, seed=2)
    assert "from version 2" in case.run().stdout
    again = json.loads(mlflow.artifacts.load_text(f"{case.runs('retrain')[0].info.artifact_uri}/feedback.json"))
    assert not set(feedback["new"]) & set(again["new"])
    # All but those whose digit came once more, as a row that judges.
    assert 0 <= len(set(feedback["new"]) - set(again["replayed"])) < 0.1 * len(feedback["new"])


def test_a_version_that_no_retraining_made_is_not_resumed(case: Case):
    """Anybody who may write to the registry can set the tag of a version and the alias."""
    champion = case.client.get_model_version_by_alias(case.name, "champion")
    tags = {registry.RUN_TAG: champion.run_id}
    version = case.client.create_model_version(case.name, champion.source, tags=tags).version
    case.client.set_registered_model_alias(case.name, registry.CHALLENGER, version)
    with lock(case.store, case.name) as model_lock:
        assert recover(model_lock, case.name) is None


def test_a_dry_run_as_an_entry_point_leaves_registry_and_labels_alone(case: Case):
    case.report(200, seed=1)
    before = case.states()
    parameters = [word for argument in (*LOOSE, *case.names, "gate.dry_run=true") for word in ("-P", argument)]
    result = case.project.run("mlflow", "run", ".", "-e", "retrain", "--env-manager", "local", *parameters)
    assert "PROMOTE" in result.stdout and case.champion() == "1" and case.states() == before
    assert len(case.client.search_model_versions(f"name = '{case.name}'")) == 1
    assert not case.project.runs("attributes.status = 'RUNNING'")


def test_a_champion_that_moved_meanwhile_stays(case: Case):
    case.report(200, seed=1)
    before, other = case.states(), case.register()
    place = "alacarte.learners.sklearn:SklearnLearner.update"
    result = case.run(kill=(place, "move"), code=2, MOVE_TO=f"{case.name}/{other}")
    assert f"moved from 1 to {other}" in result.stderr and len(result.stderr.strip().splitlines()[-1]) < 200
    assert case.champion() == other and case.states() == before
    assert len(case.client.search_model_versions(f"name = '{case.name}'")) == 2
    assert {run.info.status for run in case.runs("retrain")} == {"FAILED"}
    assert f"from version {other}" in case.run().stdout
    assert "accepted" not in case.states()


POINTS = [
    ("alacarte.tracking:log_config", "after"),  # a run is open and has claimed nothing
    ("alacarte.feedback.locks:claim", "after"),
    ("mlflow:register_model", "before"),  # a model is logged
    ("mlflow:register_model", "after"),  # a version without an alias, of labels that are not marked
    ("alacarte.registry:register", "after"),
    ("alacarte.feedback.locks:use", "after"),
    ("alacarte.evaluation.report:verdict_tags", "before"),  # from here on it is evaluate that dies
    ("mlflow:MlflowClient.set_registered_model_alias", "alias=previous_champion"),
]


def test_killed_anywhere_and_started_again(case: Case):
    """Each call meets what the one killed before it left, and the last one is let through."""
    for i, point in enumerate(POINTS):
        case.report(60, seed=10 + i)
        result = case.run(kill=point, code=None)
        assert result.returncode in (-9, 137), (point, result.returncode, result.stdout, result.stderr)
    case.run()  # finishes what waited
    case.run()  # takes what came since
    assert "nothing to do" in case.run().stdout
    assert not [run for run in case.project.runs("attributes.status = 'RUNNING'")]
    used = case.store.labelled(case.name, "used").about
    versions = case.client.search_model_versions(f"name = '{case.name}'")
    seen: set[int] = set()
    for version in versions:
        if run_id := version.tags.get("retrain_run_id"):
            run = case.client.get_run(run_id)
            assert run.info.status == "FINISHED"
            new = set(json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/feedback.json"))["new"])
            assert new and not new & seen, "a label went into two versions"
            assert new == set(used["feedback_id"][used["used_version"] == str(version.version)])
            seen |= new
    assert seen == set(used["feedback_id"])
    last = case.client.get_model_version_by_alias(case.name, "challenger")
    assert last.tags["gate.verdict"] and len(versions) >= 3


def test_labels_of_a_new_class(trained: Project, tmp_path: Path):
    rows = load_digits().loc[lambda frame: frame["digit"] != 9]
    rows.to_csv(trained.root / "nine.csv", index=False)
    data = ("data=table", "data.path=nine.csv", "data.target=digit", "registered_model_name=nine")
    trained.step("pipeline", "model=sklearn_sgd", "explain=false", *data)
    store = Store(f"sqlite:///{tmp_path}/f.db")
    names = (*LOOSE, "registered_model_name=nine", f"feedback.url=sqlite:///{tmp_path}/f.db")
    whole = load_digits(rotate=5)
    X, y = whole.drop(columns="digit"), whole["digit"].to_numpy()
    some = np.random.default_rng(0).random(len(X)) < 0.3
    report(store, "nine", X, y, (y + 1) % 9, classes=DIGITS, audit=some)
    result = trained.step("retrain", *names, "retrain.new_classes=scratch")
    with tracking(trained.uri):
        assert 9 in mlflow.sklearn.load_model("models:/nine@challenger").classes_
        assert "PROMOTE" in result.stdout
        # The data are checked against what the champion was trained on.
        rows.iloc[:-1].to_csv(trained.root / "nine.csv", index=False)
        message = refusal(load_champion, "nine")
    assert "have changed" in message and "data=" in message


def test_a_model_records_the_data_of_its_ancestors(tmp_path: Path):
    people(600).to_csv(tmp_path / "people.csv", index=False)
    data = {"_target_": "alacarte.data.tables.read_table", "path": str(tmp_path / "people.csv"), "target": "y"}
    oldest, old, new = (DataReader()({**data, "split": SPLIT | {"seed": seed}}) for seed in (2, 1, 0))
    metadata = {"data": data, **old.metadata, "ancestors_data": [{"data": data, **oldest.metadata}]}

    def ancestors(dataset: Dataset, init: str = "warm") -> list[str]:
        champion = Champion("m", "1", Located("", tmp_path, None, None, metadata), None, data, dataset)  # type: ignore[arg-type]
        return [record["dataset_digest"] for record in champion.lineage_metadata("run", init)["ancestors_data"]]

    assert ancestors(new) == [old.digest, oldest.digest] and ancestors(old) == [oldest.digest]
    assert ancestors(new, "scratch") == []
    # the rows of `old` stay train and val rows
    pd.concat([people(600), people(100, seed=1)]).to_csv(data["path"], index=False)
    assert ancestors(DataReader()({**data, "split": SPLIT | {"seed": 1}})) == [oldest.digest]


def test_models_of_other_trainings_need_data(case: Case):
    from sklearn.linear_model import SGDClassifier

    rows = load_digits()
    X, y = rows.drop(columns="digit"), rows["digit"]
    model = SGDClassifier(loss="log_loss", random_state=0).fit(X, y)
    with mlflow.start_run():
        info = mlflow.sklearn.log_model(
            model, name="m", registered_model_name=case.name, input_example=X[:2], pip_requirements=[]
        )
    case.client.set_registered_model_alias(case.name, "champion", info.registered_model_version)
    report(case.store, case.name, X + 1, y, (y + 1) % 10, classes=DIGITS, audit=np.arange(len(X)) % 5 == 0)
    assert "-P data=" in refusal(load_champion, case.name)
    result = case.run("data=digits")
    assert "retrain: from version 2" in result.stdout and "evaluate:" in result.stdout


def test_mistakes_of_the_user_are_one_line(case: Case):
    for argument, words in (
        ("registered_model_name=nobody", "registered_model_name=nobody has no champion"),
        ("retrain.init=hot", "retrain.init=hot: allowed are warm, shrink_perturb, scratch"),
        ("feedback.url=null", "feedback.url=None"),
    ):
        (line,) = case.run(argument, code=2).stderr.strip().splitlines()
        assert words in line and "Traceback" not in line
    assert f"did you mean '{case.name}'" in refusal(registry.require_champion, case.name[:-1])
    case.report(60, seed=1)
    with lock(case.store, case.name) as model_lock:  # one retraining at a time
        assert isinstance(model_lock, Lock)
        result = case.run()
        assert "nothing to do" in result.stdout and "retrains" in result.stdout and not case.runs("retrain")


def test_the_benchmark_of_retraining_runs(capsys):
    case, how = make_case("table", 1), retrain.settings()
    champion = retrain.first_model("sklearn_sgd", case, 1)
    results = retrain.once(champion, case, how, 1)
    assert results["feedback only"].verdict == "REJECT" and results["warm"].verdict in retrain.VERDICTS
    assert retrain.with_epochs(learner("torch_mlp"), 2).settings["max_epochs"] == 2
    print_simulation(how["gate"], 2)
    assert "| equal | " in capsys.readouterr().out
