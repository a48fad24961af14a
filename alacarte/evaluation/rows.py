"""The test rows on which a champion and a challenger are compared: rows that neither was trained on.

Each model records its data and split. They show which rows trained it. Two models with the same data and split have the
same test part. Another split, or a dropped column, changes the part of a row. Then the test part of one model has rows
that trained the other.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from alacarte.data.dataset import ChangedData, DataReader, Dataset, ReplacedData
from alacarte.data.splits import hash_present, occurs_in, shared_columns
from alacarte.data.tables import absolute, align_columns
from alacarte.errors import UserError, nearest
from alacarte.feedback.queries import Labelled

logger = logging.getLogger(__name__)

LEFT_OUT = "left out"  # the part of test rows that do not judge
SETTINGS = {  # keys of a data group that open nothing
    *("_target_", "name", "target", "task", "key", "drop", "split"),
    *("separator", "missing", "weight", "rare_classes", "decimal", "text", "numbers"),
}


@dataclass(frozen=True, eq=False)
class JudgingRows:
    """`dataset`, whose test part (n rows) judges, and the inputs of these rows as each model takes them."""

    dataset: Dataset
    for_champion: pd.DataFrame  # (n, columns)
    for_challenger: pd.DataFrame  # (n, columns)
    trained_on: list[Dataset]  # the data that one of the models was trained on, as far as they are known
    report: dict[str, Any]

    @property
    def weight(self) -> np.ndarray | None:
        """(n,) weights of the rows."""
        return self.dataset.weight("test")


def check_record(model: Mapping[str, Any], trusted: Iterable[Mapping[str, Any] | None]) -> None:
    """UserError where a model records data with a path or another text that none of the `trusted` data groups contains.

    Anybody can write a model's metadata. Without this check, an evaluation would open any file or address on demand.
    """
    known = [data for data in trusted if data]
    groups = [each.get("data") or {} for each in records("", model).values()]
    for record, key, value in ((group, key, value) for group in groups for key, value in group.items()):
        if key in SETTINGS or value is None or isinstance(value, bool | int | float):
            continue
        if _source(record, key) not in [_source(data, key) for data in known]:
            raise UserError(
                f"the model records data.{key}={value}, which was not named here and is not opened: "
                f"add -P data=table -P data.path=PATH -P data.target={record.get('target')} to name the data, or give run_id=ID"
            )


def records(model: str, metadata: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The record of a model's data, and those of its ancestors' data, by the names of these models in messages."""
    ancestors = metadata.get("ancestors_data")
    known = [each for each in ancestors if isinstance(each, Mapping)] if isinstance(ancestors, list) else []
    return {model: metadata} | {f"ancestor {i} of {model}": each for i, each in enumerate(known, 1)}


def leave_out_trained(dataset: Dataset, metadata: Mapping[str, Any], read: DataReader) -> Dataset:
    """The data whose test part is without rows that a champion or its ancestors were trained on.

    A warning names the data that cannot be read or have changed, so that these rows are not known.
    """
    trained = {}
    for model, record in records("the champion", metadata).items():
        try:
            if record.get("data"):
                trained[model] = read.recorded(record, model, check_digest=False)
        except UserError as error:
            logger.warning("rows that %s was trained on are not known: %s", model, error)
    return _leave_out(dataset, trained, [])[0]


def _source(data: Mapping[str, Any], key: str) -> Any:
    return absolute(str(data[key])) if key == "path" and data.get(key) else data.get(key)


def own_rows(
    challenger: Mapping[str, Any], read: DataReader, data: Mapping[str, Any] | None, slices: Sequence[str]
) -> JudgingRows:
    """The test part of the challenger's own data, or of `data`, without rows that trained it. These rows judge if there
    is no champion.

    Raises UserError where the model records no data, where its data have changed so that the rows that trained it are not
    known, where no row remains, and where one of `slices` is no column.
    """
    trained, unknown = _trained_on({"this model": challenger}, read, data, check_digest=False)
    dataset = read(data, challenger.get("column_types")) if data else trained["this model"]
    for column in set(slices) - set(dataset.X):
        raise UserError(f"gate.slices={column} is no input column: {nearest(column, dataset.X.columns)}")
    dataset, report = _leave_out(dataset, trained, unknown)
    if not report["n"]:
        raise UserError(f"{_sentence(report)}: add -P data=... with rows that it was not trained on")
    X, _ = dataset.part("test")
    return JudgingRows(dataset, X, X, _distinct(trained) or [dataset], report)


def choose_rows(
    champion: Mapping[str, Any],
    challenger: Mapping[str, Any],
    read: DataReader,
    *,
    data: Mapping[str, Any] | None,
    labelled: Labelled | None,
    min_rows: int,
) -> JudgingRows:
    """The rows that judge. `champion` and `challenger` are what the two models record of themselves.

    The rows and labels come from the champion's test part, because a challenger could forge labels of its own. `data`,
    which the operator names, replaces them. Left out are rows that occur in the train or val part of one of the models,
    by the columns that both data have, and inputs of labels that a retraining used (`labelled`).

    Raises UserError if rows had to be left out and fewer than `min_rows` remain, and if the data of a model cannot be
    read or have changed. With `data`, some of these cases only add a note: see `_trained_on`.
    """
    models = {"the champion": champion, "the challenger": challenger}
    trained, unknown = _trained_on(models, read, data, check_digest=data is None)
    dataset = read(data, champion.get("column_types")) if data else trained["the champion"]
    dataset, report = _leave_out(dataset, trained, unknown, labelled)
    if message := too_few(report, min_rows):
        raise UserError(message)
    X, _ = dataset.part("test")
    return JudgingRows(
        dataset,
        _inputs_for(trained.get("the champion"), X, look_up=True),
        _inputs_for(trained.get("the challenger"), X, look_up=False),
        _distinct(trained) or [dataset],
        report,
    )


def _trained_on(
    models: Mapping[str, Mapping[str, Any]], read: DataReader, data: Mapping[str, Any] | None, *, check_digest: bool
) -> tuple[dict[str, Dataset], list[str]]:
    """The data that trained each of the `models` and its ancestors, and a note for each model whose rows are not known
    or whose data have changed.

    Without `data`, unknown data of a model are an error. Unknown data of an ancestor are a note. With `data`, changed
    data are an error if `data` name the same source. Replaced data of a champion or of an ancestor are a note: a
    champion that had seen the test rows could only gain from that.
    """
    trained, notes = {}, []
    for model, metadata in models.items():
        for name, record in records(model, metadata).items():
            is_own = record is metadata
            try:
                trained[name] = dataset = read.recorded(record, name, check_digest=check_digest and is_own)
            except UserError as error:
                is_harmless = isinstance(error, ReplacedData) and (not is_own or model == "the champion")
                is_changed = isinstance(error, ChangedData) and not is_harmless
                is_fatal = is_changed and (data is None or _is_same_source(data, record["data"]))
                if is_fatal or (is_own and data is None):
                    raise
                reason = str(error).partition(": add -P data=")[0]  # there are `data`
                notes.append(f"rows that {name} was trained on are not known: {reason}")
                continue
            if is_own and dataset.digest != record.get("dataset_digest"):
                notes.append(
                    f"the data of {name} have changed: their digest was {record.get('dataset_digest')} and is "
                    f"{dataset.digest}; the rows that it was trained on are still in the train and val parts"
                )
    return trained, notes


def _is_same_source(data: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two data groups read the same file or table."""
    keys = {"_target_", *({*data, *other} - SETTINGS)}
    return all(_source(data, key) == _source(other, key) for key in keys)


def _leave_out(
    dataset: Dataset, trained: Mapping[str, Dataset], unknown: list[str], labelled: Labelled | None = None
) -> tuple[Dataset, dict[str, Any]]:
    """The data whose test part is without rows that trained a model, and the report about them."""
    X, _ = dataset.part("test")
    judges, reasons = np.ones(len(X), bool), {}
    for model, other in trained.items():
        if other.digest == dataset.digest:
            continue  # the same rows in the same parts
        if not shared_columns(X, other.X):
            raise UserError(f"the data of {model} have none of the columns of the test rows, such as {X.columns[0]}")
        reasons[f"{model} was trained on"] = occurs_in(X, other.X[other.is_trained_on])
    if labelled is not None and (used := (labelled.about["state"] == "used").to_numpy()).any():
        reasons["a retraining used as labelled requests"] = occurs_in(X, labelled.inputs[used])
    for rows in reasons.values():
        judges &= ~rows
    left_out = {reason: int(rows.sum()) for reason, rows in reasons.items() if rows.any()}
    split = dataset.split.astype(object)
    split[np.flatnonzero(split == "test")[~judges]] = LEFT_OUT
    report = {"n": int(judges.sum()), "of": len(X), "left_out": left_out, "unknown": unknown}
    return replace(dataset, split=split), report


def _distinct(trained: Mapping[str, Dataset]) -> list[Dataset]:
    return list({other.digest: other for other in trained.values()}.values())


def too_few(report: Mapping[str, Any], min_rows: int) -> str:
    """Why the rows cannot judge. Empty where no row is left out, or `min_rows` remain."""
    if not report["left_out"] or report["n"] >= min_rows:
        return ""
    return (
        f"{_sentence(report)}, and gate.min_test_rows={min_rows} must judge: train both models with the same data.drop, "
        "data.key and data.split, or evaluate with -P data=... that names rows which neither model has seen"
    )


def describe(report: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing that is not as usual about the rows that judge."""
    return [*([_sentence(report)] if report["left_out"] else []), *report["unknown"]]


def _sentence(report: Mapping[str, Any]) -> str:
    counts = " and ".join(f"{n:,} that {reason}" for reason, n in report["left_out"].items())
    return f"{report['n']:,} of {report['of']:,} test rows can judge, without {counts}"


def _inputs_for(trained: Dataset | None, X: pd.DataFrame, look_up: bool) -> pd.DataFrame:
    """The rows X (n,) with the columns that a model was trained on.

    With `look_up`, columns that X lacks are taken from equal rows of the model's own data. All other columns that X
    lacks are filled with missing values. A column from the challenger's data could contain the label.
    """
    if trained is None or not set(trained.X) - set(X):
        return X
    if look_up and (columns := shared_columns(X, trained.X)):
        known = pd.Index(hash_present(trained.X[columns]))
        places = pd.Series(np.flatnonzero(~known.duplicated()), index=known[~known.duplicated()])
        places = places.reindex(hash_present(X[columns]))
        lacking = [name for name in trained.X if name not in X]
        rows = trained.X[lacking].reindex(places.to_numpy()).set_axis(X.index)
        X = pd.concat([X, rows], axis="columns")
    return align_columns(X, trained.X)
