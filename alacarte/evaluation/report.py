"""Scores of an evaluation, and its record on the active MLflow run: metrics, plots, slices.json and gate.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlflow
import numpy as np

from alacarte import tracking
from alacarte.data.dataset import as_mlflow
from alacarte.evaluation import metrics as evaluation
from alacarte.evaluation.comparison import Compared
from alacarte.evaluation.gate import Verdict
from alacarte.evaluation.plots import plots
from alacarte.evaluation.rows import JudgingRows, describe
from alacarte.learners import Learner


@dataclass(frozen=True, eq=False)
class Scored:
    """The answers of a model on n test rows, and how good they are."""

    predicted: np.ndarray  # (n,)
    proba: np.ndarray | None  # (n, n_classes)
    metrics: dict[str, float]  # without prefix
    baseline: dict[str, float]  # metrics of a constant answer


def score(learner: Learner, rows: JudgingRows) -> Scored:
    """Score a model on the rows that judge."""
    _, y = rows.dataset.part("test")
    predicted, proba = learner.predict(rows.for_challenger), learner.predict_proba(rows.for_challenger)
    metrics = evaluation.score(y, predicted, proba, learner.classes, rows.dataset.task)
    constant = evaluation.baseline(rows.dataset.part("train")[1], y, rows.dataset.task)
    return Scored(predicted, proba, metrics, constant)


def log_scores(
    scored: Scored,
    learner: Learner,
    rows: JudgingRows,
    compared: Compared | None,
    gate: Mapping[str, Any],
    model_id: str | None,
) -> None:
    """Log test_ and audit_ metrics, plots and slices.json."""
    dataset = rows.dataset
    X, y = dataset.part("test")
    tracking.log_scores(scored.metrics, "test", as_mlflow(dataset, "test", scored.predicted), model_id)
    audit = compared.report.get("metrics", {}) if compared else {}
    mlflow.log_metrics({f"audit_{metric}": value for metric, value in audit.items()})
    answers = compared.answers if compared else None
    figures = plots(y, scored.predicted, scored.proba, learner.classes, dataset.task, answers)
    for file, figure in figures.items():
        mlflow.log_figure(figure, file)
    if slices := [column for column in gate["slices"] if column in X]:  # the champion's data may lack one
        table = evaluation.by_slice(y, scored.predicted, scored.proba, learner.classes, dataset.task, X[slices])
        mlflow.log_table(table, "slices.json")


def log_gate(
    verdict: Verdict,
    scored: Scored,
    rows: JudgingRows,
    compared: Compared | None,
    gate: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """Log gate.json: the verdict with all numbers that it rests on."""
    report = {
        "verdict": verdict.decision, "reason": verdict.reason, "versions": versions, "metrics": scored.metrics,
        "baseline": scored.baseline, "rows": rows.report, "comparison": asdict(compared.test) if compared else None,
        "audit": compared.report if compared else {}, "worse_slices": compared.worse_slices if compared else [],
        "checks": verdict.checks, "gate": gate,
    }  # fmt: skip
    mlflow.log_dict(report, "gate.json")


def notes(rows: JudgingRows, compared: Compared | None) -> list[str]:
    """One sentence for each thing beside the verdict that a user should know."""
    texts = describe(rows.report)
    if compared:
        worse = "worse than the champion where {column} is {value}: {gain:+.3f} on {n} rows"
        texts += [worse.format(**alarm) for alarm in compared.worse_slices] + compared.report.get("notes", [])
    return texts
