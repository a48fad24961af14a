"""The record of an evaluation: metrics, plots, slices.json and gate.json on the active MLflow run, the verdict on the version."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from alacarte import registry, tracking, verdicts
from alacarte.data.dataset import as_mlflow
from alacarte.errors import UserError
from alacarte.evaluation.champion_challenger import Compared, Model
from alacarte.evaluation.comparison import Signal
from alacarte.evaluation.explain import column_importance
from alacarte.evaluation.gate import Verdict
from alacarte.evaluation.metrics import Answers, Metrics, by_slice
from alacarte.evaluation.plots import plot_importance, plots
from alacarte.evaluation.rows import JudgingRows, describe
from alacarte.learners import Learner

MOST_BARS = 30  # columns in the plot of the importance


def log_scores(
    scores: Mapping[str, float], answers: Answers, rows: JudgingRows, compared: Compared | None,
    metrics: Metrics, slices: list[str], model_id: str | None,
) -> None:  # fmt: skip
    """Log test_ and audit_ metrics, plots and slices.json."""
    X, _ = rows.dataset.part("test")
    tested = as_mlflow(rows.dataset, "test")
    mlflow.log_input(tested, context="test")
    mlflow.log_metrics({f"test_{name}": value for name, value in scores.items()}, model_id=model_id, dataset=tested)
    audit = compared.report.get("metrics", {}) if compared else {}
    mlflow.log_metrics({f"audit_{metric}": value for metric, value in audit.items()})
    for file, figure in plots(answers, compared.champion if compared else None).items():
        mlflow.log_figure(figure, file)
    if columns := [column for column in slices if column in X]:  # the champion's data may lack one
        mlflow.log_table(by_slice(answers, X[columns], metrics), "slices.json")


def log_importance(learner: Learner, rows: JudgingRows, metric: str | None, metrics: Metrics) -> None:
    """Log the permutation importance of the input columns as importance.json and importance.png."""
    _, y = rows.dataset.part("test")
    importance = column_importance(learner, rows.for_challenger, y, metric, metrics, rows.weight)
    if importance is None:
        print(f"evaluate: no permutation importance, {rows.for_challenger.shape[1]:,} columns would take too long")
        return
    table, name = importance
    mlflow.log_table(table, "importance.json")
    top = table.head(MOST_BARS)
    figure = plot_importance(top["column"].tolist(), top["importance"], top["standard_deviation"], name)
    mlflow.log_figure(figure, "importance.png")


def log_gate(
    verdict: Verdict, scores: Mapping[str, float], signal: Signal | None, rows: JudgingRows, compared: Compared | None,
    gate: Mapping[str, Any], versions: Mapping[str, str],
) -> None:  # fmt: skip
    """Log gate.json: the verdict with all numbers that it rests on."""
    report = {
        "verdict": verdict.decision, "reason": verdict.reason, "versions": versions, "metrics": scores,
        "signal": asdict(signal) if signal else None, "rows": rows.report,
        "comparison": asdict(compared.test) if compared else None, "audit": compared.report if compared else {},
        "worse_slices": compared.worse_slices if compared else [], "checks": verdict.checks, "gate": gate,
    }  # fmt: skip
    mlflow.log_dict(report, "gate.json")


def log_card(verdict: Verdict, scores: Mapping[str, float], rows: JudgingRows, version: ModelVersion | None) -> None:
    """Write a short report as the note of the run and as the description of the version, its model card.

    A note or a description that somebody else wrote stays.
    """
    data, tags = rows.dataset, version.tags if version else {}
    origin = f"retrained from version {tags['parent_version']}" if "parent_version" in tags else "trained from scratch"
    table = "\n".join(f"| test_{name} | {value:.4g} |" for name, value in scores.items())
    card = (
        f"**{verdict.decision}**: {verdict.reason}\n\n"
        f"Predicts `{data.target}` ({data.task}) from {data.X.shape[1]} columns of {data.name}, {origin}.\n\n"
        f"| metric | value |\n|---|---|\n{table}\n"
    )
    if MLFLOW_RUN_NOTE not in mlflow.get_run(tracking.active_run().info.run_id).data.tags:
        mlflow.set_tag(MLFLOW_RUN_NOTE, card)
    is_ours = version and (version.description or "**PROMOTE**").startswith(("**PROMOTE**", "**HOLD**", "**REJECT**"))
    if version and is_ours:
        MlflowClient().update_model_version(version.name, version.version, description=card)


def verdict_tags(verdict: Verdict, champion: str, run_id: str, metric: str | None) -> dict[str, str]:
    """Tags of a version and of its evaluation; `champion` is the number of the version that it was compared with."""
    tags = {"gate.verdict": verdict.decision, "gate.reason": verdict.reason, "gate.champion": champion}
    tags["gate.metric"] = metric or "default"
    return {**tags, "evaluate_run_id": run_id}


def apply_verdict(
    version: ModelVersion,
    model: Model,
    verdict: Verdict,
    *,
    expected: str,
    run_id: str,
    metric: str | None,
    signs: bool,
) -> ModelVersion | None:
    """Write a verdict on a version. PROMOTE makes it the champion and returns it; every other verdict returns None.

    `signs`: sign it, if there is a key. UserError where the champion is no longer the version `expected`, with which it was
    compared: the verdict then is HOLD.
    """
    tags = verdict_tags(verdict, expected, run_id, metric)
    signature, has_key = verdicts.NOT_SIGNED, bool(os.environ.get(verdicts.KEY))
    if signs and has_key:
        is_logged = model.located.model_id  # otherwise the model was logged again when it was registered
        located = model.located if is_logged else registry.locate(f"models:/{version.name}/{version.version}")
        signature = registry.sign(version, verdict.decision, located.path)
    elif has_key:
        print(f"evaluate: the verdict is not signed, because champion version {expected} is not: see docs/registry.md")
    registry.tag(version, {**tags, verdicts.TAG: signature})
    if verdict.decision != "PROMOTE":
        return None
    try:
        registry.promote(version, expected=expected, reason=verdict.reason)
    except UserError as error:
        registry.tag(version, {"gate.verdict": "HOLD", "gate.reason": error, verdicts.TAG: verdicts.NOT_SIGNED})
        raise
    return version


def notes(rows: JudgingRows, compared: Compared | None) -> list[str]:
    """One sentence for each thing beside the verdict that a user should know."""
    texts = describe(rows.report)
    if compared:
        worse = "worse than the champion where {column} is {value}: {gain:+.3f} on {n} rows"
        texts += [worse.format(**slice_) for slice_ in compared.worse_slices] + compared.report.get("notes", [])
    return texts
