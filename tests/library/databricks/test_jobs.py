"""The entry points as jobs of a workspace, which here is the stand-in of workspace.py: real uploads, jobs and runs."""

import numpy as np
import pandas as pd
from reports import report
from there import MODEL, SMALL, There

from alacarte.feedback import Store
from project.data import load_digits


def test_every_entry_point_runs_there(there: There):
    """train and evaluate, each as a job of its own: docs/databricks.md."""
    name = f"registered_model_name={MODEL}"
    states = there.job("main", *SMALL, name).splitlines()
    assert "databricks: RUNNING In run" in states and "databricks: main succeeded, its run is FINISHED" in states
    registry = there.client
    assert str(registry.get_model_version_by_alias(MODEL, "champion").version) == "1"
    registry.delete_registered_model_alias(MODEL, "champion")
    there.job("promote", "version=1", "--reason", 'by "hand", there', name)
    champion = registry.get_model_version_by_alias(MODEL, "champion")
    assert str(champion.version) == "1" and champion.tags["promotion_reason.2"] == 'by "hand", there'
    rows = load_digits(stop=5).drop(columns="digit")
    rows.to_csv(there.root.parent / "rows.csv", index=False)
    there.job("score", f"input={there.root.parent}/rows.csv", f"output={there.root.parent}/out put.csv", name)
    assert set(pd.read_csv(there.root.parent / "out put.csv")["model_version"]) == {1}
    # In a store without labels retrain opens no run, so that the one it was given is closed for it.
    url = f"sqlite:///{there.root.parent}/feedback.db"  # the jobs run on this machine
    store = f"feedback.url={url}"
    run = there.client.get_run(there.job("retrain", store, name).splitlines()[-1].removeprefix("run_id="))
    assert run.info.status == "FINISHED" and not there.running()
    # Predictions and labels are in the store; monitor finds that the inputs changed, and retrain learns from them.
    rows = load_digits(rotate=25).head(200)
    mistakes, labels = np.arange(200) < 100, rows["digit"].to_numpy()
    wrong, classes = (labels + 1) % 10, list(range(10))
    report(Store(url), MODEL, rows.drop(columns="digit"), labels, wrong, classes=classes, mistakes=mistakes)
    there.job("monitor", store, name, "monitor.min_rows=100", code=3)
    assert there.runs("tags.step = 'monitor'")[0].data.tags["retrain"] == "yes"
    limits = ("retrain.min_labels=10", "retrain.max_share_per_annotator=1", "retrain.max_range_factor=1000")
    there.job("retrain", store, name, *limits)
    labelled = Store(url).labelled(MODEL, "accepted", "used").about
    assert (labelled["state"] == "used").all() and set(labelled["used_version"]) == {"2"} and len(labelled) == 100
    assert registry.get_model_version(MODEL, "2").tags["gate.verdict"] and not there.running()
