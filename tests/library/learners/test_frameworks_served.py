"""One framework from training to the next champion in processes of its own, and a corrupt booster that a server refuses.

test_learners.py and test_update.py have the other frameworks.
"""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from conftest import Project, tracking
from forging import rewrite
from learning import fitted, table
from mlflow import MlflowClient
from reports import report
from servers import served_by_mlflow, serving
from test_boosters import change_schema

from alacarte import learners
from alacarte.feedback import Store
from project.data import load_digits

MODEL = ("model=keras_mlp", "model.max_epochs=25", "registered_model_name=keras")


def test_keras_from_training_to_the_next_champion(project: Project, tmp_path: Path):
    project.step("pipeline", *MODEL, "data.stop=900")
    rows = load_digits(start=900, stop=960)
    X, y = rows.drop(columns="digit"), rows["digit"]
    rows.to_csv(tmp_path / "rows.csv", index=False)
    project.step("score", f"input={tmp_path}/rows.csv", f"output={tmp_path}/out.csv", "registered_model_name=keras")
    scored = pd.read_csv(tmp_path / "out.csv")["prediction"].tolist()
    assert np.mean(np.array(scored) == y) > 0.7
    body = {"dataframe_split": X.to_dict(orient="split", index=False)}
    with serving(project, "registered_model_name=keras") as served:
        served.wait("/status", model_version="1")
        assert served.ask("/invocations", body).body["predictions"] == scored
    with served_by_mlflow("models:/keras@champion", tmp_path, project.uri) as stock:
        assert stock.ask("/invocations", body).body["predictions"] == scored

    url, more = f"sqlite:///{tmp_path}/feedback.db", load_digits(rotate=25).sample(400, random_state=0)
    with tracking(project.uri):
        loaded = learners.load(mlflow.artifacts.download_artifacts("models:/keras/1", dst_path=str(tmp_path / "1")))
    X, y = more.drop(columns="digit"), more["digit"].to_numpy()
    predicted = loaded.predict(X)
    audit = np.random.default_rng(0).random(400) < 0.5
    report(Store(url), "keras", X, y, predicted, classes=list(range(10)), audit=audit, mistakes=predicted != y)
    limits = ("retrain.max_share_per_annotator=10", "retrain.max_range_factor=1000")
    ended = project.step("retrain", "registered_model_name=keras", f"feedback.url={url}", *limits)
    assert "starts from scratch" not in ended.stdout + ended.stderr
    versions = MlflowClient(project.uri).search_model_versions("name = 'keras'")
    assert len(versions) == 2, ended.stdout


def test_a_server_goes_on_when_a_booster_is_corrupt(project: Project, tmp_path: Path):
    X, _ = table("numeric", "classification")
    client = MlflowClient(project.uri)
    client.create_registered_model("corrupt")
    for version in ("1", "2"):
        folder = tmp_path / version
        fitted("lightgbm", "numeric", "classification").save(folder, example=X.head(5), metadata={})
        if version == "2":
            rewrite(folder / "model.skops", change_schema(r"left_child=\d+", "left_child=99999999"))
        client.create_model_version("corrupt", folder.as_uri())
    client.set_registered_model_alias("corrupt", "champion", "1")
    with serving(project, "registered_model_name=corrupt") as served:
        served.wait("/status", model_version="1")
        client.set_registered_model_alias("corrupt", "champion", "2")
        served.wait(
            "/status", model_version="1", error="version 2 is refused: the process that tried it ended with SIG"
        )
        body = {"dataframe_split": X.head(2).to_dict(orient="split", index=False)}
        assert len(served.ask("/invocations", body).body["predictions"]) == 2
