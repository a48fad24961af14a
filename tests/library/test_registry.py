"""Gate, aliases and rollback on a real `mlflow server` over HTTP."""

import json
import threading
from pathlib import Path

import mlflow
import pytest
from conftest import Project, copy_project, tracking

from alacarte import registry
from alacarte.errors import UserError

NAME = "served"
FAST = ("model=sklearn_sgd", f"registered_model_name={NAME}")


@pytest.fixture(scope="module")
def remote(server: str, tmp_path_factory: pytest.TempPathFactory) -> Project:
    mlflow.set_tracking_uri(server)
    return Project(copy_project(tmp_path_factory.mktemp("remote")), server)


@pytest.fixture(scope="module")
def champion(remote: Project) -> str:
    """A weak champion, which is version 1."""
    remote.run(
        "mlflow", "run", ".", "--env-manager", "local", *("-P", "model.max_iter=2"), *(f"-P{key}" for key in FAST)
    )
    return aliases(remote)["champion"]


def aliases(project: Project, name: str = NAME) -> dict[str, str]:
    return {alias: str(number) for alias, number in project.client.get_registered_model(name).aliases.items()}


def report(project: Project, run) -> dict:
    return json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/gate.json"))


def test_promotion_by_proof_then_rollback_and_back(remote: Project, champion: str):
    assert champion == "1"
    remote.step("pipeline", "model=sklearn_forest", f"registered_model_name={NAME}")
    assert aliases(remote) == {"champion": "2", "challenger": "2", "previous_champion": "1"}
    evaluated = remote.runs("tags.step = 'evaluate'")[0]
    verdict = report(remote, evaluated)
    assert verdict["verdict"] == "PROMOTE" and verdict["comparison"]["low"] > 0
    assert verdict["versions"] == {"challenger": "2", "champion": "1"}
    version = remote.client.get_model_version(NAME, "2")
    assert version.tags["gate.verdict"] == "PROMOTE" and version.tags["gate.reason"] == verdict["reason"]
    assert version.run_id == evaluated.data.tags["source_run_id"]

    back = ("-P", "version=previous", "-P", f"registered_model_name={NAME}")
    remote.run("mlflow", "run", ".", "-e", "promote", "--env-manager", "local", *back)
    assert aliases(remote)["champion"] == "1" and aliases(remote)["previous_champion"] == "2"
    # What was rolled back is known to the pipeline: the verdict no longer holds, so it decides anew.
    again = remote.step("pipeline", "model=sklearn_forest", f"registered_model_name={NAME}").stdout
    assert "train: reused" in again and "the champion has changed since" in again
    assert aliases(remote)["champion"] == "2"


def test_hold_and_reject_move_nothing(remote: Project, champion: str):
    remote.step("pipeline", "model=sklearn_forest", f"registered_model_name={NAME}", "gate.rule=point")
    before = aliases(remote)["champion"]
    remote.step("pipeline", *FAST, "model.max_iter=2", "seed=5")
    run = remote.runs("tags.step = 'evaluate'")[0]
    assert run.data.tags["gate.verdict"] == "REJECT"
    assert aliases(remote)["champion"] == before
    number = run.data.tags["model_version"]
    assert aliases(remote)["challenger"] == number
    refused = remote.step("promote", f"version={number}", f"registered_model_name={NAME}", code=2)
    assert "gate verdict REJECT" in refused.stderr and "force=true" in refused.stderr


def test_a_model_is_not_compared_with_itself(remote: Project, champion: str):
    before, versions = aliases(remote), len(remote.client.search_model_versions(f"name = '{NAME}'"))
    verdict = remote.client.get_model_version_by_alias(NAME, "champion").tags["gate.verdict"]
    done = remote.step("evaluate", f"model_uri=models:/{NAME}@champion", f"registered_model_name={NAME}")
    assert "HOLD" in done.stdout and "this model is the champion" in done.stdout
    assert aliases(remote) == before
    assert len(remote.client.search_model_versions(f"name = '{NAME}'")) == versions
    assert remote.client.get_model_version_by_alias(NAME, "champion").tags["gate.verdict"] == verdict


def test_floors_reject_and_dry_run_moves_nothing(remote: Project, champion: str):
    before, versions = aliases(remote), len(remote.client.search_model_versions(f"name = '{NAME}'"))
    done = remote.step("pipeline", *FAST, "gate.floors.accuracy=0.999", "gate.dry_run=true", "seed=8")
    assert "REJECT" in done.stdout and "0.999" in done.stdout
    assert aliases(remote) == before
    assert len(remote.client.search_model_versions(f"name = '{NAME}'")) == versions


def test_without_registry(remote: Project):
    done = remote.step("pipeline", "model=sklearn_sgd", "registered_model_name=null")
    assert "not registered" in done.stdout
    assert not remote.client.search_registered_models("name = 'alacarte'")


def test_every_kind_of_uri_scores_alike(remote: Project, champion: str):
    remote.step("train", *FAST, "seed=21", "save_to=saved")
    run = remote.runs("tags.step = 'train'")[0]
    uris = ["saved", f"runs:/{run.info.run_id}/model", f"models:/{run.outputs.model_outputs[0].model_id}"]
    scores = set()
    for uri in uris:
        remote.step("evaluate", f"model_uri={uri}", "registered_model_name=null")
        scores.add(remote.runs("tags.step = 'evaluate'")[0].data.metrics["test_log_loss"])
    assert len(scores) == 1
    assert "no model that can be read" in remote.step("evaluate", "model_uri=models:/none@champion", code=2).stderr


def test_a_local_folder_is_logged_before_it_is_registered(remote: Project):
    remote.step("train", "model=sklearn_sgd", "seed=22", "save_to=folder")
    remote.step("evaluate", "model_uri=folder", "registered_model_name=from_folder")
    version = remote.client.get_model_version_by_alias("from_folder", "champion")
    assert version.source.startswith("models:/m-")


def test_promotion_refuses_when_the_champion_moved_meanwhile(remote: Project, champion: str):
    name = "moving"
    for _ in range(3):
        remote.step("pipeline", "model=sklearn_sgd", f"registered_model_name={name}", "reuse=false")
    versions = [registry.by_number(name, number) for number in "123"]
    assert aliases(remote, name)["champion"] == "1"
    registry.promote(versions[1], expected="1", reason="first")
    with pytest.raises(UserError, match="moved from 1 to 2"):
        registry.promote(versions[2], expected="1", reason="late")
    assert aliases(remote, name) == {"champion": "2", "previous_champion": "1", "challenger": "3"}


def test_a_rollback_keeps_what_the_first_promotion_said(tmp_path: Path):
    with tracking(f"sqlite:///{tmp_path}/mlflow.db"):
        client = mlflow.MlflowClient()
        client.create_registered_model("kept")
        versions = [client.create_model_version("kept", str(tmp_path)) for _ in range(2)]
        for number, expected, reason in ((0, "none", "first"), (1, "1", "second"), (0, "2", "back"), (1, "1", "again")):
            registry.promote(versions[number], expected=expected, reason=reason)
        tags = [client.get_model_version("kept", str(number)).tags for number in (1, 2)]
        assert [tags[0][key] for key in ("promotion_reason", "promoted_from")] == ["first", "none"]
        assert [tags[0][f"{key}.2"] for key in ("promotion_reason", "promoted_from")] == ["back", "2"]
        assert (tags[1]["promotion_reason"], tags[1]["promotion_reason.2"]) == ("second", "again")


def test_of_many_promotions_at_once_one_wins(remote: Project, champion: str):
    name = "moving"
    versions = [registry.by_number(name, number) for number in ("1", "3")]
    registry.promote(
        registry.by_number(name, "2"), expected=registry.number_of(registry.champion_of(name)), reason="start"
    )
    outcomes: list[str] = []

    def promote(version) -> None:
        try:
            registry.promote(version, expected="2", reason="race")
            outcomes.append("moved")
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=promote, args=(version,)) for version in versions for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("moved") == 1
    assert aliases(remote, name)["previous_champion"] == "2"


def test_wrong_versions_and_names_are_clear(remote: Project, champion: str):
    assert (
        "give 1, 2, 3, challenger or previous"
        in remote.step("promote", "version=99", "registered_model_name=moving", code=2).stderr
    )
    assert "has no version" in remote.step("promote", "version=1", "registered_model_name=nobody", code=2).stderr
    assert "version is required" in remote.step("promote", *FAST[1:], code=2).stderr


def test_names_that_no_registry_takes_are_refused_before_training():
    registry.check_name("catalog.schema.model")
    for name in ("a/b", "a:b", "it's", 5, True, ["a"], " a"):
        with pytest.raises(UserError, match="registered_model_name="):
            registry.check_name(name)


def test_the_last_line_hands_on_the_run_id_on_a_server_too(remote: Project):
    last = remote.step("train", *FAST).stdout.splitlines()[-1]
    assert last.startswith("run_id=")
    remote.step("evaluate", last, "gate.dry_run=true", *FAST[1:])
    for step in ("train", "promote"):  # one that opens a run at once, and one that reads the registry first
        gone = remote.step(step, FAST[1], code=2, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
        assert "MLFLOW_TRACKING_URI" in gone.stderr and len(gone.stderr.strip().splitlines()) == 1
