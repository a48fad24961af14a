"""Champion and challenger on the same rows: test rows that neither was trained on, and audit rows that never train."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from mlflow.entities.model_registry import ModelVersion

from alacarte import learners, registry
from alacarte.data.dataset import DataReader
from alacarte.data.tables import align_columns
from alacarte.errors import UserError
from alacarte.evaluation import audit
from alacarte.evaluation.comparison import Comparison, compare, worse_slices
from alacarte.evaluation.metrics import Answers, Metrics, answer, measure
from alacarte.evaluation.rows import JudgingRows, check_record, choose_rows, own_rows, records, too_few
from alacarte.feedback.queries import Labelled
from alacarte.learners import Learner
from alacarte.registry import Located


@dataclass(frozen=True, eq=False)
class Model:
    located: Located
    learner: Learner


def load(model_uri: str) -> Model:
    """A model by its address."""
    located = registry.locate(model_uri)
    return Model(located, learners.load(located.path))


def load_rival(champion: ModelVersion | None) -> tuple[Model | None, str]:
    """The champion, or why there is none to compare with. A champion that cannot be loaded does not block its successor."""
    if champion is None:
        return None, "no champion yet"
    try:
        return load(f"models:/{champion.name}/{champion.version}"), ""
    except registry.Unreachable:  # the store may answer again in a minute
        raise
    except UserError as error:
        return None, f"the champion, version {champion.version}, cannot be loaded ({error})"


def is_trusted(champion: ModelVersion | None, rival: Model | None) -> bool:
    """Whether the gate may sign what it decides against this champion: a first model, or a champion that it signed.

    Anybody who may set aliases could otherwise choose a weak or a broken champion, and get a signature for any model.
    """
    return champion is None or (rival is not None and registry.is_signed(champion, rival.located.path))


@dataclass(frozen=True, eq=False)
class Compared:
    """Two models on the rows that judge."""

    champion: Answers  # on the test rows
    test: Comparison
    worse_slices: list[dict[str, Any]]  # where the challenger is proved to be worse
    audit: Comparison | int | None = None  # on audit rows: their number where they are too few, None without a store
    audit_without: dict[str, Comparison | int] = field(default_factory=dict)  # without the rows of one annotator
    report: dict[str, Any] = field(default_factory=dict)  # of the audit rows: exact labels, annotators, metrics

    @property
    def evidence(self) -> dict[str, Any]:
        """What `gate.decide` judges by."""
        return {"comparison": self.test, "audit": self.audit, "audit_without": self.audit_without}


def compare_with(
    rival: Model | None,
    model: Model,
    *,
    data: Mapping[str, Any] | None,
    labelled: Labelled | None,
    gate: Mapping[str, Any],
    metrics: Metrics,
    named_by_run: bool,
) -> tuple[JudgingRows, Compared | None, str]:
    """The rows that judge, the comparison on them, and why there is no comparison although there is a champion.

    `data` is the data group of the configuration. `named_by_run`: the model is that of a run of train or retrain.
    """
    read, metadata = DataReader(), model.located.metadata
    if not named_by_run:
        trusted = records("", rival.located.metadata).values() if rival else ()
        check_record(metadata, [data, *(each.get("data") for each in trusted)])
    rows = own_rows(metadata, read, data, gate["slices"])
    if rival is None:
        return rows, None, too_few(rows.report, gate["min_test_rows"])
    if rival.located.is_same(model.located):
        return rows, None, "this model is the champion"
    try:
        judging = {"data": data, "labelled": labelled, "min_rows": gate["min_test_rows"]}
        rows = choose_rows(rival.located.metadata, metadata, read, **judging)
        return rows, compare_models(rival.learner, model.learner, rows, labelled, gate, metrics), ""
    except UserError as error:
        return rows, None, f"this model cannot be compared with the champion: {error}"


def compare_models(
    champion: Learner,
    challenger: Learner,
    rows: JudgingRows,
    labelled: Labelled | None,
    gate: Mapping[str, Any],
    metrics: Metrics | None = None,
) -> Compared:
    """Compare two models; `labelled` holds accepted and used labels, `gate` is conf/gate.

    Raises UserError where the models cannot be compared: another task, other classes, other columns.
    """
    X, y = rows.dataset.part("test")
    settings = {key: gate[key] for key in ("metric", "confidence_level")} | {"metrics": metrics}
    for model, learner in (("the champion", champion), ("this model", challenger)):
        check_labels(model, learner, y, rows.dataset.task)
    before, after = answer_both(champion, challenger, rows.for_champion, rows.for_challenger, y, rows.weight)
    test = compare(before, after, **settings)
    slices = [column for column in gate["slices"] if column in X]  # the champion's data may lack one
    worse = worse_slices(before, after, X[slices], gate["confidence_level"])
    if labelled is None:
        return Compared(before, test, worse)

    judging = audit.select_audit_rows(labelled, *rows.trained_on, max_share=gate["max_share_per_annotator"])
    n, minimum = len(judging.rows.labels), gate["min_audit_rows"]
    report: dict[str, Any] = {
        "n": n,
        "feedback_ids": judging.rows.about["feedback_id"].tolist(),
        "annotators": judging.counts,
        "left_out": judging.left_out,
        "notes": judging.notes(gate["max_share_per_annotator"]),
    }
    if n < minimum:
        return Compared(before, test, worse, n, {}, report)
    inputs, labels = judging.rows.inputs, pd.Series(judging.rows.labels.tolist(), name=y.name)
    for_champion, for_challenger = (align_columns(inputs, table) for table in (rows.for_champion, rows.for_challenger))
    before_new, after_new = answer_both(champion, challenger, for_champion, for_challenger, labels, None)
    new = compare(before_new, after_new, **settings)
    worse += worse_slices(before_new, after_new, align_columns(inputs, X)[slices], gate["confidence_level"])
    scores = measure(after_new, metrics, strict=False)
    scores |= {f"champion_{name}": value for name, value in measure(before_new, metrics, strict=False).items()}
    report |= {"metrics": scores, "comparison": asdict(new)}
    without: dict[str, Comparison | int] = {}
    for annotator in judging.counts if judging.are_told_apart else ():
        others = np.flatnonzero(audit.annotators(judging.rows) != annotator)
        few = len(others) < minimum
        without[annotator] = len(others) if few else compare(before_new.at(others), after_new.at(others), **settings)
    return Compared(before, test, worse, new, without, report)


def check_labels(model: str, learner: Learner, y: pd.Series, task: str) -> None:
    """UserError where a model of another task or of other classes would answer rows with labels y."""
    if learner.task != task:
        raise UserError(f"{model} is a model of {learner.task}, and the test rows ask for {task}")
    if learner.classes is not None and not set(learner.classes) & set(y.tolist()):
        raise UserError(
            f"the classes of {model}, such as {learner.classes[0]!r}, are no labels of the test rows, such as {y.iloc[0]!r}"
        )


def answer_both(
    champion: Learner, challenger: Learner, for_champion: pd.DataFrame, for_challenger: pd.DataFrame, y: pd.Series,
    weight: np.ndarray | None,
) -> tuple[Answers, Answers]:  # fmt: skip
    """The answers of both models on the same rows."""
    try:
        before = answer(champion, for_champion, y, weight)
    except (KeyError, ValueError) as error:  # scikit-learn's, where a column is missing whose data are not known
        raise UserError(f"the champion cannot answer the test rows: {str(error).splitlines()[0]}") from None
    return before, answer(challenger, for_challenger, y, weight)
