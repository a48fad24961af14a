"""Which labelled rows a retraining learns from, and which stay the gate's: pure functions of a data set and labels.

A retraining replays all rows that the model was trained on and adds what people said since. Rows drawn at random for a
label (audit rows) are split by a hash of their inputs, for good: one half trains, the other half only ever judges.
What people chose to report is where the model is wrong, so it trains and never judges.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from alacarte.data.dataset import Dataset
from alacarte.data.splits import hash_present, hash_split
from alacarte.errors import UserError
from alacarte.feedback.queries import Labelled

GATE_SEED = 20_000  # of the hash that halves the audit rows; another one would let the gate judge by rows that trained
TAKEN = ""


@dataclass(frozen=True, eq=False)
class Rows:
    """What a retraining trains on, as pairs of X and y: replayed rows of the data first, then labelled ones."""

    train: tuple[pd.DataFrame, pd.Series]
    val: tuple[pd.DataFrame, pd.Series]
    n_replayed: int  # rows of `train` that come from the data


def for_gate(labelled: Labelled) -> np.ndarray:
    """(n,) bool: the labels that only ever judge, half of those for audit rows."""
    if labelled.labels.empty:
        return np.zeros(0, bool)
    half = hash_split(hash_present(labelled.inputs), val=0.25, test=0.5, seed=GATE_SEED) == "test"
    return half & labelled.about["audit"].to_numpy(bool)


def has_new(labelled: Labelled) -> bool:
    """Whether there is an accepted label that may train."""
    return bool(((labelled.about["state"] == "accepted").to_numpy() & ~for_gate(labelled)).any())


def givers(labelled: Labelled) -> pd.Series:
    """(n,) who gave each label, as Feedback.annotator describes it."""
    return labelled.about["annotator"].astype(str)


def select(
    labelled: Labelled,
    dataset: Dataset,
    *,
    classes: Sequence | None,
    giver_share: float,
    reach: float,
    rejected: Collection[str] = (),
) -> pd.Series:
    """(n,) why a label is left out, "" for those that train. `labelled` holds accepted and used labels.

    "gate": it judges. "test": its inputs are those of a row that judges. "rejected": the gate rejected one of the
    versions `rejected`, which used it. "reach": a number lies beyond the range of the training rows by more than `reach`
    times that range. "class": none of `classes`. "share": one giver's new labels are at most `giver_share` times the rows
    of the train part; the newest are taken, and the others wait.
    """
    about, judging = labelled.about, for_gate(labelled)
    left = np.full(len(about), TAKEN, dtype=object)
    if not len(about):
        return pd.Series(left, dtype=object)
    hashes = hash_present(labelled.inputs)
    tests = np.concatenate([hashes[judging], hash_present(dataset.part("test")[0])])
    fits = np.ones(len(about), bool) if classes is None else labelled.labels.isin(list(classes)).to_numpy()
    used = (about["state"] == "used").to_numpy()
    for reason, rows in (
        ("gate", judging),
        ("test", np.isin(hashes, tests)),
        ("rejected", used & about["used_version"].isin(list(rejected)).to_numpy()),
        ("reach", ~within_reach(labelled, dataset, reach)),
        ("class", ~fits),
    ):
        left[rows & (left == TAKEN)] = reason
    most = max(1, int(giver_share * (dataset.split == "train").sum()))
    new = pd.Series(np.flatnonzero((left == TAKEN) & ~used)[::-1])  # the newest first
    place = new.groupby(givers(labelled).to_numpy()[new]).cumcount()
    left[new[place >= most]] = "share"
    return pd.Series(left, dtype=object)


@dataclass(frozen=True, eq=False)
class Choice:
    """What a retraining trains on: the labels by their positions, and how it begins."""

    new: np.ndarray  # positions of labels that no training used yet
    replayed: np.ndarray  # positions of labels that earlier ones used
    init: str
    left_out: dict[str, int]  # why, and how many of the accepted labels

    @property
    def why_left_out(self) -> str:
        return ", ".join(f"{n} ({why})" for why, n in self.left_out.items()) or "none"


def choose(
    labelled: Labelled,
    dataset: Dataset,
    *,
    classes: Sequence | None,
    init: str,
    new_classes: str,
    giver_share: float,
    reach: float,
    rejected: Collection[str],
) -> Choice:
    """Apply `select`, and decide about labels of a class that the model lacks: UserError, or training from scratch."""
    accepted = (labelled.about["state"] == "accepted").to_numpy()
    limits: dict[str, Any] = {"giver_share": giver_share, "reach": reach, "rejected": rejected}
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
    return Choice(np.flatnonzero(taken & accepted), np.flatnonzero(taken & ~accepted), init, left_out)


def within_reach(labelled: Labelled, dataset: Dataset, reach: float) -> np.ndarray:
    """(n,) bool: no number, the label of a regression included, is further out of the train part's range than `reach`."""
    inside = np.ones(len(labelled.labels), bool)
    X, y = dataset.part("train")
    rows = like(labelled.inputs, X)
    pairs = [(X[name], rows[name]) for name in X if X[name].dtype.kind in "if"]
    if dataset.task == "regression":
        pairs.append((y, labelled.labels))
    for known, given in pairs:
        low, high = float(known.min()), float(known.max())
        room = reach * ((high - low) or abs(high) or 1.0)
        values = pd.to_numeric(given, errors="coerce").to_numpy("float64")
        inside &= ~((values < low - room) | (values > high + room))
    return inside


def make_rows(
    dataset: Dataset,
    labelled: Labelled,
    fractions: dict[str, Any],
    *,
    replay_limit: int | None = None,
    label_repeats: int = 1,
    seed: int = 0,
) -> Rows:
    """Replay and labels as one training set. `labelled` holds what trains; `fractions` is data.split.

    A labelled row goes to the validation part by the rule that splits the data, so that training stops at what serves
    both; in the training part it comes `label_repeats` times. `replay_limit` caps the replayed rows and keeps every class
    in its proportion.
    """
    X, y = dataset.part("train")
    X_val, y_val = dataset.part("val")
    if replay_limit is not None and replay_limit < len(X):
        kept = _sample(y, replay_limit, dataset.task, seed)
        X, y = X.iloc[kept], y.iloc[kept]
    if labelled.labels.empty:
        return Rows((X, y), (X_val, y_val), len(X))
    inputs, labels = like(labelled.inputs, X), pd.Series(labelled.labels.tolist(), name=y.name, dtype=y.dtype)
    validates = hash_split(hash_present(inputs), **fractions) == "val"
    trains = np.repeat(np.flatnonzero(~validates), label_repeats)

    def join(table: Any, rows: Any) -> Any:
        return pd.concat([table, rows], ignore_index=True)

    return Rows(
        (join(X, inputs.iloc[trains]), join(y, labels.iloc[trains])),
        (join(X_val, inputs[validates]), join(y_val, labels[validates])), len(X),
    )  # fmt: skip


def gate_rows(labelled: Labelled, dataset: Dataset) -> Labelled:
    """The labels by which the gate judges, without those whose inputs some training has seen."""
    judging = for_gate(labelled)
    if judging.any():
        hashes = hash_present(labelled.inputs)
        trained = hashes[~judging & (labelled.about["state"] == "used").to_numpy()]
        judging &= ~np.isin(hashes, np.concatenate([trained, hash_present(dataset.part("train")[0])]))
    return take(labelled, judging)


def take(labelled: Labelled, rows: np.ndarray) -> Labelled:
    """The labels at these positions, or where `rows` (n,) bool says so."""

    def part(table: Any) -> Any:
        return table.iloc[rows].reset_index(drop=True)

    return Labelled(part(labelled.inputs), part(labelled.labels), part(labelled.about))


def like(inputs: pd.DataFrame, X: pd.DataFrame) -> pd.DataFrame:
    """Stored inputs with the columns of `X`, in its order and as its types; what the store does not have is missing."""
    columns = {}
    for name, known in X.items():
        values = inputs[name] if name in inputs else pd.Series(None, index=inputs.index, dtype=object)
        columns[name] = _as_type(values, known.dtype)
    return pd.DataFrame(columns, index=inputs.index)


def check_settings(*, budget: float, init: str, inits: Sequence[str], shrink: float, **more: Any) -> None:
    """UserError for settings that no retraining could follow."""
    if init not in inits:
        raise UserError(f"retrain.init={init}: allowed are {', '.join(inits)}")
    if more["new_classes"] not in ("error", "scratch"):
        raise UserError(f"retrain.new_classes={more['new_classes']}: allowed are error and scratch")
    for key, value in (("budget", budget), ("shrink", shrink)):
        if not (isinstance(value, int | float) and 0 < value <= 1):
            raise UserError(f"retrain.{key}={value}: allowed are numbers above 0 and up to 1")
    for key in ("giver_share", "reach", "replay_limit", "least_labels", "label_repeats"):
        value = more[key]
        whole = key in ("replay_limit", "least_labels", "label_repeats")
        if value is None and key == "replay_limit":
            continue
        if not (isinstance(value, int if whole else int | float) and value > 0):
            raise UserError(f"retrain.{key}={value}: allowed are {'whole ' if whole else ''}numbers above 0")


def _as_type(values: pd.Series, dtype: Any) -> pd.Series:
    if isinstance(dtype, pd.CategoricalDtype):
        dtype = dtype.categories.dtype
    if pd.api.types.is_datetime64_any_dtype(dtype):
        return pd.to_datetime(values, errors="coerce", utc=True, format="ISO8601").dt.tz_localize(None)
    if pd.api.types.is_object_dtype(dtype) or pd.api.types.is_bool_dtype(dtype):  # booleans, some missing
        return values.map({True: True, False: False, "true": True, "false": False}).astype(object)
    if pd.api.types.is_numeric_dtype(dtype):
        numbers = pd.to_numeric(values, errors="coerce").astype("float64")
        return numbers.mask(np.isinf(numbers))
    return values.astype(object).where(values.notna(), None).astype("str")


def _sample(y: pd.Series, limit: int, task: str, seed: int) -> np.ndarray:
    """Positions of about `limit` rows, at least one of each class."""
    draw = np.random.default_rng(seed)
    if task == "regression":
        return np.sort(draw.choice(len(y), limit, replace=False))
    kept = []
    for rows in pd.Series(np.arange(len(y))).groupby(y.to_numpy()).groups.values():
        kept.append(draw.choice(rows, max(1, round(limit * len(rows) / len(y))), replace=False))
    return np.sort(np.concatenate(kept))
