"""One window of predictions compared with the training data: the tables that `monitor` logs, and its decision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from alacarte.data.tables import align_columns
from alacarte.errors import check_number
from alacarte.evaluation.audit import annotators, subset
from alacarte.evaluation.metrics import Metrics, answer, make_answers, measure, measure_own
from alacarte.feedback.queries import Labelled, Window
from alacarte.monitoring import drift
from alacarte.monitoring.drift import Decision
from alacarte.retraining.champion import Champion


@dataclass(frozen=True, eq=False)
class WindowComparison:
    decision: Decision
    metrics: dict[str, float]
    columns: pd.DataFrame  # drift.compare_columns and `drifted`, with a row each for predictions and confidence
    annotators: pd.DataFrame  # the annotators of the window, their numbers of labels, and the share that corrects
    answers: tuple[list, list]  # on the data, and in the window


def check_settings(**settings: Any) -> None:
    """UserError for settings by which no window could be judged."""
    for key in ("hours", "rows", "min_rows", "reference_rows", "labels", "labels_with_drift"):
        check_number(f"monitor.{key}", settings[key], lambda x: x > 0, "a number above 0")
    for key in ("every", "psi_threshold", "margin"):
        check_number(f"monitor.{key}", settings[key], lambda x: x >= 0, "a number of at least 0")
    level = settings["confidence_level"]
    check_number(
        "monitor.confidence_level", level, lambda x: 0.5 <= x < 1, "a number from 0.5 to below 1, such as 0.95"
    )


def compare_window(
    champion: Champion,
    window: Window,
    labelled: Labelled,
    new_labels: int,
    settings: Mapping[str, Any],
    own_metrics: Metrics | None = None,
) -> WindowComparison:
    """Measure a window. `labelled` holds the model's accepted and used labels.

    The reference is the data of the champion: the train part, and the labels that it and its ancestors used.
    Predictions, confidence and accuracy are of the champion's own version; the inputs are those of all requests.
    """
    about, dataset, learner = window.about.tail(settings["rows"]), champion.dataset, champion.learner
    X, _ = dataset.part("train")
    inputs = align_columns(window.inputs.loc[about.index], X)
    stored = {name: inputs[name][_is_stored(name, about, window.columns_of)] for name in X}
    columns = drift.compare_columns(_reference(champion, labelled, settings["reference_rows"]), stored)

    own = about[about["model_version"] == champion.number]
    metrics = {**(drift.measure(own, dataset.task) if len(own) else {}), "rows": len(about), "new_labels": new_labels}
    metrics |= {f"audit_{name}": value for name, value in measure_audit(own, champion, own_metrics).items()}
    compared = columns[columns["kind"] != "not stored"]
    X_val, _ = dataset.part("val")
    X_test, y_test = dataset.part("test")
    answers: tuple[list, list] = (learner.predict(X_val).tolist(), own["prediction"].tolist())
    outputs = []
    if len(own) >= settings["min_rows"]:
        predictions = pd.Series(answers[0]), pd.Series(answers[1], dtype=type(answers[0][0]))
        outputs.append({"column": "(predictions)", **drift.compare_column(*predictions)})
        proba = learner.predict_proba(X_val)
        if proba is not None and own["confidence"].notna().any():
            confidence = drift.compare_column(pd.Series(proba.max(axis=1)), own["confidence"])
            outputs.append({"column": "(confidence)", **confidence})
    columns = pd.concat([pd.DataFrame(outputs), columns], ignore_index=True)
    columns = drift.mark(columns, 1 - settings["confidence_level"], settings["psi_threshold"])
    drifted = columns["drifted"][columns["column"].isin(compared["column"])]
    metrics |= {
        "drift_share": float(drifted.mean()),
        "psi_max": float(compared["psi"].max()),
        "missing_rate": float(compared["missing"].mean()),
        "out_of_range_rate": float(compared["out_of_range"].mean()),
    }
    columns = columns.sort_values("psi", ascending=False, ignore_index=True)
    expected = measure(answer(learner, X_test, y_test)) if len(y_test) else {}  # audit rows have no weights either
    decision = drift.decide(columns, metrics, expected, margin=settings["margin"], labels=settings["labels"])
    return WindowComparison(decision, metrics, columns, _count_by_annotator(labelled, about["prediction_id"]), answers)


def measure_audit(about: pd.DataFrame, champion: Champion, own_metrics: Metrics | None) -> dict[str, float]:
    """The team's own metrics on the labelled audit rows of a window. Probabilities are not stored."""
    audit = about[about["label"].notna() & about["audit"].astype(bool)]
    task, classes = champion.dataset.task, champion.learner.classes
    answers = make_answers(audit["label"].tolist(), audit["prediction"].tolist(), None, classes, task)
    return measure_own(answers, own_metrics, strict=False)


def _is_stored(name: str, about: pd.DataFrame, columns_of: Mapping[str, list[str]]) -> np.ndarray:
    """(n,) bool: rows of requests whose column was stored. A redacted column was not, a column that was not sent was."""
    schemas = [schema for schema, columns in columns_of.items() if name in columns]
    return about["input_schema"].isin(schemas).to_numpy()


def _reference(champion: Champion, labelled: Labelled, max_rows: int) -> pd.DataFrame:
    X, _ = champion.dataset.part("train")
    versions = pd.to_numeric(labelled.about["used_version"], errors="coerce")
    used = subset(labelled, (versions <= float(champion.number)).to_numpy(bool))
    if len(used.labels):
        X = pd.concat([X, align_columns(used.inputs, X)], ignore_index=True)
    return X.sample(max_rows, random_state=0) if len(X) > max_rows else X


def _count_by_annotator(labelled: Labelled, ids: pd.Series) -> pd.DataFrame:
    is_inside = labelled.about["prediction_id"].isin(ids).to_numpy()
    corrects = labelled.about["is_correction"][is_inside].astype(float)
    counts = corrects.groupby(annotators(labelled)[is_inside]).agg(["size", "mean"]).reset_index()
    counts = counts.set_axis(["annotator", "labels", "share that corrects"], axis=1)
    return counts.sort_values("labels", ascending=False)
