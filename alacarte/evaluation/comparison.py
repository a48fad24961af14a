"""Champion and challenger on the same rows: the test part, and the labelled requests that only ever judge."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alacarte import learners
from alacarte.data.dataset import Dataset
from alacarte.evaluation import metrics as evaluation
from alacarte.evaluation.metrics import Comparison
from alacarte.feedback.queries import Labelled
from alacarte.learners import Learner
from alacarte.retraining import selection


@dataclass(frozen=True, eq=False)
class Compared:
    """What two models made of the rows that judge."""

    answers: np.ndarray  # (n,) the champion's, on the test part
    test: Comparison
    audit: Comparison | int | None  # on labelled requests: their number where they are too few, None without a store
    report: dict[str, Any] = field(default_factory=dict)  # of the audit rows: exact labels, givers, metrics
    worse_slices: list[dict[str, Any]] = field(default_factory=list)  # where the challenger is proved to be worse


def compare(
    champion: str | Path, challenger: Learner, dataset: Dataset, labelled: Labelled | None, gate: Mapping[str, Any]
) -> Compared:
    """Compare a loaded challenger with the champion in a model folder; `labelled` holds accepted and used labels.

    `gate` has test, level, slices and least_audit. Raises UserError where the models cannot be compared: another task,
    other classes, other columns.
    """
    X, y = dataset.part("test")
    answers = learners.answers(champion, X, y, dataset.task)
    test, worse = _pair(answers, challenger.predict(X), X, y, dataset.task, gate)
    if labelled is None:
        return Compared(answers, test, None, {}, worse)
    rows = selection.gate_rows(labelled, dataset)
    report: dict[str, Any] = {
        "n": len(rows.labels),
        "feedback_ids": rows.about["feedback_id"].tolist(),
        "givers": selection.givers(rows).value_counts().to_dict(),
    }
    if len(rows.labels) < gate["least_audit"]:
        return Compared(answers, test, len(rows.labels), report, worse)
    X_new, y_new = selection.like(rows.inputs, X), pd.Series(rows.labels.tolist(), name=y.name)
    answered, predicted = learners.answers(champion, X_new, y_new, dataset.task), challenger.predict(X_new)
    audit, more = _pair(answered, predicted, X_new, y_new, dataset.task, gate)
    report["metrics"] = evaluation.score(y_new, predicted, None, challenger.classes, dataset.task)
    before = evaluation.score(y_new, answered, None, None, dataset.task)
    report["metrics"] |= {f"champion_{name}": value for name, value in before.items()}
    return Compared(answers, test, audit, report | {"comparison": asdict(audit)}, worse + more)


def _pair(
    answers: np.ndarray, predicted: np.ndarray, X: pd.DataFrame, y: pd.Series, task: str, gate: Mapping[str, Any]
) -> tuple[Comparison, list[dict[str, Any]]]:
    before, after = (evaluation.losses(y, either, task) for either in (answers, predicted))
    slices = [gate["slices"]] if isinstance(gate["slices"], str) else gate["slices"]
    worse = evaluation.worse_slices(before, after, X[slices], level=gate["level"]) if slices else []
    return evaluation.paired_test(before, after, test=gate["test"], level=gate["level"]), worse
