"""Following the registry: what is swapped to, what is refused, what holds up nothing."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from registries import X, answers, following, load, local_registry, point, refuses, register, serves, until
from sklearn.dummy import DummyClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from alacarte import registry, verdicts
from alacarte.serving import follower
from alacarte.serving.follower import ModelFollower
from alacarte.serving.model import ServedModel


@pytest.fixture(scope="module", autouse=True)
def _uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with local_registry(tmp_path_factory.mktemp("registry")):
        yield


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Callable[..., ModelFollower]]:
    with following(tmp_path / "cache") as start:
        yield start


def test_the_first_champion_a_change_of_it_and_its_absence(follow):
    holder = follow("first")
    until(lambda: "has no champion" in holder.reason(), holder.reason)
    for label in (1, 2):
        register("first", label)
    assert holder.current is None and holder.status()["model_version"] is None
    for flip, version in enumerate("1212"):
        point("first", version)
        serves(holder, version)
        assert answers(holder) == int(version) and holder.status()["swaps"] == flip
    status = holder.status()
    assert holder.current.run_id == status["run_id"] and status["since"].endswith("+00:00")
    MlflowClient().delete_registered_model_alias("first", "champion")
    for _ in range(3):
        holder.refresh()
        threading.Event().wait(0.1)
    status = holder.status()
    assert status["model_version"] == "2" and status["failures"] == 0 and status["last_error"] is None


def test_a_model_made_again_has_the_same_numbers_and_is_another(follow):
    register("again", 1)
    point("again", "1")
    holder = follow("again")
    serves(holder, "1")
    MlflowClient().delete_registered_model("again")
    register("again", 7)
    point("again", "1")
    until(lambda: answers(holder) == 7, holder.status)


def test_the_challenger_is_ready_before_it_is_promoted(follow):
    loaded: list[str] = []

    def counting(folder: Path) -> ServedModel:
        version = folder.parent.name.split("-")[0]
        if version == "1":  # so late that what did not wait for it would come first
            threading.Event().wait(0.5)
        loaded.append(version)
        return load(folder)

    for label in (1, 2):
        register("next", label)
    point("next", "1")
    point("next", "2", "challenger")
    holder = follow("next", counting, poll_seconds=60)
    serves(holder, "1")
    until(lambda: loaded == ["1", "2"], lambda: loaded)
    point("next", "2")
    holder.refresh()
    serves(holder, "2")
    point("next", "1")  # and so is the one before, for a rollback
    holder.refresh()
    serves(holder, "1")
    assert loaded == ["1", "2"]


def test_what_is_refused(follow):
    foreign = FunctionTransformer(np.nan_to_num), DummyClassifier(strategy="constant", constant=2)
    bad = {
        "pickle": {"serialization_format": "cloudpickle"},
        "answers on its input example are not those logged": {"metadata": {"example_predictions": [2, 2, 1]}},
        "its answers on its input example are not those logged with it": {"metadata": {"example_predictions": [2]}},
        "input a is string, was double; input c is required": {"rows": pd.DataFrame({"a": ["x"], "c": [1.0]})},
        "output 1 is string, was integer": {"label": "two"},
        "numpy.nan_to_num": {
            "model": make_pipeline(*foreign).fit(X, [2, 2, 2]), "skops_trusted_types": ["numpy.nan_to_num"],
        },
        "not a skops file": {},
    }  # fmt: skip
    register("refused")
    point("refused", "1")
    holder = follow("refused")
    serves(holder, "1")
    for reason, logged in bad.items():
        version = register("refused", **{"label": 2, **logged})
        if not logged:
            damage(version)
        point("refused", version)
        assert reason in refuses(holder, version, kept="1")
    failures = holder.status()["failures"]
    assert failures == len(bad)
    holder.refresh()
    threading.Event().wait(0.3)
    assert holder.status()["failures"] == failures, "what failed is not tried again at each poll"
    good = register("refused", 3)
    point("refused", good)
    serves(holder, good)
    assert holder.status()["last_error"] is None


def damage(version: str) -> None:
    """Replace the model file in the registry by half of it."""
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/refused/{version}"))  # the place itself, as it is local
    whole = (folder / "model.skops").read_bytes()
    (folder / "model.skops").write_bytes(whole[: len(whole) // 2])


def test_what_failed_is_tried_again_after_a_while_or_when_the_alias_comes_back(follow, monkeypatch):
    broken = threading.Event()
    broken.set()

    def flaky(folder: Path) -> ServedModel:
        if broken.is_set() and folder.parent.name.startswith("2-"):
            raise SystemExit("a model's own code ends the process")
        return load(folder)

    for label in (1, 2):
        register("flaky", label)
    point("flaky", "1")
    holder = follow("flaky", flaky)
    serves(holder, "1")
    point("flaky", "2")
    assert "ends the process" in refuses(holder, "2", kept="1")
    broken.clear()
    monkeypatch.setattr(follower, "RETRY", 0)
    serves(holder, "2")
    assert holder.status()["last_error"] is None


def test_a_challenger_that_fails_is_reported_and_counted_each_time_it_is_promoted(follow):
    register("poor", 1)
    register("poor", 2, serialization_format="cloudpickle")
    point("poor", "1")
    point("poor", "2", "challenger")
    holder = follow("poor")
    serves(holder, "1")
    until(lambda: holder.status()["last_error"], holder.status)
    reported = holder.status()
    assert reported["last_error"].startswith("version 2 is refused: the sklearn flavor in cloudpickle: pickles are not")
    assert reported["last_error"].endswith("(it is the challenger)")
    assert reported["failures"] == 0 and holder.current.version == "1"
    for failures in (1, 2):
        point("poor", "2")
        until(lambda failures=failures: holder.status()["failures"] == failures, holder.status)
        assert "challenger" not in refuses(holder, "2", kept="1")
        point("poor", "1")
        until(lambda: "(it is the challenger)" in (holder.status()["last_error"] or ""), holder.status)
    MlflowClient().delete_registered_model_alias("poor", "challenger")
    until(lambda: holder.status()["last_error"] is None, holder.status)


def test_a_slow_version_holds_up_nothing(follow):
    go, begun = threading.Event(), threading.Event()

    def slow(folder: Path) -> ServedModel:
        if folder.parent.name.startswith("2-"):
            begun.set()
            assert go.wait(30)
        return load(folder)

    for label in (1, 2, 3):
        register("slow", label)
    point("slow", "1")
    holder = follow("slow", slow)
    serves(holder, "1")
    point("slow", "2")
    assert begun.wait(30)
    point("slow", "3")
    serves(holder, "3")
    go.set()
    threading.Event().wait(0.3)
    assert holder.current.version == "3" and holder.status()["swaps"] == 1


def test_only_a_version_that_the_gate_signed(follow, monkeypatch):
    monkeypatch.setenv(verdicts.KEY, "key")
    for label in (1, 2, 3, 4):
        register("signed", label)
    versions = {number: MlflowClient().get_model_version("signed", number) for number in "1234"}
    files = {number: registry.locate(f"models:/signed/{number}").path for number in "14"}
    # Version 4 is signed with the files of version 1: its own replaced them in the store after the gate had judged.
    signatures = {
        "1": ("1", "PROMOTE", "1"),
        "2": ("2", "HOLD", "1"),
        "3": ("1", "PROMOTE", "1"),
        "4": ("4", "PROMOTE", "1"),
    }
    for number, (signed, verdict, judged) in signatures.items():
        signature = registry.sign(versions[signed], verdict, files[judged])
        MlflowClient().set_model_version_tag("signed", number, verdicts.TAG, signature)
    assert verdicts.digest(files["1"]) != verdicts.digest(files["4"])
    point("signed", "1")
    holder = follow("signed", require_verdict=True)
    serves(holder, "1")
    for version in "234":
        point("signed", version)
        holder.refresh()
        assert "the gate has not signed a PROMOTE" in refuses(holder, version, kept="1")
    point("signed", "1")
    holder.refresh()
    until(lambda: holder.status()["last_error"] is None, holder.status)
    tags = MlflowClient().get_model_version("signed", "1").tags
    MlflowClient().delete_registered_model("signed")  # a model that is made again has the same numbers
    register("signed", 1)
    MlflowClient().set_model_version_tag("signed", "1", verdicts.TAG, tags[verdicts.TAG])
    point("signed", "1")
    holder.refresh()
    assert "the gate has not signed a PROMOTE" in refuses(holder, "1", kept="1")


def test_the_cache_serves_only_what_the_gate_signed(follow, monkeypatch):
    monkeypatch.setenv(verdicts.KEY, "key")
    for label in (1, 2):
        register("cached", label)
    point("cached", "1")
    holder = follow("cached")  # which needs no signature
    serves(holder, "1")
    holder.stop()
    point("cached", "2")
    holder = follow("cached", require_verdict=True)
    until(lambda: "version 1 is refused: the gate has not signed" in holder.reason(), holder.reason)
    version = MlflowClient().get_model_version("cached", "1")
    signature = registry.sign(version, "PROMOTE", registry.locate("models:/cached/1").path)
    registry.tag(version, {verdicts.TAG: signature})
    point("cached", "1")
    holder.refresh()
    serves(holder, "1")
    holder.stop()
    point("cached", "2")
    serves(follow("cached", require_verdict=True), "1")  # the signature is beside the copy


def test_the_thread_outlives_its_own_mistakes(follow, monkeypatch):
    register("robust")
    point("robust", "1")
    holder = follow("robust")
    serves(holder, "1")
    with monkeypatch.context() as patched:
        patched.setattr(follower.VersionRef, "of", lambda version: 1 / 0)
        until(lambda: "ZeroDivisionError" in (holder.status()["last_error"] or ""))
    until(lambda: holder.status()["last_error"] is None)
    register("robust", 2)
    point("robust", "2")
    serves(holder, "2")
