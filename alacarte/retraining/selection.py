"""Which labelled rows a retraining learns from: pure functions of a data set and labels.

A retraining replays all rows that the model was trained on and adds the labels that came since. The labels that judge
are in `alacarte.evaluation.audit`; they never train.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from alacarte.data.dataset import Dataset
from alacarte.data.splits import SplitRule, hash_present, hash_split, occurs_in
from alacarte.data.tables import align_columns
from alacarte.errors import UserError, check_number
from alacarte.evaluation.audit import ONE_PARTY, annotators, are_told_apart, for_gate
from alacarte.feedback.queries import Labelled

TAKEN = ""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a retraining, as pairs of X and y: replayed rows of the data first, then labelled rows."""

    train: tuple[pd.DataFrame, pd.Series]
    val: tuple[pd.DataFrame, pd.Series]
    n_replayed: int  # rows of `train` that come from the data
    weight: np.ndarray | None = None  # of the rows of `train`, with data.weight; a labelled row has the mean weight
    val_weight: np.ndarray | None = None


def has_new(labelled: Labelled) -> bool:
    """Whether there is an accepted label that may train."""
    return bool(((labelled.about["state"] == "accepted").to_numpy() & ~for_gate(labelled)).any())


def select(
    labelled: Labelled,
    dataset: Dataset,
    *,
    classes: Sequence | None,
    max_labels_per_annotator: int,
    max_range_factor: float,
    rejected: Collection[str] = (),
) -> pd.Series:
    """(n,) the reason why a label is left out, "" for a label that trains. `labelled` holds accepted and used labels.

    "gate": it judges. "test": its inputs are the inputs of a row that judges. "rejected": the gate rejected one of the
    versions `rejected`, which used it. "range": a number lies outside the range of the training rows by more than
    `max_range_factor` times that range. "class": none of `classes`.
    "share": one annotator has at most `max_labels_per_annotator` labels. Labels that earlier retrainings used count first,
    then the newest of the others; the rest wait. Where annotators are not told apart (`are_told_apart`), there is no such
    limit.
    """
    about, judging = labelled.about, for_gate(labelled)
    left = np.full(len(about), TAKEN, dtype=object)
    if not len(about):
        return pd.Series(left, dtype=object)
    hashes = hash_present(labelled.inputs)
    judges = np.isin(hashes, hashes[judging]) | occurs_in(labelled.inputs, dataset.part("test")[0])
    fits = np.ones(len(about), bool) if classes is None else labelled.labels.isin(list(classes)).to_numpy()
    used = (about["state"] == "used").to_numpy()
    for reason, rows in (
        ("gate", judging),
        ("test", judges),
        ("rejected", used & about["used_version"].isin(list(rejected)).to_numpy()),
        ("range", ~is_within_range(labelled, dataset, max_range_factor)),
        ("class", ~fits),
    ):
        left[rows & (left == TAKEN)] = reason
    if are_told_apart(labelled):
        # A version has learned from all labels that its ancestors used, also from labels that are not replayed now.
        spent = np.flatnonzero(used & ~np.isin(left, ["gate", "rejected"]))
        new = np.flatnonzero((left == TAKEN) & ~used)[::-1]
        order = pd.Series(np.concatenate([spent, new]))
        place = order.groupby(annotators(labelled).to_numpy()[order]).cumcount()
        above = np.zeros(len(about), bool)
        above[order[place >= max_labels_per_annotator]] = True
        left[above & (left == TAKEN)] = "share"
    return pd.Series(left, dtype=object)


def most_labels(dataset: Dataset, settings: Mapping[str, Any]) -> int:
    """How many labels of one annotator may train, over all retrainings together: each comes `label_weight` times."""
    rows = int((dataset.split == "train").sum())
    rows = min(rows, settings["max_replay_rows"] or rows)
    return max(1, int(settings["max_share_per_annotator"] * rows / settings["label_weight"]))


@dataclass(frozen=True, eq=False)
class Choice:
    """The labels of a retraining, by their positions, and the start of its training."""

    new: np.ndarray  # positions of labels that no training used yet
    replayed: np.ndarray  # positions of labels that earlier retrainings used
    init: str
    left_out: dict[str, int]  # why, and how many of the accepted labels
    above_share: dict[str, int]  # annotator -> number of labels left out because of "share", used ones included
    are_told_apart: bool  # False: all labels count as labels of one annotator

    @property
    def why_left_out(self) -> str:
        return ", ".join(f"{n} ({why})" for why, n in self.left_out.items()) or "none"

    def record(self, labelled: Labelled, new: np.ndarray) -> dict[str, Any]:
        """The exact labels of a retraining that got the labels at the positions `new`, for feedback.json."""
        ids, places = labelled.about["feedback_id"], np.concatenate([self.replayed, new])
        report = {"new": sorted(ids.iloc[new].tolist()), "replayed": ids.iloc[self.replayed].tolist()}
        counts = annotators(labelled).iloc[places].value_counts().to_dict()
        return report | {"left_out": self.left_out, "annotators": counts, "above_share": self.above_share}

    def notes(self, dataset: Dataset, settings: Mapping[str, Any]) -> list[str]:
        """One sentence for each thing that a user should know about annotators."""
        if not self.are_told_apart:
            return [ONE_PARTY]
        if not self.above_share:
            return []
        counts = ", ".join(f"{annotator} {count:,}" for annotator, count in self.above_share.items())
        return [
            f"labels left out, by annotator: {counts}; of one annotator {most_labels(dataset, settings):,} labels train, over "
            f"all retrainings together (retrain.max_share_per_annotator={settings['max_share_per_annotator']:g} of the "
            f"training rows, in which a label comes retrain.label_weight={settings['label_weight']} times)"
        ]


def choose(
    labelled: Labelled,
    dataset: Dataset,
    *,
    classes: Sequence | None,
    init: str,
    new_classes: str,
    **limits: Any,
) -> Choice:
    """Apply `select` with its `limits`, and decide about labels of a class that the model lacks: UserError, or training
    from scratch."""
    accepted = (labelled.about["state"] == "accepted").to_numpy()
    left = select(labelled, dataset, classes=classes, **limits).to_numpy()
    if (unknown := (left == "class") & accepted).any():
        if new_classes == "error":
            counts = ", ".join(f"{label!r} ({n})" for label, n in Counter(labelled.labels[unknown]).most_common(5))
            raise UserError(
                f"retrain.new_classes=error: {unknown.sum()} accepted labels are no classes of the champion: {counts}: "
                "reject them, or use retrain.new_classes=scratch to learn them from scratch"
            )
        init, left = "scratch", select(labelled, dataset, classes=None, **limits).to_numpy()
    left_out = dict(Counter(left[accepted & (left != TAKEN)].tolist()))
    taken = left == TAKEN
    above_share = annotators(labelled)[left == "share"].value_counts().to_dict()
    new, replayed = np.flatnonzero(taken & accepted), np.flatnonzero(taken & ~accepted)
    return Choice(new, replayed, init, left_out, above_share, are_told_apart(labelled))


def is_within_range(labelled: Labelled, dataset: Dataset, max_range_factor: float) -> np.ndarray:
    """(n,) bool: no number lies outside the range of the train part by more than `max_range_factor` times that range.

    The label of a regression is such a number too.
    """
    inside = np.ones(len(labelled.labels), bool)
    X, y = dataset.part("train")
    rows = align_columns(labelled.inputs, X)
    pairs = [(X[name], rows[name]) for name in X if X[name].dtype.kind in "if"]
    if dataset.task == "regression":
        pairs.append((y, labelled.labels))
    for known, column in pairs:
        low, high = float(known.min()), float(known.max())
        room = max_range_factor * ((high - low) or abs(high) or 1.0)
        values = pd.to_numeric(column, errors="coerce").to_numpy("float64")
        inside &= ~((values < low - room) | (values > high + room))
    return inside


def make_rows(
    dataset: Dataset,
    labelled: Labelled,
    fractions: dict[str, Any],
    *,
    max_replay_rows: int | None = None,
    label_weight: int = 1,
    seed: int = 0,
) -> Rows:
    """Replay and labels as one training set. `labelled` holds what trains; `fractions` is data.split.

    A labelled row goes to the validation part by the rule that splits the data, so that training stops at what serves
    both; in the training part it comes `label_weight` times. `max_replay_rows` caps the replayed rows and keeps every class
    in its proportion.
    """
    X, y = dataset.part("train")
    X_val, y_val = dataset.part("val")
    weight, val_weight = dataset.weight("train"), dataset.weight("val")
    if max_replay_rows is not None and max_replay_rows < len(X):
        kept = _sample(y, max_replay_rows, dataset.task, seed)
        X, y, weight = X.iloc[kept], y.iloc[kept], None if weight is None else weight[kept]
    if labelled.labels.empty:
        return Rows((X, y), (X_val, y_val), len(X), weight, val_weight)
    inputs, labels = align_columns(labelled.inputs, X), pd.Series(labelled.labels.tolist(), name=y.name, dtype=y.dtype)
    validates = hash_split(hash_present(inputs), **SplitRule.of(fractions).fractions) == "val"
    trains = np.repeat(np.flatnonzero(~validates), label_weight)

    def extend(known: np.ndarray | None, count: int) -> np.ndarray | None:
        """A labelled row has no weight of its own. It gets the mean weight of the training rows."""
        return None if known is None or weight is None else np.append(known, np.full(count, weight.mean()))

    def join(table: Any, rows: Any) -> Any:
        return pd.concat([table, rows], ignore_index=True)

    return Rows(
        (join(X, inputs.iloc[trains]), join(y, labels.iloc[trains])),
        (join(X_val, inputs[validates]), join(y_val, labels[validates])), len(X),
        extend(weight, len(trains)), extend(val_weight, int(validates.sum())),
    )  # fmt: skip


def check_settings(*, inits: Sequence[str], **settings: Any) -> None:
    """UserError for settings of conf/retrain that no retraining could follow."""
    for key, allowed in (("init", inits), ("new_classes", ("error", "scratch"))):
        if settings[key] not in allowed:
            raise UserError(f"retrain.{key}={settings[key]}: allowed are {', '.join(allowed)}")
    for key in ("epoch_fraction", "shrink"):
        check_number(f"retrain.{key}", settings[key], lambda x: 0 < x <= 1, "a number above 0, at most 1")
    for key in ("max_share_per_annotator", "max_range_factor"):
        check_number(f"retrain.{key}", settings[key], lambda x: x > 0, "a number above 0")
    for key in ("max_replay_rows", "min_labels", "label_weight"):
        if settings[key] is not None or key != "max_replay_rows":
            check_number(f"retrain.{key}", settings[key], _is_count, "a whole number above 0")


def _is_count(value: float) -> bool:
    return isinstance(value, int) and value > 0


def _sample(y: pd.Series, limit: int, task: str, seed: int) -> np.ndarray:
    """Positions of about `limit` rows, at least one of each class."""
    draw = np.random.default_rng(seed)
    if task == "regression":
        return np.sort(draw.choice(len(y), limit, replace=False))
    kept = []
    for rows in pd.Series(np.arange(len(y))).groupby(y.to_numpy()).groups.values():
        kept.append(draw.choice(rows, max(1, round(limit * len(rows) / len(y))), replace=False))
    return np.sort(np.concatenate(kept))
