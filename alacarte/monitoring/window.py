"""One window of predictions compared with the training data: the tables that `monitor` logs, and its decision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from alacarte.data.tables import align_columns
from alacarte.errors import UserError
from alacarte.evaluation import metrics as evaluation
from alacarte.evaluation.audit import annotators, subset
from alacarte.feedback.queries import Labelled, Window
from alacarte.monitoring import drift
from alacarte.monitoring.drift import Decision
from alacarte.retraining import selection
from alacarte.retraining.champion import Champion


@dataclass(frozen=True, eq=False)
class Look:
    decision: Decision
    metrics: dict[str, float]
    columns: pd.DataFrame  # drift.compare_columns and `drifted`, with a row each for predictions and confidence
    annotators: pd.DataFrame  # who gave labels in the window, how many, and the share that corrects
    answers: tuple[list, list]  # on the data, and in the window

    def metrics_table(self) -> pd.DataFrame:
        return pd.DataFrame({"metric": list(self.metrics), "value": list(self.metrics.values())})


def check_settings(**settings: Any) -> None:
    """UserError for settings by which no window could be judged."""
    above = ("hours", "rows", "min_rows", "reference_rows", "labels", "labels_with_drift")
    for key in (*above, "every", "psi_threshold", "margin"):
        least = 0 if key in ("every", "psi_threshold", "margin") else 1e-9
        if not settings[key] >= least:
            raise UserError(f"monitor.{key}={settings[key]}: allowed are numbers {'from' if not least else 'above'} 0")
    if not 0.5 <= settings["confidence_level"] < 1:
        raise UserError(
            f"monitor.confidence_level={settings['confidence_level']}: expected a number from 0.5 to below 1, such as 0.95"
        )


def look(champion: Champion, window: Window, labelled: Labelled, new_labels: int, settings: Mapping[str, Any]) -> Look:
    """Measure a window. `labelled` holds the model's accepted and used labels.

    The reference is what the champion was trained on: the train part, and the labels that it and its ancestors used.
    Predictions, confidence and accuracy are of the champion's own version; the inputs are all that came.
    """
    about, dataset = window.about.tail(settings["rows"]), champion.dataset
    inputs = window.inputs.loc[about.index]
    X, _ = dataset.part("train")
    versions = pd.to_numeric(labelled.about["used_version"], errors="coerce")
    used = subset(labelled, (versions <= float(champion.number)).to_numpy(bool))
    reference = pd.concat([X, align_columns(used.inputs, X)], ignore_index=True) if len(used.labels) else X
    if len(reference) > settings["reference_rows"]:
        reference = reference.sample(settings["reference_rows"], random_state=0)
    columns = drift.compare_columns(reference, align_columns(inputs, X))

    mine = about[about["model_version"] == champion.number]
    measured = drift.measure(mine, dataset.task) if len(mine) else {}
    metrics = {**measured, "rows": float(len(about)), "new_labels": float(new_labels)}
    X_val, _ = dataset.part("val")
    X_test, y_test = dataset.part("test")
    answered = champion.learner.predict(X_val)
    answers: tuple[list, list] = (answered.tolist(), mine["prediction"].tolist())
    if len(mine) >= settings["min_rows"]:
        compared = {"(predictions)": (pd.Series(answered), pd.Series(answers[1], dtype=type(answers[0][0])))}
        proba = champion.learner.predict_proba(X_val)
        if proba is not None and mine["confidence"].notna().any():
            compared["(confidence)"] = (pd.Series(proba.max(axis=1)), mine["confidence"])
        rows = [{"column": name, **drift.compare_column(*pair)} for name, pair in compared.items()]
        columns = pd.concat([pd.DataFrame(rows), columns], ignore_index=True)
    columns = drift.mark(columns, 1 - settings["confidence_level"], settings["psi_threshold"])
    columns = columns.sort_values("psi", ascending=False, ignore_index=True)

    inner = columns[~columns["column"].isin(["(predictions)", "(confidence)"])]
    metrics |= {
        "drift_share": float(inner["drifted"].mean()),
        "psi_max": float(inner["psi"].max()),
        "missing_rate": float(inner["missing"].mean()),
        "out_of_range_rate": float(inner["out_of_range"].mean()),
    }
    expected = evaluation.score(y_test, champion.learner.predict(X_test), None, None, dataset.task)
    decision = drift.decide(columns, metrics, expected, margin=settings["margin"], labels=settings["labels"])
    return Look(decision, metrics, columns, _count_by_annotator(labelled, about["prediction_id"]), answers)


def _count_by_annotator(labelled: Labelled, ids: pd.Series) -> pd.DataFrame:
    inside = labelled.about["prediction_id"].isin(ids).to_numpy()
    who = annotators(labelled)[inside]
    table = pd.DataFrame({"annotator": who, "corrects": labelled.about["is_correction"][inside].astype(float)})
    counted = table.groupby("annotator")["corrects"].agg(["size", "mean"]).reset_index()
    return counted.set_axis(["annotator", "labels", "share that corrects"], axis=1).sort_values(
        "labels", ascending=False
    )


def count_new(champion: Champion, labelled: Labelled, settings: Mapping[str, Any], rejected: list[str]) -> int:
    """How many labels a retraining would take now."""
    left = selection.select(
        labelled, champion.dataset, classes=champion.learner.classes,
        max_share_per_annotator=settings["max_share_per_annotator"], max_range_factor=settings["max_range_factor"],
        rejected=rejected,
    )  # fmt: skip
    return int(np.sum((left == selection.TAKEN).to_numpy() & (labelled.about["state"] == "accepted").to_numpy()))
