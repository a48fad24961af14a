"""LightGBM and XGBoost: trained, trained further, saved without pickle and loaded; forged files are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import mlflow
import numpy as np
import pandas as pd
import pytest
from learning import BOOSTERS, fitted, learner, table

from alacarte import formats, learners
from alacarte.errors import UserError
from alacarte.formats import probe

SETTINGS = {"share": 0.25, "shrink": 0.8, "seed": 0}


def saved(made, folder: Path, X: pd.DataFrame):
    made.save(folder, example=X.head(5), metadata={})
    return learners.load(folder)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("family", BOOSTERS)
def test_a_booster_is_saved_loaded_and_trained_further(family: str, task: str, tmp_path: Path):
    (X, y), (more, truth) = table("mixed", task), table("mixed", task, seed=1)
    made = fitted(family, "mixed", task)
    assert made.epochs == 10
    model = saved(made, tmp_path / "first", X)
    assert type(model) is type(made) and model.classes == made.classes
    rows, labels = pd.concat([X, more], ignore_index=True), pd.concat([y, truth], ignore_index=True)
    for round_ in range(2):
        update = model.update(rows, labels, X, y, init="warm", **SETTINGS)
        assert (update.init, update.note, update.epochs, model.epochs) == ("warm", None, 2, 10)
        folder, expected = tmp_path / f"round{round_}", model.predict(rows)
        model = saved(model, folder, X)
        assert (model.predict(rows) == expected).all()
        assert (mlflow.pyfunc.load_model(str(folder)).predict(rows) == expected).all()
    pins = (folder / "requirements.txt").read_text()
    assert re.search(f"^{family}.*==", pins, re.MULTILINE)
    if task == "classification":
        assert model.classes == ["high", "low", "mid"] and (expected == labels).mean() > 0.6
        assert np.allclose(model.predict_proba(rows).sum(axis=1), 1)
        update = model.update(X[y != "low"], y[y != "low"], X, y, init="warm", **SETTINGS)
        assert update.init == "scratch" and "'low'" in update.note and model.classes == ["high", "mid"]


@pytest.mark.parametrize("family", BOOSTERS)
@pytest.mark.parametrize("labels", [["yes", "no"], [3, 7], [True, False]])
def test_labels_keep_their_type(family: str, labels: list, tmp_path: Path):
    X, _ = table("numeric", "classification")
    y = pd.Series(np.where(X["a"] > 0, labels[0], labels[1]).tolist())
    made = learner(family)
    made.fit(X, y, X, y, task="classification", seed=0)
    answers = saved(made, tmp_path / "model", X).predict(X)
    assert made.classes == sorted(labels) and {type(label) for label in answers.tolist()} == {type(labels[0])}
    assert (answers == y).mean() > 0.9


def test_the_settings_of_a_booster():
    X, y = table("numeric", "classification")
    made = learner("lightgbm", "classification", "model.reg_lambda=1")
    made.fit(X, y, X, y, task="classification", seed=0)
    update = made.update(X, y, X, y, init="warm", **SETTINGS)
    assert update.init == "scratch" and "model.reg_lambda=10" in update.note
    for family, setting in (("lightgbm", "num_leaves=1"), ("xgboost", "max_depth=-5")):
        with pytest.raises(UserError, match=f"model: (?s:.*){setting.split('=')[0]}"):
            learner(family, "classification", f"model.{setting}").fit(X, y, X, y, task="classification", seed=0)


@pytest.mark.parametrize("family", BOOSTERS)
def test_a_child_tries_a_booster_after_its_parent_has_used_threads(family: str, tmp_path: Path, monkeypatch):
    """A fork does not copy the threads of OpenMP. A call that waits for them never returns."""
    monkeypatch.setattr(probe, "SECONDS", 30)
    X, y = table("numeric", "classification", rows=5000)
    made = learner(family, "classification", "model.n_jobs=2")
    made.fit(X, y, X, y, task="classification", seed=0)
    assert len(saved(made, tmp_path / "model", X).predict(X)) == 5000


# --- forged files ---


def change(file: Path, edit: Callable[[str, bytes], bytes]) -> None:
    """Write a skops file again with each entry changed by `edit(name, content)`."""
    with ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, edit(name, content))


def change_schema(old: str, new: str) -> Callable[[str, bytes], bytes]:
    def edit(name: str, content: bytes) -> bytes:
        changed, count = re.subn(old, new, content.decode()) if name == "schema.json" else ("", 0)
        assert name != "schema.json" or count, old
        return changed.encode() if count else content

    return edit


def change_node(cls: str, **values: str) -> Callable[[str, bytes], bytes]:
    """Change the nodes of a class in the JSON tree of a skops file."""

    def walk(branch: object) -> None:
        children = branch.values() if isinstance(branch, dict) else branch if isinstance(branch, list) else ()
        for child in children:
            walk(child)
        if isinstance(branch, dict) and branch.get("__class__") == cls:
            branch.update(values)

    def edit(name: str, content: bytes) -> bytes:
        if name != "schema.json":
            return content
        schema = json.loads(content)
        walk(schema)
        assert json.dumps(schema).encode() != content
        return json.dumps(schema).encode()

    return edit


def corrupt_bytes(name: str, content: bytes) -> bytes:
    """Children of the nodes of XGBoost's trees far outside the tree."""
    if name == "schema.json" or name.endswith(".npy"):
        return content
    marker = b"left_children[$l#"  # UBJSON: an array of 32-bit numbers, then its length
    at = content.index(marker) + len(marker)
    size = {b"L": 8, b"l": 4, b"i": 1, b"U": 1, b"I": 2}[content[at : at + 1]]
    start = at + 1 + size
    return content[:start] + (10**8).to_bytes(4, "big") + content[start + 4 :]


FORGERIES = [
    ("lightgbm", change_node("Booster", __loader__="ConstructorFromReduceNode"), "ConstructorFromReduceNode"),
    ("xgboost", change_node("Booster", __loader__="ConstructorFromReduceNode"), "ConstructorFromReduceNode"),
    ("lightgbm", change_node("Booster", __class__="Dataset"), r"lightgbm\.basic\.Dataset"),
    ("xgboost", change_node("Booster", __class__="DMatrix"), r"xgboost\.core\.DMatrix"),
    ("lightgbm", change_node("Booster", __module__="lightgbm.engine"), r"lightgbm\.engine\.Booster"),
    ("lightgbm", change_schema(r"left_child=\d+", "left_child=99999999"), "ended with SIG"),
    ("xgboost", corrupt_bytes, "ended with SIG"),
]


@pytest.mark.parametrize(("family", "forge", "reason"), FORGERIES)
def test_a_forged_booster_is_refused(family: str, forge: Callable, reason: str, tmp_path: Path):
    X, _ = table("numeric", "classification")
    fitted(family, "numeric", "classification").save(tmp_path / "model", example=X.head(5), metadata={})
    change(tmp_path / "model/model.skops", forge)
    with pytest.raises(UserError, match=reason):
        probe.load_safely(tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"machines": 1}, "a setting 'machines'"),
        ({"forcedsplits_filename": "splits"}, "a setting 'forcedsplits_filename'"),
        ({"metric": "auc machines=10.0.0.1:80"}, "metric is neither a number nor a word"),
        ({"metric": ["/etc/passwd"]}, "metric is neither a number nor a word"),
    ],
)
def test_settings_that_open_files_or_connections_are_refused(settings: dict, reason: str, tmp_path: Path):
    model = learner("lightgbm", "classification").estimators["classification"]
    model._other_params |= settings
    with pytest.raises(UserError, match=reason):
        formats.save_skops(model, tmp_path / "model.skops")
    formats.skops_io().dump(model, tmp_path / "forged.skops")
    with pytest.raises(UserError, match=reason):
        formats.load_skops(tmp_path / "forged.skops")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("os", "allowed are modules of"),
        ("project.__init__", "allowed are modules of"),
        ("project.missing", r"project\.missing, which is not in this checkout"),
        ("alacarte.errors", "registers no learner"),
        ("alacarte.learners.torch", "no model of TorchLearner"),
    ],
)
def test_a_model_names_only_a_registered_learner(name: str, reason: str, tmp_path: Path):
    X, _ = table("numeric", "classification")
    fitted("lightgbm", "numeric", "classification").save(tmp_path / "model", example=X.head(5), metadata={})
    file = tmp_path / "model/MLmodel"
    file.write_text(file.read_text().replace("learner: alacarte.learners.lightgbm", f"learner: {name}"))
    with pytest.raises(UserError, match=reason):
        learners.load(tmp_path / "model")
