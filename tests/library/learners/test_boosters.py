"""LightGBM and XGBoost: forged files are refused. test_learners.py and test_update.py train and load them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Project
from forging import in_json, rewrite
from learning import fitted, learner, table

from alacarte import formats, learners
from alacarte.errors import UserError
from alacarte.formats import probe

BOOSTERS = ("lightgbm", "xgboost")


@pytest.mark.parametrize("family", BOOSTERS)
def test_a_child_tries_a_booster_after_its_parent_has_used_threads(family: str, tmp_path: Path, monkeypatch):
    """A fork does not copy the threads of OpenMP. A call that waits for them never returns."""
    monkeypatch.setattr(probe, "SECONDS", 30)
    X, y = table("numeric", "classification", rows=5000)
    made = learner(family, "classification", "model.n_jobs=2")
    made.fit(X, y, X, y, task="classification", seed=0)
    made.save(tmp_path / "model", example=X.head(5), metadata={})
    assert len(learners.load(tmp_path / "model").predict(X)) == 5000


# --- forged files ---


def change_schema(old: str, new: str) -> Callable[[str, bytes], bytes]:
    def edit(name: str, content: bytes) -> bytes:
        if name != "schema.json":
            return content
        changed, count = re.subn(old, new, content.decode())
        assert count, old
        return changed.encode()

    return edit


def change_node(cls: str, **values: str) -> Callable[[str, bytes], bytes]:
    """Change the nodes of a class in the JSON tree of a skops file."""

    def walk(branch: object) -> None:
        children = branch.values() if isinstance(branch, dict) else branch if isinstance(branch, list) else ()
        for child in children:
            walk(child)
        if isinstance(branch, dict) and branch.get("__class__") == cls:
            branch.update(values)

    return in_json("schema.json", walk)


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
    rewrite(tmp_path / "model/model.skops", forge)
    with pytest.raises(UserError, match=reason):
        probe.load_safely(tmp_path / "model")


def test_a_step_with_a_forged_model_ends_in_one_line(project: Project, tmp_path: Path):
    X, _ = table("numeric", "classification")
    folder = tmp_path / "model"
    fitted("lightgbm", "numeric", "classification").save(folder, example=X.head(5), metadata={})
    rewrite(folder / "model.skops", change_schema(r"left_child=\d+", "left_child=99999999"))
    X.to_csv(tmp_path / "rows.csv", index=False)
    run = project.client.create_run("0")
    files = (f"input={tmp_path}/rows.csv", f"output={tmp_path}/answers.csv")
    ended = project.step("score", *files, f"model_uri={folder}", code=2, MLFLOW_RUN_ID=run.info.run_id)
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith(f"score: {folder}: the process that tried it ended with SIG")
    assert "Traceback" not in ended.stderr and project.client.get_run(run.info.run_id).info.status == "FAILED"


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
