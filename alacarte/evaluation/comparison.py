"""Champion and challenger on the same rows: test rows that neither was trained on, and audit rows that never train."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alacarte import learners
from alacarte.data.tables import align_columns
from alacarte.errors import UserError
from alacarte.evaluation import audit
from alacarte.evaluation import metrics as evaluation
from alacarte.evaluation.metrics import Comparison
from alacarte.evaluation.rows import JudgingRows
from alacarte.feedback.queries import Labelled
from alacarte.learners import Learner


@dataclass(frozen=True, eq=False)
class Compared:
    """The answers of two models on the rows that judge."""

    answers: np.ndarray  # (n,) the champion's, on the test rows
    test: Comparison
    audit: Comparison | int | None  # on audit rows: their number where they are too few, None without a store
    audit_without: dict[str, Comparison | int]  # the same without the rows of one annotator, by annotator
    report: dict[str, Any] = field(default_factory=dict)  # of the audit rows: exact labels, annotators, metrics
    worse_slices: list[dict[str, Any]] = field(default_factory=list)  # where the challenger is proved to be worse

    @property
    def evidence(self) -> dict[str, Any]:
        """What `gate.decide` judges by."""
        return {"comparison": self.test, "audit": self.audit, "audit_without": self.audit_without}


def compare(
    champion: str | Path, challenger: Learner, rows: JudgingRows, labelled: Labelled | None, gate: dict[str, Any]
) -> Compared:
    """Compare a loaded challenger with the champion in a model folder; `labelled` holds accepted and used labels.

    `gate` has test, confidence_level, slices, min_audit_rows and max_share_per_annotator. Raises UserError where the
    models cannot be compared: another task, other classes, other columns.
    """
    dataset = rows.dataset
    X, y = dataset.part("test")
    if challenger.task != dataset.task:
        raise UserError(f"this is a model of {challenger.task}, and the test rows ask for {dataset.task}")
    try:
        answers = learners.answers(champion, rows.for_champion, y, dataset.task)
    except (KeyError, ValueError) as error:  # scikit-learn's, where a column is missing whose data are not known
        raise UserError(f"the champion cannot answer the test rows: {str(error).splitlines()[0]}") from None
    test, worse = _pair(answers, challenger.predict(rows.for_challenger), X, y, dataset.task, gate)
    if labelled is None:
        return Compared(answers, test, None, {}, {}, worse)

    judging = audit.select_audit_rows(labelled, *rows.trained_on, max_share=gate["max_share_per_annotator"])
    n, least = len(judging.rows.labels), gate["min_audit_rows"]
    report: dict[str, Any] = {
        "n": n,
        "feedback_ids": judging.rows.about["feedback_id"].tolist(),
        "annotators": judging.counts,
        "left_out": judging.left_out,
        "notes": judging.notes(gate["max_share_per_annotator"]),
    }
    if n < least:
        return Compared(answers, test, n, {}, report, worse)
    y_new = pd.Series(judging.rows.labels.tolist(), name=y.name)
    X_champion, X_challenger = (align_columns(judging.rows.inputs, X) for X in (rows.for_champion, rows.for_challenger))
    answered, predicted = learners.answers(champion, X_champion, y_new, dataset.task), challenger.predict(X_challenger)
    compared, more = _pair(answered, predicted, align_columns(judging.rows.inputs, X), y_new, dataset.task, gate)
    report["metrics"] = evaluation.score(y_new, predicted, None, challenger.classes, dataset.task)
    before = evaluation.score(y_new, answered, None, None, dataset.task)
    report["metrics"] |= {f"champion_{name}": value for name, value in before.items()}
    without: dict[str, Comparison | int] = {}
    for annotator in judging.counts if judging.are_told_apart else ():
        others = (audit.annotators(judging.rows) != annotator).to_numpy()
        n_others = int(others.sum())
        parts = answered[others], predicted[others], X_challenger[others], y_new[others]
        without[annotator] = n_others if n_others < least else _pair(*parts, dataset.task, gate | {"slices": []})[0]
    return Compared(answers, test, compared, without, report | {"comparison": asdict(compared)}, worse + more)


def _pair(
    answers: np.ndarray, predicted: np.ndarray, X: pd.DataFrame, y: pd.Series, task: str, gate: Mapping[str, Any]
) -> tuple[Comparison, list[dict[str, Any]]]:
    """The comparison on rows with inputs X and truth y, and the slices of X on which the challenger is worse."""
    slices = [column for column in gate["slices"] if column in X]  # the champion's data may lack one
    before, after = (evaluation.losses(y, either, task) for either in (answers, predicted))
    level = gate["confidence_level"]
    worse = evaluation.worse_slices(before, after, X[slices], confidence_level=level) if slices else []
    return evaluation.paired_test(before, after, test=gate["test"], confidence_level=level), worse
