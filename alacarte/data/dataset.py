"""Data sets: call a loader, decide the task, split the rows, and identify the result by its digest.

A loader (`data._target_`) returns one DataFrame that contains the target column. All other work is the same for all loaders.
"""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import pkgutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from alacarte.data import tables
from alacarte.data.columns import check_columns, input_of, names_of, rows_with_target, target_of, weights_of
from alacarte.data.csv_reader import CellRules
from alacarte.data.splits import PARTS, SplitRule, check_parts, hash_rows, place_rare_classes
from alacarte.errors import UserError

if TYPE_CHECKING:
    from mlflow.data.dataset_source import DatasetSource
    from mlflow.data.pandas_dataset import PandasDataset


REPLACED = "they no longer contain the rows that it was trained on, or contain them with other values"
SAMPLE = 100  # rows of the train and val parts whose hashes a model records


class ChangedData(UserError):
    """The data of a model are no longer the data that it was trained on."""


class ReplacedData(ChangedData):
    """The data no longer contain the rows that a model was trained on, or contain them with other values."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A typed and split table of n rows."""

    X: pd.DataFrame  # (n, columns), each of a type that `tables.plain_column` gives
    y: pd.Series  # (n,), none missing: labels (str, int64 or bool), or float64
    split: np.ndarray  # (n,): "train", "val", "test", or "dropped" for the rows of a rare class
    task: str  # "classification" or "regression"
    name: str
    target: str
    source: str  # absolute path, URL, or the dotted name of what made the rows
    digest: str  # 16 hex digits: of columns and their types, rows in their order, target, split and weights
    weights: np.ndarray | None = None  # (n,) float64

    def part(self, name: str) -> tuple[pd.DataFrame, pd.Series]:
        """Inputs and target of "train", "val" or "test"."""
        assert name in PARTS, name
        rows = self.split == name
        return self.X[rows], self.y[rows]

    def weight(self, name: str) -> np.ndarray | None:
        """The weight of each row of "train", "val" or "test"; None without data.weight."""
        assert name in PARTS, name
        return None if self.weights is None else self.weights[self.split == name]

    @property
    def is_trained_on(self) -> np.ndarray:
        """(n,) bool: the rows of the train and val parts."""
        return np.isin(self.split, ("train", "val"))

    @property
    def metadata(self) -> dict[str, Any]:
        """What a model records of the data that it was trained on.

        `trained_rows` are the lowest hashes of the train and val rows: a random sample without inputs that are also in a
        test row.
        """
        rows = hash_rows(self.X)
        sample = np.setdiff1d(rows[self.is_trained_on], rows[~self.is_trained_on])[:SAMPLE]
        about = {"dataset_digest": self.digest, "task": self.task, "target": self.target}
        return about | {"trained_rows": " ".join(f"{row:x}" for row in sample.tolist())}

    def why_unknown(self, metadata: Mapping[str, Any]) -> str:
        """The reason why training rows of a model may be test rows here. Empty if they are still train or val rows.

        `metadata` is the record of a model that was trained on an earlier state of these data.
        """
        known = set(metadata.get("column_types") or {}) - {self.target}
        if changed := sorted(known ^ set(self.X)) if known else []:
            return f"they have other columns, such as {changed[0]}"
        if "trained_rows" not in metadata:  # a model of an older version of this library
            by = (metadata["data"].get("split") or {}).get("by", "hash")
            return "" if known and by == "hash" else f"data.split.by={by} may have put rows into other parts"
        n_kept, n_moved, n = self._count_recorded(metadata)
        if n_moved:
            return f"{n_moved} of {n} rows of its train and val parts are now test rows"
        return "" if n_kept and n_kept >= 0.2 * n else REPLACED

    def contains(self, metadata: Mapping[str, Any]) -> bool:
        """Whether all recorded rows that a model was trained on are in the train and val parts here."""
        n_kept, _, n = self._count_recorded(metadata)
        return 0 < n_kept == n

    def _count_recorded(self, metadata: Mapping[str, Any]) -> tuple[int, int, int]:
        """Of the sample of rows that a model records: those in the train and val parts, those in the test part, and all."""
        sample = np.array([int(row, 16) for row in metadata.get("trained_rows", "").split()], np.uint64)
        rows = hash_rows(self.X)
        kept, moved = (np.isin(sample, rows[part]) for part in (self.is_trained_on, self.split == "test"))
        return int(kept.sum()), int(moved.sum()), len(sample)


def load_data(
    *,
    _target_: str,
    name: str | None = None,
    target: str,
    task: str = "auto",
    key: str | None = None,
    drop: str | Sequence[str] | None = (),
    split: Mapping[str, Any] | None = None,
    rare_classes: str = "keep",
    weight: str | None = None,
    types: Mapping[str, str] | None = None,
    **loader_arguments: Any,
) -> Dataset:
    """Call the loader `_target_` with `loader_arguments` and make its DataFrame a Dataset. docs/data.md explains the keys.

    `task="auto"`: text, booleans and the category dtype mean classification; so do whole numbers (also stored as floats)
    with at most 20 distinct values that each come five times on average; all other numbers mean regression.
    `types` are what a model knows of its columns (`tables.column_types`): they decide how the columns are read.

    Raises UserError, in one line, for whatever in the arguments or in the rows leaves no model to learn.
    """
    rule = SplitRule.of(split)
    if task not in ("auto", "classification", "regression"):
        raise UserError(f"data.task={task}: use auto, classification or regression")
    if rule.by != "hash" and key is not None:
        raise UserError(f"data.key={key} is for data.split.by=hash, not data.split.by={rule.by}: use one of them")
    frame, source = _call_loader(_target_, loader_arguments, types or {})
    roles = {"target": names_of(target), "key": names_of(key), "drop": names_of(drop), "weight": names_of(weight)}
    roles["split.column"] = names_of(rule.column)
    reading = {role: names_of(loader_arguments.get(role)) for role in ("text", "numbers") if "path" in loader_arguments}
    check_columns({**roles, **reading}, frame, source)
    frame = rows_with_target(frame, str(target))
    y, task = target_of(frame[str(target)], task)
    no_inputs = {name for role, names in roles.items() if role != "split.column" or not rule.as_input for name in names}
    X = pd.DataFrame({column: input_of(frame[column]) for column in frame.columns if column not in no_inputs})
    if X.columns.empty:
        raise UserError(f"data.target={target}: {source} has no other column to predict it from")
    weights = None if weight is None else weights_of(frame[str(weight)])

    rows = hash_rows(X)
    groups = rows if key is None else hash_rows(tables.plain_column(frame[str(key)]).to_frame())
    parts = rule.assign(groups, None if rule.column is None else tables.plain_column(frame[rule.column]))
    if task == "classification":
        parts = place_rare_classes(y, parts, groups, rule, rare_classes)
    check_parts(y, parts, groups, task, rule, weights)
    described = [f"{column}: {dtype}" for column, dtype in X.dtypes.items()]
    digest = hashlib.blake2b(json.dumps([described, str(target), str(y.dtype), task]).encode(), digest_size=8)
    for values in (rows, hash_rows(y.to_frame()), parts.astype("S5"), *([] if weights is None else [weights])):
        digest.update(values.tobytes())
    path = loader_arguments.get("path")
    name = name or (tables.stem(str(path)) if path else _target_.rpartition(".")[2])
    return Dataset(X, y, parts, task, name, str(target), source, digest.hexdigest(), weights)


class DataReader:
    """Reads each data group once."""

    def __init__(self) -> None:
        self._datasets: dict[str, Dataset] = {}

    def __call__(self, data: Mapping[str, Any], types: Mapping[str, str] | None = None) -> Dataset:
        """The data set of a data group of the configuration, with the column types that a model knows."""
        path = {"path": tables.absolute(str(data["path"]))} if data.get("path") else {}
        key = json.dumps([{**data, **path}, types], sort_keys=True, default=str)
        if key not in self._datasets:
            self._datasets[key] = load_data(**data, types=types)
        return self._datasets[key]

    def recorded(self, metadata: Mapping[str, Any], model: str, *, check_digest: bool = True) -> Dataset:
        """The data that a model records in its `metadata`. `model` names it in messages.

        UserError where it records no data and where they cannot be read. ChangedData where they have changed, which without
        `check_digest` is accepted if the rows that the model was trained on are still in the train and val parts.
        """
        data, digest, reason = metadata.get("data"), metadata.get("dataset_digest"), ""
        if not data:
            raise UserError(f"{model} does not record its data: add -P data=... with the data that it was trained on")
        try:
            dataset = self._restore(recorded(data), metadata)
            reason = "" if check_digest or dataset.digest == digest else dataset.why_unknown(metadata)
        except (UserError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            hint = "" if "-P data=" in str(error) else ": add -P data=... with data that can be read"
            raise UserError(f"the data of {model} cannot be read: {kind}{error}{hint}") from None
        if reason:
            raise (ReplacedData if reason == REPLACED else ChangedData)(
                f"the data of {model} have changed: {reason}, so test rows may be rows that it was trained on: restore the "
                "data, or add -P data=... with other data that contain rows which it was not trained on"
            )
        if check_digest and dataset.digest != digest:
            raise ChangedData(
                f"the data of {model} have changed: their digest was {digest} and is {dataset.digest}: "
                "add -P data=... to take them as they are now"
            )
        return dataset

    def _restore(self, data: Mapping[str, Any], metadata: Mapping[str, Any]) -> Dataset:
        """The data as a model was trained on them, as far as possible: with its column types or without, and without columns
        that were added later, because a new column changes the hash of each row and so its part."""
        known = metadata.get("column_types") or None
        for types in (known, None):
            with contextlib.suppress(UserError):
                if (dataset := self(data, types)).digest == metadata.get("dataset_digest"):
                    return dataset
        dataset = self(data, known)
        later = [name for name in dataset.X if known and name not in known]
        return self({**data, "drop": [*names_of(data.get("drop")), *later]}, known) if later else dataset


def recorded(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data group that a model records, after a check of its loader, because anybody can write the metadata of a model.

    UserError for a loader that is not a function of project/ and not read_table.
    """
    target = str(data.get("_target_"))
    try:
        loader = pkgutil.resolve_name(target) if target.startswith(("project.", "alacarte.data.tables.")) else None
    except (ImportError, AttributeError, ValueError):
        loader = None
    module = str(getattr(loader, "__module__", None))
    if not inspect.isfunction(loader) or not (module.startswith("project.") or module == "alacarte.data.tables"):
        raise UserError(
            f"the model names data._target_={target}, which is no function of project/: add -P data=... instead"
        )
    return dict(data)


def _call_loader(_target_: str, arguments: Mapping[str, Any], types: Mapping[str, str]) -> tuple[pd.DataFrame, str]:
    """The loader's rows, their column names distinct strings, and where they come from."""
    try:
        loader = pkgutil.resolve_name(_target_)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"data._target_={_target_}: {error}: give the dotted name of a function") from None
    try:
        inspect.signature(loader).bind(**arguments)
    except TypeError as error:
        allowed = ", ".join(inspect.signature(loader).parameters)
        raise UserError(f"data: {_target_} takes {allowed or 'no keys'}: {error}") from None
    rules = CellRules(text=names_of(arguments.get("text")), numbers=names_of(arguments.get("numbers"))).for_model(types)
    if loader is tables.read_table:
        arguments = {**arguments, "text": rules.text, "numbers": rules.numbers}
        if arguments.get("missing") is not None:
            arguments["missing"] = names_of(arguments["missing"])
    frame = loader(**arguments)
    if not isinstance(frame, pd.DataFrame):
        raise UserError(f"data._target_={_target_} returns {type(frame).__name__}: return one pandas DataFrame")
    path = arguments.get("path")
    source = frame.attrs.get("source") or (tables.absolute(str(path)) if path else _target_)
    frame = frame.set_axis(frame.columns.map(str), axis="columns")
    if repeated := sorted(set(frame.columns[frame.columns.duplicated()])):
        raise UserError(f"{source} has more than one column {', '.join(repeated)}: rename them")
    if frame.empty:
        raise UserError(f"{source} has {len(frame.columns)} columns and {len(frame)} rows: give it rows to learn from")
    return (frame if loader is tables.read_table else tables.convert(frame, CellRules().for_model(types))), source


def source_digest(*, _target_: str, path: str | None = None, **arguments: Any) -> str:
    """SHA-256 that tells whether the source has changed, without parsing it. Takes what `load_data` takes.

    With a `path`, the hash of the bytes there (`tables.path_digest`). Without, that of the loader's name, its arguments and
    the versions of pandas and scikit-learn. Such a loader must return the same rows for the same arguments.
    """
    if path:
        return tables.path_digest(str(path))
    versions = [importlib.metadata.version(package) for package in ("pandas", "scikit-learn")]
    text = json.dumps([_target_, arguments, versions], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def columns_like_ids(X: pd.DataFrame) -> list[str]:
    """The text columns with another value in each of many rows: a model can only learn them by heart."""
    texts = X.select_dtypes(["object", "string"]).columns if len(X) >= 100 else []
    return [str(name) for name in texts if X[name].is_unique]


def as_mlflow(dataset: Dataset, part: str) -> "PandasDataset":
    """One part for `mlflow.log_input`. The digest is that of all parts.

    Its name is `<name>_<part>`, because MLflow stores the row count only once for each name and digest. A source for which
    MLflow has no class (memory://, hf://, the name of a loader) is recorded as code, by its name.
    """
    from mlflow.data.pandas_dataset import PandasDataset

    assert part in PARTS, part
    table = pd.concat([dataset.X, dataset.y], axis="columns")
    # The schema contains the type of each column and whether values are missing. Two rows of each column are enough for it.
    present = table.notna().to_numpy()
    telling = sorted({*present.argmax(axis=0), *present.argmin(axis=0)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two classes for local files, and a hint on integers that is for models
        source = _source(dataset.source)
        schema = _short_schema(PandasDataset(table.iloc[telling], source, digest=dataset.digest))
    rows = table[dataset.split == part]
    logged = PandasDataset(rows, source, dataset.target, f"{dataset.name}_{part}", dataset.digest)
    vars(logged)["schema"] = schema  # where its cached property keeps it
    return logged


def table_as_mlflow(frame: pd.DataFrame, path: str, digest: str) -> "PandasDataset":
    """A table read from `path`, whose SHA-256 is `digest`, for `mlflow.log_input`."""
    from mlflow.data.pandas_dataset import PandasDataset

    name = tables.stem(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logged = PandasDataset(frame, _source(tables.absolute(str(path))), name=name, digest=digest[:16])
        vars(logged)["schema"] = _short_schema(logged)
        return logged


def _short_schema(logged: "PandasDataset") -> Any:
    """The schema of a data set; None for a schema of some 10,000 columns, which is longer than MLflow stores."""
    from mlflow.utils.validation import MAX_DATASET_SCHEMA_SIZE

    schema = logged.schema
    return (
        schema
        if schema is None or len(json.dumps({"mlflow_colspec": schema.to_dict()})) <= MAX_DATASET_SCHEMA_SIZE
        else None
    )


def _source(place: str) -> "DatasetSource":
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.exceptions import MlflowException

    if "/" in place:
        with contextlib.suppress(MlflowException):
            return resolve_dataset_source(place)
    return CodeDatasetSource({"mlflow.source.name": place})
