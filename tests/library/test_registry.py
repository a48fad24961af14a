"""Gate, aliases and rollback on a real `mlflow server` over HTTP."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from conftest import Project, copy_project, tracking
from people import refusal
from registries import register

from alacarte import learners, locks, registry, verdicts
from alacarte.errors import UserError
from project.data import load_digits

NAME = "served"
SMALL = (f"registered_model_name={NAME}",)
SIGNING = {verdicts.KEY: "key"}
WEAK = (*SMALL, "model=sklearn_sgd", "model.max_iter=2", "gate.slices=null")


@pytest.fixture(scope="module")
def remote(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with tracking(server):
        yield Project(copy_project(tmp_path_factory.mktemp("remote")), server)


def is_signed(name: str, number: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*next(iter(SIGNING.items())))
        version = mlflow.MlflowClient().get_model_version(name, number)
        return registry.is_signed(version, registry.locate(f"models:/{name}/{number}").path)


def aliases(project: Project, name: str = NAME) -> dict[str, str]:
    return {alias: str(number) for alias, number in project.client.get_registered_model(name).aliases.items()}


def report(run) -> dict:
    return json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/gate.json"))


@pytest.fixture(scope="module")
def promoted(remote: Project) -> str:
    """A weak version 1, and a better version 2, which is the champion. The gate signs both."""
    remote.run("mlflow", "run", ".", "--env-manager", "local", *(f"-P{key}" for key in WEAK), **SIGNING)
    assert aliases(remote)["champion"] == "1"
    remote.step("pipeline", "model=sklearn_forest", "explain=true", *SMALL, **SIGNING)
    return aliases(remote)["champion"]


def test_promotion_by_proof_then_rollback_and_back(remote: Project, promoted: str):
    assert aliases(remote) == {"champion": "2", "challenger": "2", "previous_champion": "1"}
    evaluated = remote.newest("evaluate")
    verdict = report(evaluated)
    assert is_signed(NAME, "1") and is_signed(NAME, "2")
    assert verdict["verdict"] == "PROMOTE" and verdict["comparison"]["low"] > 0
    assert verdict["versions"] == {"challenger": "2", "champion": "1"}
    version = remote.client.get_model_version(NAME, "2")
    for tags in (version.tags, evaluated.data.tags):
        assert (tags["gate.verdict"], tags["gate.reason"]) == ("PROMOTE", verdict["reason"])
    assert version.run_id == evaluated.data.tags["source_run_id"]
    card = version.description
    assert verdict["reason"] in card and "| test_accuracy | 0.9" in card and "Predicts `digit`" in card
    assert evaluated.data.tags["mlflow.note.content"] == card
    files = {file.path for file in remote.client.list_artifacts(evaluated.info.run_id)}
    assert {"importance.png", "importance.json", "champion_vs_challenger.png", "roc_pr.png", "calibration.png"} <= files
    first = remote.client.get_model_version(NAME, "1").tags
    assert first["gate.reason"].startswith("no champion yet, and roc_auc 0.")

    remote.step("promote", "version=previous", SMALL[0])
    assert aliases(remote)["champion"] == "1" and aliases(remote)["previous_champion"] == "2"
    # The pipeline sees the rollback: the verdict no longer holds, so it decides again.
    again = remote.step("pipeline", "model=sklearn_forest", "explain=true", *SMALL).stdout
    assert "train: reused" in again and "the champion has changed since" in again
    assert aliases(remote)["champion"] == "2"


def test_a_metric_of_the_team_decides_and_a_reject_moves_nothing(remote: Project, promoted: str):
    own = ("metrics=cost", "gate.metric=cost", "+gate.ceilings.cost=5", "gate.slices=[pixel_2_2]")
    result = remote.step("pipeline", *WEAK, "seed=5", *own).stdout
    evaluated, trained = remote.newest("evaluate"), remote.newest("train")
    assert evaluated.data.tags["gate.verdict"] == "REJECT" and aliases(remote)["champion"] == promoted
    verdict, metrics = report(evaluated), evaluated.data.metrics
    assert verdict["comparison"]["metric"] == "cost" and verdict["comparison"]["gain"] < 0
    assert verdict["reason"].startswith("cost loss ") and "the champion stays; train with" in verdict["reason"]
    assert verdict["checks"][0]["metric"] == "cost" and metrics["test_cost"] > 1 - metrics["test_accuracy"] - 1e-9
    assert {"train_cost", "val_cost"} <= set(trained.data.metrics)
    slices = json.loads(mlflow.artifacts.load_text(f"{evaluated.info.artifact_uri}/slices.json"))
    assert "cost" in slices["columns"]
    assert "importance.json" not in {file.path for file in remote.client.list_artifacts(evaluated.info.run_id)}

    number = evaluated.data.tags["model_version"]
    assert aliases(remote)["challenger"] == number
    assert f"python -m steps.promote registered_model_name={NAME} version={number} force=true" in result
    again = next(line for line in result.splitlines() if line.startswith("evaluate: again"))
    assert f"run_id={trained.info.run_id}" in again
    assert f"model     {NAME} version {number}" in remote.run("bash", "-c", again.split(maxsplit=2)[2]).stdout
    refused = remote.step("promote", f"version={number}", SMALL[0], code=2)
    assert "gate verdict REJECT" in refused.stderr and "force=true" in refused.stderr


def test_a_function_that_does_not_exist_is_one_line_before_training(remote: Project):
    text = "cots: {function: project.metrics.cots, greater_is_better: false}\n"
    (remote.root / "conf" / "metrics" / "cots.yaml").write_text(text)
    error = remote.step("pipeline", *WEAK, "metrics=cots", code=2).stderr
    assert error.count("\n") == 1 and "metrics.cots.function=project.metrics.cots" in error


def test_what_moves_no_alias_and_registers_nothing(remote: Project, promoted: str):
    """The champion compared with itself, and a dry run below a floor."""
    before, versions = aliases(remote), len(remote.client.search_model_versions(f"name = '{NAME}'"))
    result = remote.step("evaluate", f"model_uri=models:/{NAME}@champion", SMALL[0]).stdout
    assert "HOLD" in result and "this model is the champion" in result
    assert remote.client.get_model_version_by_alias(NAME, "champion").tags["gate.verdict"] == "PROMOTE"
    result = remote.step("pipeline", *WEAK, "gate.floors.accuracy=0.999", "gate.dry_run=true", "seed=8").stdout
    assert "REJECT" in result and "0.999" in result and "not registered" in result
    assert aliases(remote) == before
    assert len(remote.client.search_model_versions(f"name = '{NAME}'")) == versions


def test_every_kind_of_address_is_the_same_model_and_a_folder_is_logged_before_it_is_registered(remote: Project):
    last = remote.step("train", *WEAK[:-1], "seed=21", "save_to=saved").stdout.splitlines()[-1]
    run = remote.newest("train")
    assert last == f"run_id={run.info.run_id}"
    uris = [
        str(remote.root / "saved"),
        f"runs:/{run.info.run_id}/model",
        f"models:/{run.outputs.model_outputs[0].model_id}",
    ]
    models = [registry.locate(uri) for uri in uris]
    assert all(model.is_same(models[0]) for model in models)
    X = load_digits(stop=50)
    assert len({tuple(learners.load(model.path).predict(X)) for model in models}) == 1
    assert "no model that can be read" in refusal(registry.locate, "models:/none@champion")
    remote.step("evaluate", "model_uri=saved", "registered_model_name=from_folder")
    version = remote.client.get_model_version_by_alias("from_folder", "champion")
    assert version.source.startswith("models:/m-")


def test_a_champion_whose_files_are_gone_does_not_block_its_successor(new_project: Callable, tmp_path: Path):
    own = new_project(tmp_path / "project")
    own.step("pipeline", *WEAK, **SIGNING)
    with tracking(own.uri):
        assert is_signed(NAME, "1")
    shutil.rmtree(own.root / "mlruns")
    result = own.step("pipeline", *WEAK, **SIGNING).stdout
    # Anybody may point the alias at a version without files: no model gets a signature in this way.
    assert "the verdict is not signed, because champion version 1 is not" in result
    assert own.client.get_model_version(NAME, "2").tags[verdicts.TAG] == verdicts.NOT_SIGNED
    assert "reused" not in result.split("train: the model of this run has been deleted since")[1]
    assert aliases(own)["champion"] == "2"
    reason = own.client.get_model_version(NAME, "2").tags["gate.reason"]
    assert reason.startswith("the champion, version 1, cannot be loaded (") and "better than chance" in reason


def test_a_store_that_does_not_answer_is_no_lost_champion():
    with tracking("http://127.0.0.1:9"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(registry.Unreachable, match="cannot be downloaded now, try again"):
            registry.locate(f"models:/{NAME}/1")


@pytest.fixture
def versions(remote: Project, request: pytest.FixtureRequest) -> list:
    """Three versions of a model of the test's own; the first one is the champion."""
    name = request.node.name
    remote.client.create_registered_model(name)
    made = [remote.client.create_model_version(name, "s3://nowhere/model") for _ in range(3)]
    registry.promote(made[0], expected="none", reason="first")
    return made


def test_a_rollback_keeps_what_the_first_promotion_said(remote: Project, versions: list):
    name = versions[0].name
    for index, expected, reason in ((1, "1", "second"), (0, "2", "back"), (1, "1", "again")):
        registry.promote(versions[index], expected=expected, reason=reason)
    tags = [remote.client.get_model_version(name, number).tags for number in ("1", "2")]
    assert [tags[0][key] for key in ("promotion_reason", "promoted_from")] == ["first", "none"]
    assert [tags[0][f"{key}.2"] for key in ("promotion_reason", "promoted_from")] == ["back", "2"]
    assert (tags[1]["promotion_reason"], tags[1]["promotion_reason.2"]) == ("second", "again")


def test_of_many_promotions_at_once_one_wins(remote: Project, versions: list):
    outcomes: list[str] = []

    def promote(version) -> None:
        try:
            registry.promote(version, expected="1", reason="race")
            outcomes.append("moved")
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=promote, args=(version,)) for version in versions[1:] for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = aliases(remote, versions[0].name)["champion"]
    assert outcomes.count("moved") == 1 and sum(f"moved from 1 to {winner}" in text for text in outcomes) == 7
    assert aliases(remote, versions[0].name)["previous_champion"] == "1"


def test_a_copy_for_another_environment_keeps_the_verdict_and_has_its_own_signature(remote: Project, monkeypatch):
    source, production, number = "development", "production", register("development")
    command = ("promote", f"registered_model_name={source}", f"version={number}", f"to={production}")
    assert f"version={number} of {source} has gate verdict none" in remote.step(*command, code=2).stderr
    monkeypatch.setenv(verdicts.KEY, "key")
    version, folder = (
        remote.client.get_model_version(source, number),
        registry.locate(f"models:/{source}/{number}").path,
    )
    signature = registry.sign(version, "PROMOTE", folder)
    about = {"parent_version": "7", "promoted_at": "yesterday", "promotion_reason.2": "a rollback"}
    registry.tag(version, {"gate.verdict": "PROMOTE", verdicts.TAG: signature, **about})
    for _ in range(2):  # the second time nothing is copied
        remote.step(*command, **{verdicts.KEY: "key"})
    [copy] = registry.versions_of(production)
    assert aliases(remote, production)["champion"] == copy.version and copy.tags["gate.verdict"] == "PROMOTE"
    copied = registry.locate(f"models:/{production}/{copy.version}").path
    assert registry.is_signed(copy, copied) and copy.tags[verdicts.TAG] != signature
    assert copy.tags["promoted_at"] != "yesterday" and not {"parent_version", "promotion_reason.2"} & set(copy.tags)
    assert f"{source}/{number}" in registry.history(copy).splitlines()[2]
    monkeypatch.setenv(verdicts.KEY, "another key")
    assert not registry.is_signed(copy, copied)


def test_the_id_of_a_model_is_not_what_its_author_wrote(remote: Project):
    """Otherwise the gate could judge one model, and register and promote another one."""
    good, other = (remote.client.get_model_version("authored", register("authored", label)) for label in (1, 2))
    ids = [version.source.removeprefix("models:/") for version in (good, other)]
    file = registry.locate(good.source).path / "MLmodel"
    file.write_text(file.read_text().replace(*ids))
    remote.client.log_model_artifact(ids[0], str(file))
    for uri in (good.source, f"models:/authored/{good.version}"):
        assert "says in its file MLmodel that it is m-" in refusal(registry.locate, uri)


def test_two_models_of_one_run_are_two_models(remote: Project):
    with mlflow.start_run():
        numbers = [register("together", label) for label in (1, 2)]
    weak, good = (registry.locate(f"models:/together/{number}") for number in numbers)
    assert weak.run_id == good.run_id and not weak.is_same(good)


def test_an_account_without_a_name_promotes(remote: Project, versions: list, monkeypatch):
    monkeypatch.setattr(locks.getpass, "getuser", lambda: {}["uid not found"])
    registry.promote(versions[1], expected="1", reason="second")
    assert remote.client.get_model_version(versions[1].name, versions[1].version).tags["promoted_by"].isdigit()


def test_wrong_versions_are_clear(remote: Project, versions: list):
    name = versions[0].name
    error = remote.step("promote", "version=99", f"registered_model_name={name}", code=2).stderr
    assert error.rstrip().endswith("give 1, 2, 3")  # there is no other alias yet
    assert "nobody has no version" in registry.known_versions("nobody")
    assert "version is required" in remote.step("promote", f"registered_model_name={name}", code=2).stderr


@pytest.mark.parametrize("name", ["a/b", "a:b", "it's", "a?b", "a#b", "a%41", "a&b", "a\nb", 5, True, ["a"], " a"])
def test_names_that_cannot_be_read_again_are_refused_before_training(name):
    assert "registered_model_name=" in refusal(registry.check_name, name)


def test_a_name_with_dots_dashes_and_spaces_is_read_again(remote: Project):
    for name in ("catalog.schema.model", "my-model_2", "two words", "größe"):
        registry.check_name(name)
        remote.client.create_registered_model(name)
        version = remote.client.create_model_version(name, "s3://nowhere/model")
        registry.promote(version, expected="none", reason="first")
        assert registry.pin(None, name) == (f"models:/{name}/1", "1")
